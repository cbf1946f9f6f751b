"""A small application behind the real HTTP stack, on a free port, and a client that sends bytes as they are."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from octavo.errors import CapacityError, RequestError
from octavo.server.auth import Keys
from octavo.server.config import ServerConfig
from octavo.server.http import Gate, cutter, read_json_body, run_until_disconnect, unknown_route
from octavo.server.protocol import uvicorn_config
from octavo.server.sse import EventStream, send_json

SECRET = "sk-very-secret"
PIECE = b"x" * 4096
MAX_BODY = 1 << 20
GET = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
HEAD = b"POST /echo HTTP/1.1\r\nHost: a\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"


def post(body: bytes, *headers: bytes, path: bytes = b"/echo") -> bytes:
    """A whole request."""
    lines = [b"POST " + path + b" HTTP/1.1", b"Host: a", b"Content-Length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def until(condition: Callable[[], Any], seconds: float = 10.0) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "this did not come about"
        time.sleep(0.005)


@contextmanager
def logged(*names: str, level: int = logging.DEBUG) -> Iterator[list[logging.LogRecord]]:
    """What some loggers say, whatever other tests have done to their parents."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    loggers = [logging.getLogger(name) for name in names]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(level)
    try:
        yield records
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)


class App:
    """Routes for the tests, and what they saw."""

    def __init__(self, config: ServerConfig) -> None:
        self.config, self.seen, self.waiting, self.left = config, list[str](), 0, 0
        self.scopes: list[Scope] = []
        self.release = threading.Event()
        routes = [
            ("/health", self.health, "GET"), ("/echo", self.echo, "POST"), ("/v1/messages", self.echo, "POST"),
            ("/early", self.early, "POST"), ("/wait", self.wait, "POST"), ("/wait-stream", self.wait_stream, "GET"),
            ("/flood", self.flood, "GET"), ("/chunks", self.chunks, "GET"), ("/raise/{what}", self.fail, "GET"),
            ("/break", self.break_off, "GET"), ("/leave", self.leave, "GET"), ("/cut", self.cut, "GET"),
            ("/gate", self.gate, "GET"), ("/big", self.big, "GET"), ("/silent", self.silent, "GET"),
        ]
        self.router = Router([Route(path, Plain(call), methods=[method]) for path, call, method in routes],
                             redirect_slashes=False, default=unknown_route)

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, b'{"status":"ok"}')

    async def echo(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_json_body(scope, receive, self.config, lambda size: None)
        self.seen.append(body.decode("latin-1")[:40])
        self.scopes.append(scope)
        await send_json(send, json.dumps({"size": len(body), "path": scope["path"]}).encode())

    async def early(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, b'{"early":true}')

    async def wait(self, scope: Scope, receive: Receive, send: Send) -> None:
        await read_json_body(scope, receive, self.config, lambda size: None)
        await run_until_disconnect(receive, self._for_ever())

    async def wait_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        out = EventStream(send)
        await out.write(b"data: 1\n\n")
        await run_until_disconnect(receive, self._for_ever())

    async def _for_ever(self) -> None:
        self.waiting += 1
        try:
            await asyncio.Event().wait()
        finally:
            self.left += 1

    async def flood(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def work() -> None:
            out = EventStream(send)
            try:
                while True:
                    await out.write(PIECE)
                    await asyncio.sleep(0)
            finally:
                self.left += 1

        self.waiting += 1
        await run_until_disconnect(receive, work())

    async def chunks(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def work() -> None:
            out = EventStream(send)
            for number in range(3):
                await out.write(b"data: %d\n\n" % number, more=number < 2)
            await asyncio.sleep(0.01)  # whoever cleans up after the last piece is not interrupted
            self.seen.append("cleaned")

        await run_until_disconnect(receive, work())

    async def fail(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise {
            "request": RequestError("n is bad", "n"), "capacity": CapacityError("full", 2.5), "time": TimeoutError(),
            "bug": ValueError("internals at 0x7f001122 in /home/me/x.py"),
        }[scope["path_params"]["what"]]

    async def break_off(self, scope: Scope, receive: Receive, send: Send) -> None:
        await EventStream(send).write(b"data: 1\n\n")
        raise ValueError("too late for a status")

    async def leave(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Nothing is sent at all."""

    async def silent(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a", "more_body": True})
        await send({"type": "http.response.body", "body": b"b"})

    async def cut(self, scope: Scope, receive: Receive, send: Send) -> None:
        connection = scope["extensions"]["octavo.connection"]
        out = EventStream(send)
        while not connection.write_paused:
            await out.write(PIECE * 16)
        self.seen.append(f"buffered {connection.buffered() > 0}")
        stop = cutter(scope)
        assert stop is not None
        stop()

    async def big(self, scope: Scope, receive: Receive, send: Send) -> None:
        """More than the kernel takes, in one write: the answer is complete while most of it still waits."""
        await send_json(send, b"x" * (64 << 20))
        self.seen.append("big")

    async def gate(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers when ``release`` is set."""
        self.waiting += 1
        while not self.release.is_set():
            await asyncio.sleep(0.002)
        await send_json(send, b'{"gate":true}')


class Plain:
    """A coroutine function with ASGI's arguments, for a Route: it takes functions for endpoints with a Request."""

    def __init__(self, call: Any) -> None:
        self._call = call

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._call(scope, receive, send)


class Running:
    """A server under test."""

    def __init__(self, app: App, server: uvicorn.Server, port: int) -> None:
        self.app, self.server, self.port = app, server, port

    def connect(self, receive_buffer: int = 0) -> "Client":
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.settimeout(15.0)
        sock.connect(("127.0.0.1", self.port))
        return Client(sock)

    def ask(self, raw: bytes) -> "Answer":
        """Send bytes on a new connection, read one answer."""
        with self.connect() as client:
            client.send(raw)
            return client.answer()

    @property
    def lingering(self) -> int:
        """Refused connections that are not closed yet."""
        return len(self.server.config.http.lingering)  # type: ignore[union-attr]

    @property
    def connections(self) -> int:
        return len(self.server.server_state.connections)


@contextmanager
def serving(keys: Keys | None = None, **options: Any) -> Iterator[Running]:
    """Run the application with the given options of the server."""
    config = ServerConfig(**options)
    app = App(config)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(512)
    gate = Gate(app.router, config, keys or Keys())
    server = uvicorn.Server(uvicorn_config(gate, config, lifespan="off", loop="uvloop"))
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    try:
        until(lambda: server.started)
        yield Running(app, server, sock.getsockname()[1])
    finally:
        app.release.set()
        server.should_exit = server.force_exit = True
        thread.join(20)
        sock.close()
        assert not thread.is_alive()


class Answer:
    """A response: status, headers (lower case), body, whether it was framed by the end of the connection."""

    def __init__(self, head: bytes, method: str = "GET") -> None:
        first, *lines = head.decode("latin-1").split("\r\n")
        self.version, status, *_ = first.split(" ", 2)
        self.status = int(status)
        pairs = [line.split(": ", 1) for line in lines]
        self.headers = {name.lower(): value for name, value in pairs}
        assert len(self.headers) == len(pairs), f"a header came twice: {lines}"
        self.body = b""

    @property
    def json(self) -> Any:
        assert self.headers["content-type"] == "application/json"
        return json.loads(self.body)

    def error(self) -> dict[str, Any]:
        """The error in OpenAI's shape, checked."""
        document = self.json
        assert list(document) == ["error"] and set(document["error"]) == {"message", "type", "param", "code"}
        error: dict[str, Any] = document["error"]
        text = error["message"]
        assert text and len(text.encode()) <= 2000
        assert not any(bad in text for bad in ("0x", "/home", "Traceback", SECRET)), text
        return error


class Client:
    """A connection."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self._data = sock, b""

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def _more(self) -> None:
        data = self.sock.recv(1 << 16)
        assert data, f"the connection ended after {self._data[-200:]!r}"
        self._data += data

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._data:
            self._more()
        found, _, self._data = self._data.partition(mark)
        return found

    def _take(self, size: int) -> bytes:
        while len(self._data) < size:
            self._more()
        found, self._data = self._data[:size], self._data[size:]
        return found

    def answer(self, method: str = "GET") -> Answer:
        """Read one response."""
        answer = Answer(self._until(b"\r\n\r\n"))
        if answer.status == 100 or method == "HEAD":
            return answer
        if answer.headers.get("transfer-encoding") == "chunked":
            while size := int(self._until(b"\r\n"), 16):
                answer.body += self._take(size)
                assert self._take(2) == b"\r\n"
            assert self._take(2) == b"\r\n"
        elif (length := answer.headers.get("content-length")) is not None:
            answer.body = self._take(int(length))
        else:
            answer.body = self.rest()
        return answer

    def rest(self) -> bytes:
        """Everything until the server ends the connection, by its end or by a reset."""
        data, self._data = self._data, b""
        try:
            while piece := self.sock.recv(1 << 16):
                data += piece
        except ConnectionResetError:
            pass
        return data
