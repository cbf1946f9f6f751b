"""How connections end: by the clock, by clients that leave, by limits and by a shutdown; and what is left of them then."""

import gc
import os
import socket
import time
from collections.abc import Iterator

import pytest
from wire import CHUNKED, GET, HEAD, Client, Running, logged, post, serving, until

from octavo.server.protocol import Protocol


@pytest.fixture(scope="module")
def hasty() -> Iterator[Running]:
    """Time-outs in parts of a second."""
    with serving(header_timeout=0.3, body_timeout=0.3, send_timeout=0.3, keep_alive=0.3) as running:
        yield running


# Time


def closes(client: Client, within: float = 8.0) -> bytes:
    client.sock.settimeout(within)
    return client.rest()


def test_nothing_at_all_is_waited_for_only_so_long(hasty: Running) -> None:
    with hasty.connect() as client:
        assert closes(client) == b""


@pytest.mark.parametrize("raw", [b"G", b"GET /health HTTP/1.1\r\nHost: a\r\n", b"GET /health HTTP/1.1\r\nHost: a\r\nX: "])
def test_a_head_that_does_not_end_is_refused(hasty: Running, raw: bytes) -> None:
    with hasty.connect() as client:
        client.send(raw)
        answer = client.answer()
        assert answer.status == 400 and "did not arrive" in answer.error()["message"]
        assert closes(client) == b""


@pytest.mark.parametrize(("first", "drop"), [(b"GET / HTTP/1.1\r\n", b"X: y\r\n"), (b"", b"\r\n")], ids=["head", "empty"])
def test_a_head_in_drops_gains_no_time(hasty: Running, first: bytes, drop: bytes) -> None:
    with hasty.connect() as client:
        start = time.monotonic()
        client.send(first)
        with pytest.raises(OSError):
            while time.monotonic() - start < 8:
                client.send(drop)
                time.sleep(0.05)
        assert time.monotonic() - start < 6


def test_empty_lines_do_not_keep_a_connection(hasty: Running) -> None:
    with hasty.connect() as client:
        client.send(GET)
        assert client.answer().status == 200
        start = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - start < 8:
                client.send(b"\r\n")
                time.sleep(0.05)


@pytest.mark.parametrize("drip", [False, True])
def test_a_body_that_hardly_comes_is_refused(hasty: Running, drip: bool) -> None:
    with hasty.connect() as client:
        start = time.monotonic()
        client.send(HEAD + b"Content-Length: 1000\r\n\r\nx")
        client.sock.settimeout(0.05)
        data = b""
        while not data.endswith(b"}}") and time.monotonic() - start < 8:
            try:
                data += client.sock.recv(4096)
            except TimeoutError:
                if drip:
                    client.send(b"x")
        assert data.startswith(b"HTTP/1.1 400") and b"too slowly" in data


def test_an_idle_connection_ends_and_an_answering_one_does_not(hasty: Running) -> None:
    hasty.app.release.clear()
    with hasty.connect() as idle, hasty.connect() as busy:
        idle.send(GET)
        assert idle.answer().status == 200
        before = hasty.app.waiting
        busy.send(GET.replace(b"/health", b"/gate"))
        until(lambda: hasty.app.waiting > before)
        assert closes(idle) == b""
        time.sleep(0.5)  # longer than every time-out
        hasty.app.release.set()
        assert busy.answer().json == {"gate": True}


def test_a_reader_that_stands_still_is_cut(hasty: Running) -> None:
    left = hasty.app.left
    with hasty.connect(receive_buffer=4096) as client:
        client.send(GET.replace(b"/health", b"/flood"))
        until(lambda: hasty.app.left > left)
    until(lambda: hasty.connections == 0)


def test_a_reader_that_stands_still_is_cut_after_a_close_too(hasty: Running) -> None:
    with hasty.connect(receive_buffer=4096) as client:
        client.send(b"GET /big HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        until(lambda: "big" in hasty.app.seen)
        until(lambda: hasty.connections == 0)


def test_an_application_can_cut_its_client(calm: Running) -> None:
    with calm.connect(receive_buffer=4096) as client:
        client.send(GET.replace(b"/health", b"/cut"))
        until(lambda: "buffered True" in calm.app.seen)
        until(lambda: calm.connections == 0)


# Clients that leave


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("raw", [post(b"{}", path=b"/wait"), GET.replace(b"/health", b"/wait-stream"),
                                 post(b"{}", path=b"/wait") + GET * 3], ids=["whole", "stream", "with more behind"])
def test_a_client_that_leaves_ends_its_work_at_once(calm: Running, raw: bytes, reset: bool) -> None:
    waiting, left = calm.app.waiting, calm.app.left
    client = calm.connect()
    client.send(raw)
    until(lambda: calm.app.waiting == waiting + 1)
    assert calm.app.left == left
    if reset:
        client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    client.sock.close()
    until(lambda: calm.app.left == left + 1, 2.0)


def test_a_client_that_leaves_amid_its_body_is_no_error(calm: Running) -> None:
    with logged("octavo.server.http", "uvicorn.error") as records:
        with calm.connect() as client:
            client.send(HEAD + b"Content-Length: 100\r\n\r\nx")
        until(lambda: any(" 499 " in record.getMessage() for record in records))
        until(lambda: not calm.server.server_state.tasks)
    assert not [record for record in records if record.levelname in ("WARNING", "ERROR")]


# The number of connections


def test_connections_beyond_the_limit_are_503_and_leave_room_when_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.server.protocol.RESERVE", 0)
    with serving(max_connections=2) as running:
        with running.connect() as one, running.connect() as two:
            for client in (one, two):
                client.send(GET)
                assert client.answer().status == 200
            with running.connect() as three:
                answer = three.answer()  # nothing was sent: it is decided before
                assert answer.status == 503 and answer.headers["connection"] == "close"
                assert answer.error()["type"] == "overloaded_error" and int(answer.headers["retry-after"]) >= 1
                assert running.connections == 2, "refused ones take no place while they linger"
                assert three.rest() == b""
            one.send(GET)
            assert one.answer().status == 200
        until(lambda: running.connections == 0)
        assert running.ask(GET).status == 200


def test_probes_are_answered_beyond_the_limit_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.server.protocol.RESERVE", 2)
    monkeypatch.setattr("octavo.server.protocol.RESERVE_SECONDS", 0.3)
    with serving(max_connections=1, root_path="/llm") as running, running.connect() as first:
        first.send(GET)
        assert first.answer().status == 200
        for path in (b"/health", b"/llm/health", b"/health?a=b"):
            answer = running.ask(GET.replace(b"/health", path))
            assert answer.status == 200 and answer.headers["connection"] == "close"
        for path in (b"/", b"/early", b"/v1/models"):
            with running.connect() as other:
                other.send(GET.replace(b"/health", path))
                answer = other.answer()
                assert answer.status == 503 and answer.error()["type"] == "overloaded_error"
                assert answer.headers["connection"] == "close" and running.connections == 1
        for _ in range(3):  # whoever is silent does not keep the places
            with running.connect() as one, running.connect() as two:
                until(lambda: running.connections == 3)
                with running.connect() as three:
                    assert three.answer().status == 503
                assert closes(one) == closes(two) == b""
        first.send(GET.replace(b"/health", b"/early"))
        assert first.answer().status in (200, 404, 405)


def test_a_flood_of_refused_connections_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.server.protocol.MAX_LINGERING", 3)
    monkeypatch.setattr("octavo.server.protocol.RESERVE", 0)
    with serving(max_connections=1) as running, running.connect() as first:
        first.send(GET)
        assert first.answer().status == 200
        others = [running.connect() for _ in range(8)]
        answers = [client.rest() for client in others]
        assert sum(answer.startswith(b"HTTP/1.1 503") for answer in answers) >= 3
        first.send(GET)
        assert first.answer().status == 200
        for client in others:
            client.sock.close()
        until(lambda: not running.lingering)
        with running.connect() as late:
            assert late.answer().status == 503, "those that are gone count no more"


def test_a_shutdown_lets_answers_end_and_closes_idle_connections() -> None:
    with serving(keep_alive=60.0) as running, running.connect() as idle, running.connect() as busy:
        idle.send(GET)
        assert idle.answer().status == 200
        busy.send(GET.replace(b"/health", b"/gate"))
        until(lambda: running.app.waiting)
        running.server.should_exit = True
        assert closes(idle) == b""
        running.app.release.set()
        answer = busy.answer()
        assert answer.json == {"gate": True} and answer.headers["connection"] == "close"
        assert closes(busy) == b""


def test_no_descriptor_is_left_behind() -> None:
    with serving(header_timeout=1.0) as running:
        assert running.ask(GET).status == 200
        until(lambda: running.connections == 0)
        before = len(os.listdir("/proc/self/fd"))
        for raw in (b"", b"G", GET, post(b"{}")[:-1], b"bad\r\n\r\n", post(b"{}", path=b"/wait"), GET * 9):
            for _ in range(20):
                with running.connect() as client:
                    client.send(raw)
        until(lambda: running.connections == 0)
        until(lambda: len(os.listdir("/proc/self/fd")) <= before + 1)


def test_a_connection_leaves_nothing_to_the_garbage_collector() -> None:
    """Which would stop the event loop for a quarter of a second after some ten thousand of them."""
    def alive() -> int:
        return sum(issubclass(type(one), Protocol) for one in gc.get_objects())

    with serving() as running:
        gc.collect()
        gc.disable()
        try:
            before = alive()
            for raw in (GET, post(b"{}"), post(b"{", path=b"/raise/bug"), GET[:20], b"\x16\x03", GET * 3, CHUNKED + b"5\r\n"):
                for _ in range(5):
                    with running.connect() as client:
                        client.send(raw)
                        if raw.startswith((b"GET /health", b"POST")) and raw.endswith(b"}"):
                            client.answer()
            with running.connect() as client:
                client.send(post(b"{}", path=b"/wait"))
                until(lambda: running.app.waiting)
            until(lambda: not running.connections and running.app.left and not running.lingering)
            until(lambda: alive() <= before)
        finally:
            gc.enable()
