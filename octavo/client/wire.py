"""What comes over the wire: bytes to an HTTP/1.1 response, and a response's body to server-sent events.

Owns the two grammars, without any input or output of their own; it does not know sockets, JSON or time. Invariant: the
result depends on the bytes alone, never on where they were cut, and nothing that a server sends can make a buffer grow
without a bound.
"""

import re

from octavo.errors import OctavoError

MAX_HEAD = 65536  # bytes of a status line with its header fields, of a chunk's size line, of the trailers
MAX_EVENT = 2**24  # bytes of one event
STATUS = re.compile(rb"HTTP/1\.([01]) (\d{3})(?: [^\r\n]*)?")
FIELD = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*([^\x00\r\n]*?)[ \t]*")
SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[^\r\n]*)?")
BOM = b"\xef\xbb\xbf"

HEAD, LENGTH, CHUNK_SIZE, CHUNK_DATA, CHUNK_END, TRAILER, UNTIL_CLOSE, DONE = range(8)


class ConnectionFailed(OctavoError):
    """No whole answer came: the server cannot be reached, hung up, was silent for too long, or spoke no HTTP."""


class ResponseParser:
    """One response of HTTP/1.1 to a request that was no HEAD; interim (1xx) responses are passed over.

    Attributes:
        status: 0 until the head is whole. headers: lower-case name -> value; of several fields, joined by commas.
        done: the body has ended. reusable: the connection may carry another request after this response.
    """

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.reusable = False
        self._state = HEAD
        self._left = 0  # bytes of the body, or of its current chunk, that are still to come
        self._buffer = b""

    @property
    def done(self) -> bool:
        """True when the response is whole."""
        return self._state == DONE

    @property
    def framed(self) -> bool:
        """True when the head is whole."""
        return self._state != HEAD

    def feed(self, data: bytes) -> bytes:
        """The part of the body that these bytes bring; ConnectionFailed when they are no HTTP."""
        data = self._buffer + data if self._buffer else data
        at, parts = 0, []
        while at < len(data) and self._state != DONE:
            if self._state in (LENGTH, CHUNK_DATA):
                part = data[at:at + self._left] if at or self._left < len(data) else data
                parts.append(part)
                at += len(part)
                self._left -= len(part)
                if not self._left:
                    self._state = DONE if self._state == LENGTH else CHUNK_END
            elif self._state == UNTIL_CLOSE:
                parts.append(data[at:])
                at = len(data)
            else:
                end = data.find(b"\n", at)
                if end < 0:
                    break
                self._line(data[at:end].removesuffix(b"\r"))
                at = end + 1
        self._buffer = data[at:]
        if self.done:
            self.reusable = self.reusable and not self._buffer  # bytes that nobody asked for: out of step with the server
        elif len(self._buffer) > MAX_HEAD:
            raise ConnectionFailed(f"the server sent a line of more than {MAX_HEAD} bytes where HTTP has short ones")
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """The connection has ended; ConnectionFailed unless the response is whole."""
        if self._state == UNTIL_CLOSE:
            self._state = DONE
        if self._state != DONE:
            where = "before it answered" if not self.status else "in the middle of its answer"
            raise ConnectionFailed(f"the server closed the connection {where}")

    def _line(self, line: bytes) -> None:
        if self._state == HEAD:
            self._head(line)
        elif self._state == CHUNK_END:
            if line:
                raise ConnectionFailed(f"a chunk is longer than its size says: {line!r:.60}")
            self._state = CHUNK_SIZE
        elif self._state == CHUNK_SIZE:
            match = SIZE.fullmatch(line)
            if match is None:
                raise ConnectionFailed(f"a chunk has no size: {line!r:.60}")
            self._left = int(match[1], 16)
            self._state = CHUNK_DATA if self._left else TRAILER
        elif not line:  # the empty line after the trailers, which nobody asked for
            self._state = DONE
        else:
            self._count(line)

    def _head(self, line: bytes) -> None:
        if not self.status:
            match = STATUS.fullmatch(line)
            if match is None:
                raise ConnectionFailed(f"the answer is not HTTP/1.1: {line!r:.60}")
            self.status, self.reusable, self._left = int(match[2]), match[1] == b"1", 0
        elif line:
            match = FIELD.fullmatch(line)
            if match is None:
                raise ConnectionFailed(f"a header field is malformed: {line!r:.60}")
            self._count(line)
            name, value = match[1].decode("ascii").lower(), match[2].decode("latin-1")
            self.headers[name] = f"{self.headers[name]}, {value}" if name in self.headers else value
        elif 100 <= self.status < 200:
            self.status, self.headers = 0, {}
        else:
            self._frame()

    def _count(self, line: bytes) -> None:
        self._left += len(line) + 2
        if self._left > MAX_HEAD:
            raise ConnectionFailed(f"the server sent more than {MAX_HEAD} bytes of header fields")

    def _frame(self) -> None:
        """Decide how the body ends, once the head is whole."""
        headers = self.headers
        if "close" in headers.get("connection", "").lower():
            self.reusable = False
        coding = headers.get("transfer-encoding", "").lower()
        length = headers.get("content-length")
        if self.status in (204, 304):
            self._state = DONE
        elif coding == "chunked":
            self._state = CHUNK_SIZE
        elif coding:
            raise ConnectionFailed(f"transfer-encoding {coding!r:.60} is not known")
        elif length is None:
            self._state, self.reusable = UNTIL_CLOSE, False
        elif not (length.isascii() and length.isdigit()):
            raise ConnectionFailed(f"content-length {length!r:.60} is no number")
        else:
            self._left = int(length)
            self._state = LENGTH if self._left else DONE


class EventReader:
    """Server-sent events of a body: the text of their ``data`` fields; comments and other fields are passed over."""

    def __init__(self) -> None:
        self._buffer = b""
        self._began = False
        self._cr = False  # the last byte was a carriage return, whose line feed may follow

    def feed(self, data: bytes) -> list[bytes]:
        """The events that these bytes complete; ConnectionFailed when one is too long."""
        if b"\r" in data or self._cr:
            data = self._line_feeds(data)
        buffer = self._buffer + data if self._buffer else data
        if not self._began:
            if len(buffer) < len(BOM) and BOM.startswith(buffer):
                self._buffer = buffer
                return []
            self._began = True
            buffer = buffer.removeprefix(BOM)
        *whole, self._buffer = buffer.split(b"\n\n")
        if len(self._buffer) > MAX_EVENT:
            raise ConnectionFailed(f"the server sent an event of more than {MAX_EVENT} bytes")
        return [payload for event in whole if (payload := _payload(event)) is not None]

    def _line_feeds(self, data: bytes) -> bytes:
        """The bytes with every line end as one line feed; a return at the end waits for what follows."""
        data = b"\r" + data if self._cr else data
        self._cr = data.endswith(b"\r")
        return data.removesuffix(b"\r").replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _payload(event: bytes) -> bytes | None:
    if event.startswith(b"data: ") and b"\n" not in event:
        return event[6:]  # what nearly every event of every server looks like
    found = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line[:5] == b"data:" or line == b"data"]
    return b"\n".join(found) if found else None
