"""HTTP/1.1 over raw sockets: what is answered, in which shape, and in which state the connection is afterwards."""

import logging
import ssl
import time
from pathlib import Path
from typing import Any

import pytest
from wire import CHUNKED, GET, HEAD, MAX_BODY, Running, logged, post, serving, until

from octavo.server.config import ServerConfig
from octavo.server.protocol import uvicorn_config


def get(*lines: bytes) -> bytes:
    return b"\r\n".join([b"GET /health HTTP/1.1", *lines]) + b"\r\n\r\n"


BAD = {
    # The request line.
    "no http": (b"hello\r\n\r\n", "valid HTTP"),
    "tls": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "valid HTTP"),
    "unknown method": (b"FOO / HTTP/1.1\r\nHost: a\r\n\r\n", "valid HTTP"),
    "method in lower case": (b"get / HTTP/1.1\r\nHost: a\r\n\r\n", "valid HTTP"),
    "http 0.9": (b"GET /\r\n\r\n", "HTTP/1.0 and HTTP/1.1"),
    "http 2": (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", "HTTP/1.0 and HTTP/1.1"),
    "http 2 with prior knowledge": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "valid HTTP"),
    "http 1.2": (b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", "valid HTTP"),
    "space in the target": (b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", "valid HTTP"),
    "byte above ASCII in the target": (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", "valid HTTP"),
    "target without a path": (b"GET ?x HTTP/1.1\r\nHost: a\r\n\r\n", "valid HTTP"),
    "long target": (b"GET /" + b"a" * 8200 + b" HTTP/1.1\r\nHost: a\r\n\r\n", "longer than 8192"),
    "endless target": (b"GET /" + b"a" * 3_000_000, "longer than 8192"),
    "tunnel": (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", "no tunnels"),
    "line feed only": (b"GET / HTTP/1.1\nHost: a\n\n", "valid HTTP"),
    # Host.
    "no host": (get(), "no Host"),
    "two hosts": (get(b"Host: a", b"Host: a"), "several Host"),
    "host with a path": (get(b"Host: a/v1?"), "host with an optional port"),
    "host with a fragment": (get(b"Host: a#"), "host with an optional port"),
    "host with credentials": (get(b"Host: u@a"), "host with an optional port"),
    "empty host": (get(b"Host:"), "host with an optional port"),
    "host with a bad port": (get(b"Host: a:x"), "host with an optional port"),
    # Headers.
    "folded header": (get(b"Host: a", b"X: a", b" b"), "valid HTTP"),
    "space before the colon": (get(b"Host : a"), "valid HTTP"),
    "NUL in a header": (get(b"Host: a", b"X: \x00"), "valid HTTP"),
    "control character in a header": (get(b"Host: a", b"X: \x01"), "valid HTTP"),
    "header without a name": (get(b"Host: a", b": x"), "valid HTTP"),
    "101 headers": (get(b"Host: a", *[b"X: y"] * 100), "more than 100 headers"),
    "5000 headers": (get(b"Host: a", *[b"X: y"] * 5000), "more than 100 headers"),
    "33 KB of headers": (get(b"Host: a", *[b"X: " + b"y" * 1000] * 33), "larger than 32768"),
    "one header of 100 KB": (get(b"Host: a", b"X: " + b"y" * 100_000), "larger than 32768"),
    "an endless header": (b"GET / HTTP/1.1\r\nX: " + b"y" * 20_000_000, "larger than 32768"),
    "an endless name of a header": (b"GET / HTTP/1.1\r\n" + b"y" * 3_000_000, "larger than 32768"),
    # The length of the body.
    "length and chunks": (HEAD + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "valid HTTP"),
    "chunks and length": (HEAD + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n0\r\n\r\n", "valid HTTP"),
    "two lengths": (HEAD + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", "valid HTTP"),
    "a list of lengths": (HEAD + b"Content-Length: 2, 2\r\n\r\n{}", "valid HTTP"),
    "negative length": (HEAD + b"Content-Length: -1\r\n\r\n", "valid HTTP"),
    "signed length": (HEAD + b"Content-Length: +2\r\n\r\n{}", "valid HTTP"),
    "hexadecimal length": (HEAD + b"Content-Length: 0x2\r\n\r\n{}", "valid HTTP"),
    "length beyond 64 bits": (HEAD + b"Content-Length: 99999999999999999999999\r\n\r\n", "valid HTTP"),
    "compressed chunks": (HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", "Transfer-Encoding"),
    "not quite chunked": (HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", "Transfer-Encoding"),
    "chunks in HTTP/1.0": (CHUNKED.replace(b"1.1", b"1.0") + b"0\r\n\r\n", "Transfer-Encoding"),
    "bad size of a chunk": (CHUNKED + b"zz\r\n", "valid HTTP"),
    "size of a chunk beyond 64 bits": (CHUNKED + b"FFFFFFFFFFFFFFFFF\r\n", "valid HTTP"),
    "space after the size of a chunk": (CHUNKED + b"2 \r\n{}\r\n0\r\n\r\n", "valid HTTP"),
    "chunk longer than it says": (CHUNKED + b"1\r\n{}\r\n0\r\n\r\n", "valid HTTP"),
    "endless extension of a chunk": (CHUNKED + b"2;" + b"x" * 3_000_000, "too small"),
    "endless trailer": (CHUNKED + b"0\r\nX: " + b"x" * 3_000_000, "too small"),
    "many trailers": (CHUNKED + b"0\r\n" + b"X: y\r\n" * 101, "more than 100 headers"),
    "websocket": (get(b"Host: a", b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13",
                      b"Sec-WebSocket-Key: x3JJHMbDL1EzLkh9GBhXDw=="), "no WebSockets"),
}


@pytest.mark.parametrize(("raw", "says"), BAD.values(), ids=BAD.keys())
def test_what_is_no_good_http_is_a_typed_400_and_the_end(calm: Running, raw: bytes, says: str) -> None:
    seen = len(calm.app.seen)
    with calm.connect() as client:
        client.send(raw)
        answer = client.answer()
        assert answer.status == 400 and answer.headers["connection"] == "close"
        error = answer.error()
        assert error["type"] == "invalid_request_error" and error["param"] is None and error["code"] is None
        assert says in error["message"]
        assert answer.headers["server"] == "octavo" and "date" in answer.headers
        client.sock.settimeout(1.5)  # the end of the stream comes at once, not when the 2 s of discarding are over
        assert client.rest() == b""
    assert len(calm.app.seen) == seen
    assert calm.ask(GET).status == 200


GOOD = {
    "plain": get(b"Host: a"), "port": get(b"Host: localhost:8000"), "address": get(b"Host: 127.0.0.1:1"),
    "IPv6": get(b"Host: [::1]:8000"), "underscore": get(b"Host: my_service"), "empty header": get(b"Host: a", b"X:"),
    "100 headers": get(b"Host: a", *[b"X: y"] * 99), "31 KB of headers": get(b"Host: a", *[b"X: " + b"y" * 990] * 31),
    "empty lines before": b"\r\n\r\n" + get(b"Host: a"), "absolute target": b"GET http://a/health HTTP/1.1\r\nHost: a\r\n\r\n",
    "query": b"GET /health?a=b HTTP/1.1\r\nHost: a\r\n\r\n", "escapes": b"GET /%68ealth HTTP/1.1\r\nHost: a\r\n\r\n",
}


@pytest.mark.parametrize("raw", GOOD.values(), ids=GOOD.keys())
def test_what_is_unusual_but_right_is_served_and_the_connection_stays(calm: Running, raw: bytes) -> None:
    with calm.connect() as client:
        for _ in range(2):
            client.send(raw)
            answer = client.answer()
            assert answer.status == 200 and answer.json == {"status": "ok"}
            assert "connection" not in answer.headers and answer.headers["server"] == "octavo"


def test_a_head_may_come_byte_by_byte_and_a_body_in_chunks(calm: Running) -> None:
    with calm.connect() as client:
        for number in GET:
            client.send(bytes([number]))
        assert client.answer().status == 200
        client.send(CHUNKED + b"1;ext=1\r\n{\r\n1\r\n}\r\n0\r\nAuthorization: late\r\n\r\n")
        assert client.answer().json["size"] == 2
        assert all(name != b"authorization" for name, _ in calm.app.scopes[-1]["headers"]), "a trailer is no header"
        client.send(post(b"{}"))
        assert client.answer().json["size"] == 2


def test_requests_sent_ahead_are_answered_in_order(calm: Running) -> None:
    with calm.connect() as client:
        client.send(post(b"1") + post(b"22") + GET + post(b"333"))
        assert [client.answer().json.get("size") for _ in range(4)] == [1, 2, None, 3]
        client.send(GET)
        assert client.answer().status == 200


def test_too_many_requests_ahead_are_refused_after_the_answers(calm: Running) -> None:
    with calm.connect() as client:
        client.send(post(b"{}") * 9)
        assert [client.answer().status for _ in range(8)] == [200] * 8
        answer = client.answer()
        assert answer.status == 400 and "ahead" in answer.error()["message"]
        assert client.rest() == b""


def test_a_bad_request_behind_a_good_one_waits_for_its_answer(calm: Running) -> None:
    calm.app.release.clear()
    before = calm.app.waiting
    with calm.connect() as client:
        client.send(GET.replace(b"/health", b"/gate") + b"nonsense\r\n\r\n")
        until(lambda: calm.app.waiting > before)
        calm.app.release.set()
        assert client.answer().json == {"gate": True}
        assert client.answer().status == 400
        assert client.rest() == b""


def test_a_large_body_behind_a_running_request_is_refused(calm: Running) -> None:
    calm.app.release.clear()
    with calm.connect() as client:
        client.send(GET.replace(b"/health", b"/gate") + post(b"x" * 300_000))
        until(lambda: any(connection.refused for connection in calm.server.server_state.connections))
        calm.app.release.set()
        assert client.answer().status == 200
        answer = client.answer()
        assert answer.status == 400 and "ahead" in answer.error()["message"]


def test_http_1_0_gets_no_chunks_and_a_close(calm: Running) -> None:
    with calm.connect() as client:
        client.send(b"GET /silent HTTP/1.0\r\n\r\n")
        answer = client.answer()
        assert answer.status == 200 and answer.body == b"ab" and answer.headers["connection"] == "close"
        assert "transfer-encoding" not in answer.headers
    with calm.connect() as client:
        client.send(b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        answer = client.answer()
        assert answer.json == {"status": "ok"} and answer.headers["connection"] == "close" and client.rest() == b""


def test_head_has_the_length_and_no_body(calm: Running) -> None:
    with calm.connect() as client:
        client.send(b"HEAD /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.answer("HEAD").headers["content-length"] == "15"
        client.send(GET)
        assert client.answer().status == 200


def test_connection_close_is_heeded(calm: Running) -> None:
    with calm.connect() as client:
        client.send(get(b"Host: a", b"Connection: close"))
        assert client.answer().headers["connection"] == "close" and client.rest() == b""


def test_an_offer_of_http2_is_declined_with_the_body_kept(calm: Running) -> None:
    """Java's client offers h2c with its first request; the parser alone would lose the body."""
    offer = (b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA")
    with calm.connect() as client:
        client.send(post(b'{"a":1}', *offer))
        assert client.answer().json["size"] == 7
        raw = post(b'{"a":12}', *offer)
        for cut in (30, len(raw) - 3):
            client.send(raw[:cut])
            client.send(raw[cut:])
            assert client.answer().json["size"] == 8
        client.send(post(b"{}", b"Connection: Upgrade, close", b"Upgrade: tls") + GET)
        assert client.answer().json["size"] == 2
        assert client.answer().status == 200


# Bodies


def test_a_declared_body_beyond_the_limit_is_413_before_it_is_sent(calm: Running) -> None:
    with calm.connect() as client:
        client.send(HEAD + b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % (MAX_BODY + 1))
        answer = client.answer()
        assert answer.status == 413 and answer.headers["connection"] == "close"
        assert answer.error()["type"] == "invalid_request_error" and str(MAX_BODY) in answer.error()["message"]


def test_a_client_that_sends_all_before_it_reads_can_read_the_413(calm: Running) -> None:
    with calm.connect() as client:
        client.send(post(b"x" * (30 << 20)))
        assert client.answer().status == 413 and client.rest() == b""


def test_a_chunked_body_beyond_the_limit_is_413(calm: Running) -> None:
    before = len(calm.app.seen)
    with calm.connect() as client:
        client.send(CHUNKED)
        for _ in range(17):
            client.send(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        answer = client.answer()
        assert answer.status == 413 and answer.error()["code"] is None and client.rest() == b""
    assert len(calm.app.seen) == before


def test_a_body_of_exactly_the_limit_is_taken(calm: Running) -> None:
    for raw in (post(b"x" * MAX_BODY), CHUNKED + b"%x\r\n" % MAX_BODY + b"x" * MAX_BODY + b"\r\n0\r\n\r\n"):
        assert calm.ask(raw).json["size"] == MAX_BODY


def test_bytes_in_chunks_of_one_byte_are_not_taken_for_ever(calm: Running) -> None:
    with calm.connect() as client:
        client.send(CHUNKED + b"1\r\nx\r\n" * 300_000)
        assert client.answer().status == 400


def test_a_413_under_messages_has_the_shape_of_that_api(calm: Running) -> None:
    answer = calm.ask(b"POST /v1/messages HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\n")
    assert answer.status == 413 and answer.json["type"] == "error" and answer.json["error"]["type"] == "request_too_large"


def test_a_413_under_a_prefix_has_the_shape_of_that_api_too() -> None:
    with serving(root_path="/llm") as running:
        answer = running.ask(b"POST /llm/v1/messages HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\n")
        assert answer.status == 413 and answer.json["type"] == "error"
        answer = running.ask(b"POST /llm/echo HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\n")
        assert answer.status == 413 and answer.error()["type"] == "invalid_request_error"


def test_the_time_given_to_a_refused_client_is_limited(calm: Running) -> None:
    with calm.connect() as client:
        start = time.monotonic()
        client.send(post(b"x" * (2 << 20)))
        assert client.answer().status == 413
        with pytest.raises(OSError):
            while time.monotonic() - start < 10:
                client.send(b"x" * 65536)
                time.sleep(0.01)
        assert 1.5 < time.monotonic() - start < 6


def test_expect_100_continue_is_asked_for_by_those_who_read(calm: Running) -> None:
    with calm.connect() as client:
        client.send(HEAD + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert client.answer().status == 100
        client.send(b"{}")
        assert client.answer().json["size"] == 2
        client.send(GET)
        assert client.answer().status == 200
    with calm.connect() as client:  # a route that does not read: nobody could say whether what follows is the body
        client.send(HEAD.replace(b"/echo", b"/early") + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert client.answer().json == {"early": True}
        assert client.rest() == b""


def test_an_early_answer_leaves_the_connection_usable(calm: Running) -> None:
    with calm.connect() as client:
        client.send(post(b"x" * MAX_BODY, path=b"/early"))
        assert client.answer().json == {"early": True}
        client.send(GET)
        assert client.answer().status == 200
    with calm.connect() as client:  # with a close, the client may end its body before the connection ends
        client.send(HEAD.replace(b"/echo", b"/early") + b"Content-Length: 1000000\r\nConnection: close\r\n\r\n")
        client.send(b"x" * 500_000)
        assert client.answer().json == {"early": True}
        for _ in range(10):  # a closed connection would answer the first piece with a reset
            client.send(b"x" * 50_000)
            time.sleep(0.01)


# Answers


def test_work_after_the_last_piece_is_not_taken_for_a_client_that_left(calm: Running) -> None:
    before = calm.app.seen.count("cleaned")
    answer = calm.ask(GET.replace(b"/health", b"/chunks"))
    assert answer.body == b"data: 0\n\ndata: 1\n\ndata: 2\n\n"
    until(lambda: calm.app.seen.count("cleaned") == before + 1)


# Errors of the application


def test_an_application_that_fails_is_a_500_in_our_shape(calm: Running) -> None:
    with logged("octavo.server.http", level=logging.ERROR) as records, calm.connect() as client:
        client.send(GET.replace(b"/health", b"/raise/bug"))
        answer = client.answer()
        assert answer.status == 500 and answer.error()["type"] == "server_error"
        client.send(GET)
        assert client.answer().status == 200
    assert len(records) == 1 and answer.headers["x-request-id"] in records[0].getMessage() and records[0].exc_info
    assert calm.ask(GET.replace(b"/health", b"/leave")).error()["type"] == "server_error"


def test_an_answer_that_breaks_off_is_seen_to_be_incomplete(calm: Running) -> None:
    with calm.connect() as client:
        client.send(GET.replace(b"/health", b"/break"))
        assert not client.rest().endswith(b"0\r\n\r\n")


def test_tls_comes_from_the_options_and_authorities_make_certificates_needed(tmp_path: Path) -> None:
    files = {}
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
        files[name] = str(tmp_path / name)
        Path(files[name]).touch()
    config = uvicorn_config(None, ServerConfig(**files))
    assert config.is_ssl and (config.ssl_keyfile, config.ssl_certfile) == (files["ssl_keyfile"], files["ssl_certfile"])
    assert config.ssl_ca_certs == files["ssl_ca_certs"] and config.ssl_cert_reqs == ssl.CERT_REQUIRED
    del files["ssl_ca_certs"]
    assert uvicorn_config(None, ServerConfig(**files)).ssl_cert_reqs == ssl.CERT_NONE
    assert not uvicorn_config(None, ServerConfig()).is_ssl


def test_probes_do_not_stand_in_line(calm: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more requests about to begin than ever get their turn, a probe is answered, and nothing else is."""
    line: list[Any] = []
    monkeypatch.setattr("octavo.server.pace.Pace.begin", lambda self, loop, start: line.append((loop, start)))
    with calm.connect() as waiting:
        waiting.send(post(b"{}"))
        until(lambda: line)
        assert calm.ask(GET).status == 200
        loop, start = line.pop()
        loop.call_soon_threadsafe(start)
        assert waiting.answer().status == 200
