"""How answers leave: JSON at once, or server-sent events with one write per look at the news.

Owns headers, framing and the spelling of text in a stream; it does not know what is said. Invariants: the head of a stream
is sent with its first bytes, so whatever fails before them still has a status of its own; no text that is sent can be
taken for the end of a line by anybody's idea of a line.
"""

from collections.abc import Iterable

import msgspec
from starlette.types import Send

EVENT_STREAM = "text/event-stream; charset=utf-8"
JSON = "application/json"
DONE = b"data: [DONE]\n\n"

_encode = msgspec.json.Encoder().encode
# Many clients split a stream as str.splitlines does. JSON has escaped the ends of line below U+0020 already.
_LINE_ENDS = (("\x85", b"\\u0085"), ("\u2028", b"\\u2028"), ("\u2029", b"\\u2029"))


def quote(text: str) -> bytes:
    """A text as a JSON string for a stream."""
    data = _encode(text)
    if len(data) == len(text) + 2 or text.isascii():
        return data
    return _escape(data)


def encode_event(value: object) -> bytes:
    """A value as JSON for a stream."""
    data = _encode(value)
    return data if data.isascii() else _escape(data)


def event(data: bytes) -> bytes:
    """One event of a stream, of JSON without ends of line."""
    return b"data: " + data + b"\n\n"


def named_event(name: str, data: bytes) -> bytes:
    """An event that says on a line of its own which it is."""
    return b"event: " + name.encode() + b"\ndata: " + data + b"\n\n"


def _escape(data: bytes) -> bytes:
    for char, escaped in _LINE_ENDS:
        data = data.replace(char.encode(), escaped)
    return data


class EventStream:
    """The body of an answer that comes piece by piece.

    Attributes:
        begun: the status has been sent.
    """

    def __init__(self, send: Send, media_type: str = EVENT_STREAM) -> None:
        self._send, self._type, self.begun = send, media_type, False

    async def write(self, data: bytes, more: bool = True) -> None:
        """Send bytes, and the head with the first; waits while the client does not read."""
        if not self.begun:
            self.begun = True
            await self._send({"type": "http.response.start", "status": 200, "headers": [
                (b"content-type", self._type.encode()), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]})
        await self._send({"type": "http.response.body", "body": data, "more_body": more})


async def send_json(send: Send, body: bytes, status: int = 200, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """A whole answer; headers beside its type and length."""
    await send({"type": "http.response.start", "status": status, "headers": [
        (b"content-type", JSON.encode()), (b"content-length", str(len(body)).encode()), *headers]})
    await send({"type": "http.response.body", "body": body})
