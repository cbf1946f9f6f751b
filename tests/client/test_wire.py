"""HTTP and server-sent events: any split of the bytes gives what the whole gives, and nonsense is refused by name."""

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.client.wire import MAX_HEAD, ConnectionFailed, EventReader, ResponseParser

RESPONSES = {
    "chunked": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-A: 1\r\nx-a:  2 \r\n\r\n"
                b"5;ext=1\r\nhello\r\n1\r\n\n\r\nA\r\n\r\n0\r\n\r\nabc\r\n0\r\nX-Trailer: 1\r\n\r\n",
                b"hello\n\r\n0\r\n\r\nabc", True),
    "length": (b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\nbody", b"body", True),
    "line feeds": (b"HTTP/1.1 200\nContent-Length: 2\n\nok", b"ok", True),
    "empty": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", True),
    "no content": (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
    "until close": (b"HTTP/1.1 200 OK\r\n\r\nall\r\nof it", b"all\r\nof it", False),
    "old": (b"HTTP/1.0 200 OK\r\nContent-Length: 1\r\n\r\nx", b"x", False),
    "closing": (b"HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: 1\r\n\r\nx", b"x", False),
}


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    """The bytes cut at the given places."""
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(places)]


@pytest.mark.parametrize("name", RESPONSES)
@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 400), max_size=40))
def test_any_split_of_a_response_is_the_whole(name: str, cuts: list[int]) -> None:
    data, body, reusable = RESPONSES[name]
    parser = ResponseParser()
    found = b"".join(parser.feed(part) for part in pieces(data, cuts))
    parser.close()
    assert (found, parser.done, parser.reusable) == (body, True, reusable)
    assert parser.status == int(data.replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")[9:12])
    assert parser.headers.get("x-a", "1, 2") == "1, 2"


@pytest.mark.parametrize("name", [name for name in RESPONSES if name not in ("until close",)])
def test_a_response_that_is_cut_off_is_an_error(name: str) -> None:
    data = RESPONSES[name][0]
    for end in range(len(data)):
        parser = ResponseParser()
        parser.feed(data[:end])
        with pytest.raises(ConnectionFailed, match=r"before it answered|in the middle of its answer"):
            parser.close()


@pytest.mark.parametrize(("data", "message"), [
    (b"SSH-2.0-OpenSSH\r\n", "not HTTP"), (b"HTTP/2 200\r\n", "not HTTP"), (b"HTTP/1.1 OK\r\n", "not HTTP"),
    (b"HTTP/1.1 200 OK\r\nno colon\r\n", "malformed"), (b"HTTP/1.1 200 OK\r\nA : b\r\n", "malformed"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "no number"),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "no number"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n", "gzip"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", "no size"),
    (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n", "longer than"),
    (b"HTTP/1.1 200 OK\r\nX: " + b"a" * MAX_HEAD, "line of more than"),
    (b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * (MAX_HEAD // 6 + 1), "header fields"),
])
def test_what_is_no_http_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ConnectionFailed, match=message):
        ResponseParser().feed(data)


def test_bytes_after_a_response_make_its_connection_useless() -> None:
    parser = ResponseParser()
    parser.feed(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nxyz")
    assert parser.done and not parser.reusable


EVENTS = [
    (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
    (b"data: a\r\n\r\ndata:b\r\n\r\n", [b"a", b"b"]),
    (b"data: a\r\rdata: b\r\r", [b"a"]),  # the last return may be half a line end: it waits
    (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
    (b": ping\n\nevent: x\nid: 1\ndata: a\ndata:  b\ndata\n\n\n\nretry: 5\n\n", [b"a\n b\n"]),
    (b"data: {\"x\": \"\xc3\xa9\"}\n\ndata: [DONE]\n\ndata: cut off\n", [b"{\"x\": \"\xc3\xa9\"}", b"[DONE]"]),
    (b"database: x\n\ndata\n\n", [b""]),
]


@pytest.mark.parametrize(("data", "events"), EVENTS)
@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 100), max_size=20))
def test_any_split_of_events_is_the_whole(data: bytes, events: list[bytes], cuts: list[int]) -> None:
    reader = EventReader()
    assert [event for part in pieces(data, cuts) for event in reader.feed(part)] == events


@settings(max_examples=200, deadline=None)
@given(data=st.lists(st.sampled_from([b"data: a", b"data:", b"\n", b"\r", b"\r\n", b": c", b"x", b"\xef\xbb\xbf"]), max_size=30),
       cuts=st.lists(st.integers(0, 200), max_size=20))
def test_any_split_of_any_bytes_is_the_whole(data: list[bytes], cuts: list[int]) -> None:
    whole = b"".join(data)
    reader = EventReader()
    assert [event for part in pieces(whole, cuts) for event in reader.feed(part)] == EventReader().feed(whole)


def test_an_endless_event_is_refused(monkeypatch: Any) -> None:
    monkeypatch.setattr("octavo.client.wire.MAX_EVENT", 100)
    with pytest.raises(ConnectionFailed, match="100 bytes"):
        EventReader().feed(b"data: " + b"x" * 100)
