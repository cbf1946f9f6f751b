"""Client: requests to one server over kept-alive connections, and the events of a streamed answer.

Owns addresses, connections, time limits and how a server's refusal is said; it does not know prompts or figures. Proxies
are never used, whatever the environment says: what is measured or talked to is the server itself. Invariant: a
connection carries one request at a time, and only one whose answer was read to its end is used again.
"""

import asyncio
import os
import re
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import msgspec

from octavo import __version__
from octavo.client.wire import FIELD, ConnectionFailed, EventReader, ResponseParser
from octavo.errors import ConfigError, OctavoError

CONNECT_SECONDS = 10.0
READ_BYTES = 2**18
MAX_BODY = 2**28  # bytes of an answer that is read as a whole
DONE = b"[DONE]"


class Unreachable(ConnectionFailed):
    """No connection could be made."""


class Refusal(OctavoError):
    """The server answered with an error.

    Args:
        message: in the server's words. status: the HTTP status; None for an error in the middle of a stream.
        code: the server's machine-readable reason, or None.
    """

    def __init__(self, message: str, status: int | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is.

    Attributes:
        url: as it is shown. host, port: of TCP; uds: path of a unix socket instead, or None. tls: speak https.
        path: what goes before every path of a request; without a slash at its end and without ``/v1``.
    """

    url: str
    host: str
    port: int
    tls: bool = False
    path: str = ""
    uds: str | None = None

    @classmethod
    def parse(cls, url: str, name: str = "url") -> "Address":
        """The address of ``http://host:port/path``; ``/v1`` at its end may be given or not. ConfigError names ``name``."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            raise ConfigError(f"{name} is malformed, got {url!r:.200}.", name) from None
        tls = parts.scheme == "https"
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ConfigError(f"{name} must be http://HOST[:PORT][/PATH] or https://..., got {url!r:.200}.", name)
        if parts.username is not None or any(not 33 <= ord(c) < 127 for c in url):
            raise ConfigError(f"{name} must be plain ASCII without a user name, got {url!r:.200}.", name)
        path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        return cls(url, parts.hostname, port or (443 if tls else 80), tls, path)

    @classmethod
    def unix(cls, path: str) -> "Address":
        """The address of a server behind a unix socket."""
        return cls(f"unix:{path}", "localhost", 80, uds=path)

    @property
    def authority(self) -> str:
        """The Host field."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.tls else 80) else f"{host}:{self.port}"


class Client:
    """Requests to one server.

    Args:
        address: of the server. headers: sent with every request. api_key: sent as a bearer token.
        timeout: seconds that one request may take in all; None sets no limit.

    Attributes:
        opened: connections made so far.

    Raises:
        ConfigError: a header or the key cannot be sent.
    """

    def __init__(self, address: Address, headers: Mapping[str, str] | None = None, api_key: str | None = None,
                 timeout: float | None = None) -> None:
        fields = {"Host": address.authority, "User-Agent": f"octavo/{__version__}", "Accept-Encoding": "identity",
                  **({} if api_key is None else {"Authorization": f"Bearer {api_key}"}), **(headers or {})}
        self.address, self.timeout, self.opened = address, timeout, 0
        self._head = b"".join(_field(name, value, name == "Authorization") for name, value in fields.items())
        self._tls = ssl.create_default_context() if address.tls else None
        self._idle: list[_Connection] = []

    async def request(self, method: str, path: str, body: bytes | None = None) -> "Answer":
        """One request and its whole answer, whatever its status; ConnectionFailed when none came."""
        async with self.open(method, path, body) as response:
            return Answer(response.status, response.headers, await response.body())

    async def events(self, path: str, body: bytes) -> AsyncGenerator[list[bytes], None]:
        """Post a body and yield the data of the events of its answer, those together that arrived together.

        Raises:
            Refusal: the status is not 200. ConnectionFailed: no answer came, or it ended without ``[DONE]``.
        """
        async with self.open("POST", path, body) as response:
            kind = response.headers.get("content-type", "")
            if response.status != 200:
                raise refusal(Answer(response.status, response.headers, await response.body()))
            if not kind.startswith("text/event-stream"):
                raise ConnectionFailed(f"the server answered a stream with content type {kind!r:.60}")
            reader, over = EventReader(), False
            while data := await response.read():
                payloads = [] if over else reader.feed(data)
                if DONE in payloads:
                    over, payloads = True, payloads[:payloads.index(DONE)]
                if payloads:
                    yield payloads
            if not over:
                raise ConnectionFailed("the server ended the stream without [DONE]")

    @asynccontextmanager
    async def open(self, method: str, path: str, body: bytes | None = None) -> AsyncIterator["Response"]:
        """Send a request; within, its response, whose head has been read. Left early, the connection is closed."""
        length = b"" if body is None else b"Content-Type: application/json\r\nContent-Length: %d\r\n" % len(body)
        data = b"%s %s HTTP/1.1\r\n%s%s\r\n%s" % (
            method.encode(), (self.address.path + path).encode("ascii"), self._head, length, body or b"")
        connection: _Connection | None = None
        try:
            async with asyncio.timeout(self.timeout):
                connection, response = await self._exchange(data)
                yield response
                if response.parser.done and response.parser.reusable:
                    self._idle.append(connection)
                    connection = None
        except TimeoutError:
            raise ConnectionFailed(f"{self.address.url} took longer than {self.timeout or 0:g} s") from None
        finally:
            if connection is not None:
                connection.close()

    async def close(self) -> None:
        """Close the connections that are kept."""
        for connection in self._idle:
            connection.close()
            with suppress(OSError, ssl.SSLError):
                await connection.writer.wait_closed()
        self._idle.clear()

    async def _exchange(self, data: bytes) -> "tuple[_Connection, Response]":
        """Send on a kept connection, or on a fresh one where there is none or the server has just closed it."""
        while self._idle:
            connection = self._idle.pop()
            if connection.reader.at_eof():
                connection.close()
                continue
            try:
                return connection, await self._send(connection, data)
            except ConnectionFailed:
                if connection.heard:
                    raise
        connection = await self._connect()
        return connection, await self._send(connection, data)

    async def _send(self, connection: "_Connection", data: bytes) -> "Response":
        response = Response(connection)
        connection.heard = False
        try:
            connection.writer.write(data)
            # A server that refuses a large body may close while it is being sent: its answer comes first.
            with suppress(OSError):
                await connection.writer.drain()
            await response.head()
        except BaseException:
            connection.close()
            raise
        return response

    async def _connect(self) -> "_Connection":
        address = self.address
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                if address.uds is not None:
                    reader, writer = await asyncio.open_unix_connection(address.uds, limit=READ_BYTES)
                else:
                    reader, writer = await asyncio.open_connection(
                        address.host, address.port, limit=READ_BYTES, ssl=self._tls)
        except TimeoutError:
            raise Unreachable(f"cannot reach {address.url}: no connection in {CONNECT_SECONDS:g} s") from None
        except (OSError, ssl.SSLError) as error:
            raise Unreachable(f"cannot reach {address.url}: {_reason(error)}") from None
        self.opened += 1
        return _Connection(reader, writer)


class _Connection:
    """A socket; ``heard``: something of the current answer has come."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer, self.heard = reader, writer, False

    def close(self) -> None:
        self.writer.close()


class Response:
    """An answer as it arrives.

    Attributes:
        parser: says when the answer is whole.
    """

    def __init__(self, connection: _Connection) -> None:
        self.parser = ResponseParser()
        self._connection = connection
        self._early = b""  # of the body, what came with the head

    @property
    def status(self) -> int:
        """The HTTP status."""
        return self.parser.status

    @property
    def headers(self) -> Mapping[str, str]:
        """Lower-case name -> value."""
        return self.parser.headers

    async def head(self) -> None:
        """Read until the head is whole; ConnectionFailed when it never is."""
        while not self.parser.framed:
            self._early += await self._receive()
        coding = self.headers.get("content-encoding", "identity")
        if coding != "identity":
            raise ConnectionFailed(f"the server answered with content-encoding {coding!r:.60}, which was not asked for")

    async def read(self) -> bytes:
        """The next bytes of the body; empty at its end. ConnectionFailed when the server hangs up before it."""
        data, self._early = self._early, b""
        while not data and not self.parser.done:
            data = await self._receive()
        return data

    async def body(self) -> bytes:
        """All of the body that is left."""
        parts, size = [], 0
        while data := await self.read():
            parts.append(data)
            size += len(data)
            if size > MAX_BODY:
                raise ConnectionFailed(f"the server's answer is longer than {MAX_BODY} bytes")
        return b"".join(parts)

    async def _receive(self) -> bytes:
        try:
            data = await self._connection.reader.read(READ_BYTES)
        except (OSError, ssl.SSLError) as error:
            raise ConnectionFailed(f"the connection broke: {_reason(error)}") from None
        if data:
            self._connection.heard = True
            return self.parser.feed(data)
        self.parser.close()
        return b""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole response: the HTTP status, lower-case header fields, and the bytes of the body."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def retry_after(self) -> float | None:
        """Seconds after which the server wants to be asked again; None where it does not say."""
        wait = self.headers.get("retry-after", "")
        return float(wait) if wait.isascii() and wait.isdigit() and len(wait) < 10 else None

    def json(self) -> Any:
        """The body as JSON; Refusal for any status but 200, ConnectionFailed when the body is no JSON."""
        if self.status != 200:
            raise refusal(self)
        try:
            return msgspec.json.decode(self.body)
        except (msgspec.DecodeError, RecursionError):
            raise ConnectionFailed(f"the server's answer is no JSON: {self.body[:100]!r}") from None


def refusal(answer: Answer) -> Refusal:
    """An error response as an exception; its message is one line that begins with the status."""
    try:
        found = msgspec.json.decode(answer.body)
    except (msgspec.DecodeError, RecursionError):
        found = None
    error = found.get("error", found) if isinstance(found, dict) else found
    message = error.get("message") if isinstance(error, dict) else error
    code = error.get("code") if isinstance(error, dict) else None
    if not isinstance(message, str):
        message = answer.body.decode("utf-8", "replace")
    shown = " ".join(message.split())[:500] or "no reason given"
    return Refusal(f"the server answered {answer.status}: {shown}", answer.status, code if isinstance(code, str) else None)


def _field(name: str, value: str, secret: bool) -> bytes:
    try:
        line = f"{name}: {value}".encode("latin-1")
    except UnicodeEncodeError:
        line = b""
    if FIELD.fullmatch(line) is None:
        shown = "one that cannot be sent" if secret else f"{name!r:.60}: {value!r:.100}"
        option = "api_key" if secret else "header"
        raise ConfigError(f"{option} must be plain text of one line, got {shown}.", option)
    return line + b"\r\n"


def _reason(error: OSError) -> str:
    """The system's words for an error, also where asyncio has put its own, or those of several addresses, around them."""
    number = re.search(r"\[Errno (\d+)\]", str(error))
    if number is not None and not isinstance(error, ssl.SSLError | socket.gaierror):
        return os.strerror(int(number[1]))
    return str(error.strerror or error or type(error).__name__)
