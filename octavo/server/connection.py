"""The answering half of a connection: what an application may ask of it, one request and its answer, the bytes of a refusal.

Owns how answers are framed; it does not know how requests are read or refused (see protocol.py). Invariant: every error
that leaves from below the application has the shape of the application's errors.
"""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from octavo.server.errors import INTERNAL, ApiError

EXTENSION = "octavo.connection"


class Connection:
    """What an application may ask of the client's connection: ``scope["extensions"][EXTENSION]``.

    It stands in for the transport in uvicorn's request cycle, so that a close never destroys an answer that is on its way.
    """

    __slots__ = ("_finish", "_flow", "_head", "_transport", "is_closing", "write")

    def __init__(self, transport: asyncio.Transport, flow: FlowControl, finish: Callable[[], None]) -> None:
        self._transport, self._flow, self._finish, self._head = transport, flow, finish, b""
        self.is_closing = transport.is_closing
        self.write: Callable[[bytes], None] = transport.write

    def hold(self) -> None:
        """Keep what is written next, the head of an answer, until more is written: one packet for both."""
        self.write = self._keep

    def flush(self) -> None:
        """Send the head that is kept, if one is."""
        if self._head:
            self._join(b"")

    def close(self) -> None:
        """Close when everything is sent."""
        self.flush()
        self._finish()

    def release(self) -> None:
        """It is lost, and there is nobody whom an end would concern."""
        self._finish = _nothing

    def _keep(self, data: bytes) -> None:
        self._head, self.write = data, self._join

    def _join(self, data: bytes) -> None:
        head, self._head, self.write = self._head, b"", self._transport.write
        self.write(head + data)

    def abort(self) -> None:
        """Cut the connection; what was not sent yet is lost."""
        self._transport.abort()

    def buffered(self) -> int:
        """Bytes that were written and that the kernel has not taken yet."""
        return self._transport.get_write_buffer_size()

    @property
    def write_paused(self) -> bool:
        """So much is buffered that sending waits."""
        return self._flow.write_paused


def _nothing() -> None:
    pass


class Cycle(RequestResponseCycle):
    """One request and its answer. Beyond uvicorn's: errors are JSON, HTTP/1.0 gets no chunks, and the disconnect that ASGI
    wants after a complete answer says so (``"complete": True``): nobody has left.
    """

    connection: Connection
    until_close = False

    async def receive(self) -> Any:
        message = await super().receive()
        if message["type"] == "http.disconnect" and not self.disconnected:
            return {"type": "http.disconnect", "complete": True}
        return message

    async def send(self, message: Any) -> None:
        if self.scope["http_version"] == "1.0":
            if message["type"] == "http.response.start":
                self.until_close = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
                self.chunked_encoding = False if self.until_close else None
            elif self.until_close:
                self.expected_content_length = len(message.get("body", b""))
        if message["type"] == "http.response.start":
            self.connection.hold()
            await super().send(message)
        else:
            await super().send(message)
            self.connection.flush()  # an answer without a body

    async def send_500_response(self) -> None:
        error = ApiError(500, INTERNAL)
        body = error.body(self.scope["path"])
        headers = [*error.raw_headers(body), (b"connection", b"close")]
        await self.send({"type": "http.response.start", "status": 500, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})


def disconnect(cycle: RequestResponseCycle) -> None:
    """Tell whoever answers a request that its client has left."""
    cycle.disconnected = True
    cycle.message_event.set()


def refusal(error: ApiError, path: str, default_headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A whole response that ends the connection."""
    body = error.body(path)
    headers = [*default_headers, *error.raw_headers(body), (b"connection", b"close")]
    return b"".join([STATUS_LINE[error.status], *(b"%s: %s\r\n" % header for header in headers), b"\r\n", body])
