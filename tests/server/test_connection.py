"""The answering half by itself: the head waits for the body, and nothing is lost where none comes."""

from typing import Any

import pytest
from uvicorn.protocols.http.flow_control import FlowControl

from octavo.server.connection import Connection, refusal
from octavo.server.errors import ApiError


class Transport:
    """Keeps what is written."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.aborted = False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def is_closing(self) -> bool:
        return self.aborted

    def abort(self) -> None:
        self.aborted = True

    def get_write_buffer_size(self) -> int:
        return 17


@pytest.fixture
def transport() -> Any:
    return Transport()


def connect(transport: Any) -> Connection:
    return Connection(transport, FlowControl(transport), lambda: transport.written.append(b"<end>"))


def test_head_and_body_leave_together_and_the_rest_as_it_comes(transport: Any) -> None:
    connection = connect(transport)
    for _ in range(2):
        connection.hold()
        connection.write(b"head ")
        assert not transport.written
        connection.write(b"body")
        connection.write(b"more")
        connection.flush()
        assert transport.written == [b"head body", b"more"]
        transport.written.clear()


def test_a_head_alone_leaves_with_the_flush_and_before_the_end(transport: Any) -> None:
    connection = connect(transport)
    connection.hold()
    connection.write(b"head")
    connection.flush()
    connection.hold()
    connection.write(b"again")
    connection.close()
    connection.write(b"100 Continue")
    assert transport.written == [b"head", b"again", b"<end>", b"100 Continue"]


def test_what_an_application_may_ask(transport: Any) -> None:
    connection = connect(transport)
    assert connection.buffered() == 17 and not connection.write_paused and not connection.is_closing()
    connection.abort()
    assert transport.aborted and connection.is_closing()


def test_a_refusal_is_a_whole_response() -> None:
    head, _, body = refusal(ApiError(503, "Full."), "/v1/messages", [(b"server", b"octavo")]).partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 503 Service Unavailable" and lines[-1] == b"connection: close"
    assert {b"server: octavo", b"retry-after: 1", b"content-length: %d" % len(body)} <= set(lines)
    assert b"overloaded_error" in body
