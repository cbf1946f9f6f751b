"""HTTP/1.1 on one connection: uvicorn's protocol on httptools with the limits that it lacks.

Owns the border between bytes and ASGI: how many connections, how large a head and a body, how slow a client may be, which
requests are one thing to us and another to a proxy. It does not know routes or JSON. Invariants: whatever arrives, the
connection holds a bounded amount of memory and ends in bounded time unless it makes progress; every refusal is a JSON
error followed by a close that leaves the client time to read it, and comes after the answers to the requests before it;
an application hears of a lost client at once, whether or not it writes.
"""

import asyncio
import functools
import re
import ssl
import urllib.parse
from collections import deque
from enum import IntEnum
from typing import Any, cast

import httptools
import uvicorn
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from octavo.server.config import ServerConfig
from octavo.server.connection import EXTENSION, Connection, Cycle, disconnect, refusal
from octavo.server.errors import ApiError
from octavo.server.http import PROBE_PATHS, without_root
from octavo.server.pace import Pace

MAX_URL = 8 << 10
"""Bytes of a request's target."""
MAX_PIPELINED = 8
"""Requests of one connection that are not answered yet."""
MAX_OVERHEAD = 1 << 20
"""Bytes that the chunks of a body may take beside the body."""
MIN_RATE = 8 << 10
"""Bytes per second that a body must come at, over each body_timeout."""
RESERVE = 16
"""Connections beyond max_connections that may ask the probes: however many clients there are, the server must not seem dead."""
RESERVE_SECONDS = 1.0
"""What such a connection may take for the head of its request."""
LINGER = 2.0
"""Seconds in which a refused client may read the refusal; what it sends meanwhile is thrown away."""
MAX_LINGERING = 256
"""Refused connections that get that time at once; beyond, a connection is cut."""

_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=\-]+(?::[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](?::[0-9]{1,5})?")
_FULL = "The server has as many connections as it can take."
_NOT_HTTP = "The request is not valid HTTP/1.1."


def uvicorn_config(app: Any, server: ServerConfig, **options: Any) -> uvicorn.Config:
    """The configuration of a uvicorn server that speaks this protocol, TLS included; ``options`` are further ones of uvicorn."""
    defaults: dict[str, Any] = {
        "http": type("BoundProtocol", (Protocol,), {"limits": server, "lingering": set(), "pace": Pace()}), "ws": "none",
        "headers": [("server", "octavo")], "server_header": False, "access_log": False, "proxy_headers": False,
        "log_config": None, "timeout_keep_alive": server.keep_alive,  # its type there is whole seconds; its use is not
        "ssl_keyfile": server.ssl_keyfile, "ssl_certfile": server.ssl_certfile, "ssl_ca_certs": server.ssl_ca_certs,
        # With authorities named, a client needs a certificate of theirs; uvicorn alone would not insist.
        "ssl_cert_reqs": ssl.CERT_NONE if server.ssl_ca_certs is None else ssl.CERT_REQUIRED,
    }
    return uvicorn.Config(app, **defaults | options)


class Phase(IntEnum):
    """What the reader is in."""

    BETWEEN = 0
    HEAD = 1
    BODY = 2


class _Refused(Exception):
    """Unwinds the parser; ``Protocol.fault`` holds the reason."""


class Protocol(HttpToolsProtocol):
    """A connection. ``uvicorn_config`` makes the subclass that has limits."""

    limits: ServerConfig
    lingering: set["Protocol"]
    pace: Pace

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.unfinished: deque[Cycle] = deque()  # in the order of their answers; the first one runs
        self.phase = Phase.BETWEEN
        self.fault: ApiError | None = None
        self.refused = self.replayed = self.reserve = False
        self.requests = 0
        self.num_headers = self.head_bytes = self.raw_bytes = self.body_bytes = 0
        self.timer: asyncio.TimerHandle | None = None
        self.timer_of: tuple[Phase, int] | None = None
        self.send_timer: asyncio.TimerHandle | None = None
        self.connection: Connection = None  # type: ignore[assignment]

    # The connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.connection = Connection(transport, self.flow, self.finish)
        self.reserve = len(self.connections) > self.limits.max_connections
        if len(self.connections) > self.limits.max_connections + RESERVE:
            self._refuse(ApiError(503, _FULL))
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        for cycle in self.unfinished:
            disconnect(cycle)
        self.unfinished.clear()
        self.lingering.discard(self)
        self._set_timer(None)
        if self.send_timer is not None:
            self.send_timer.cancel()
        super().connection_lost(exc)
        self.connection.release()
        self.cycle = None  # type: ignore[assignment]  # nothing is left to the garbage collector, which would stop the loop

    def shutdown(self) -> None:
        """Let the requests that have begun end, then close."""
        if self.unfinished:
            self.unfinished[-1].keep_alive = False
        else:
            self.finish()

    def finish(self) -> None:
        """Close when everything is sent; a client that still sends gets time to read what was answered."""
        if self.phase is Phase.BODY:
            self._linger()
        elif not self.transport.is_closing():
            self._end()

    # What comes in

    def data_received(self, data: bytes) -> None:
        if self.refused:
            return
        before = self.phase
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as exc:
            self._without_upgrade(data[exc.args[0] :])
        except httptools.HttpParserError:
            self._refuse(self.fault or ApiError(400, _NOT_HTTP))
        else:
            # A single endless header, or chunk extension, makes no callback: it is seen here only.
            if before is self.phase and before is not Phase.BETWEEN:
                self.raw_bytes += len(data)
                if self.phase is Phase.HEAD and self.raw_bytes > self.limits.max_header_bytes + MAX_URL:
                    self._refuse(self._head_too_large())
                elif self.phase is Phase.BODY and self.raw_bytes > 2 * self.body_bytes + MAX_OVERHEAD:
                    self._refuse(ApiError(400, "The chunks of the body are too small."))
            self._watch()

    def on_message_begin(self) -> None:
        if len(self.unfinished) >= MAX_PIPELINED:
            self._fail(ApiError(400, "Too many requests were sent ahead of their answers."))
        super().on_message_begin()
        self.scope["extensions"] = {EXTENSION: cast(Any, self.connection)}
        self.phase, self.requests, self.replayed = Phase.HEAD, self.requests + 1, False
        self.num_headers = self.head_bytes = self.raw_bytes = self.body_bytes = 0

    def on_url(self, url: bytes) -> None:
        self.url += url
        if len(self.url) > MAX_URL:
            self._fail(ApiError(400, f"The address is longer than {MAX_URL} bytes."))

    def on_header(self, name: bytes, value: bytes) -> None:
        self.num_headers += 1
        self.head_bytes += len(name) + len(value) + 4
        if self.num_headers > self.limits.max_headers or self.head_bytes > self.limits.max_header_bytes:
            self._fail(self._head_too_large())
        if self.phase is Phase.HEAD:  # after the body come trailers, which are dropped
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        version = self.parser.get_http_version()
        upgrade = self._check_head(version)
        if self.parser.should_upgrade():
            if upgrade == b"websocket" or self.parser.get_method() == b"CONNECT":
                self._fail(ApiError(400, "This server speaks HTTP/1.1 only, no WebSockets and no tunnels."))
            self.replayed = True
            return
        path = httptools.parse_url(self.url)
        raw_path = path.path or b"/"
        self.scope.update({
            "method": self.parser.get_method().decode("ascii"), "http_version": version, "raw_path": raw_path,
            "path": urllib.parse.unquote(raw_path.decode("ascii")), "query_string": path.query or b"",
        })
        if self.reserve and not self._is_probe(self.scope):
            self._fail(ApiError(503, _FULL))
        keep_alive = version != "1.0" and self.parser.should_keep_alive() and not self.reserve
        self.phase = Phase.BODY
        self.cycle = cycle = Cycle(
            scope=self.scope, transport=cast(asyncio.Transport, self.connection), flow=self.flow, logger=self.logger,
            access_logger=self.access_logger, access_log=False, default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(), expect_100_continue=self.expect_100_continue, keep_alive=keep_alive,
            on_response=self.on_response_complete)
        cycle.connection = self.connection
        self.unfinished.append(cycle)
        if len(self.unfinished) == 1:
            self._start_asgi_task(cycle, self.app)

    def on_body(self, body: bytes) -> None:
        self.body_bytes += len(body)
        if self.body_bytes > self.limits.max_body_bytes:
            self._fail(self._body_too_large())
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) > HIGH_WATER_LIMIT:
            if cycle is not self.unfinished[0]:  # nobody reads it yet, and not reading would hide that the client is gone
                self._fail(ApiError(400, "A large body was sent ahead of the answer to the request before."))
            self.flow.pause_reading()
        cycle.message_event.set()

    def on_message_complete(self) -> None:
        if self.replayed:
            return
        self.phase = Phase.BETWEEN
        if not self.cycle.response_complete:
            self.cycle.more_body = False
            self.cycle.message_event.set()

    def _check_head(self, version: str) -> bytes | None:
        """Refuse a head that could mean two things; the value of Upgrade."""
        if version not in ("1.0", "1.1"):
            self._fail(ApiError(400, "This server speaks HTTP/1.0 and HTTP/1.1."))
        host, upgrade = None, None
        for name, value in self.headers:
            match name:
                case b"host":
                    if host is not None:
                        self._fail(ApiError(400, "The request has several Host headers."))
                    host = value
                case b"transfer-encoding":
                    if value.lower() != b"chunked" or version == "1.0":
                        self._fail(ApiError(400, "The only Transfer-Encoding is chunked, in HTTP/1.1."))
                case b"content-length":
                    # The parser has seen to it that there is one, of digits, without a Transfer-Encoding.
                    if int(value) > self.limits.max_body_bytes:
                        self._fail(self._body_too_large())
                case b"upgrade":
                    upgrade = value.lower()
        if host is None and version == "1.1":
            self._fail(ApiError(400, "The request has no Host header."))
        if host is not None and not _HOST.fullmatch(host):
            self._fail(ApiError(400, "The Host header is not a host with an optional port."))
        return upgrade

    def _without_upgrade(self, rest: bytes) -> None:
        """A request that offers another protocol, such as h2c, is read again as one that does not: the parser skips its body."""
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        gone = (b"connection", b"upgrade", b"http2-settings")
        head = b"".join(b"%s: %s\r\n" % header for header in self.headers if header[0] not in gone)
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"%s %s HTTP/%s\r\n%s\r\n%s" % (method, self.url, version, head, rest))

    # Answers

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        start = functools.partial(super()._start_asgi_task, cycle, app)
        if self._is_probe(cycle.scope):
            start()  # however many others want to begin
        else:
            self.pace.begin(self.loop, start)

    def _is_probe(self, scope: Any) -> bool:
        return without_root(scope["path"], self.limits.root_path) in PROBE_PATHS

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        done = self.unfinished.popleft()
        if self.transport.is_closing() or self in self.lingering:
            return
        self.flow.resume_reading()
        if self.unfinished:
            self._start_asgi_task(self.unfinished[0], self.app)
        elif self.refused:
            self._answer_fault()
        elif self.phase is Phase.BODY and self.expect_100_continue and done is self.cycle:
            self.finish()  # whether its body still comes is anybody's guess
        else:
            self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.send_timer is not None:
            self.send_timer.cancel()
            self.send_timer = None

    # Refusing

    def _fail(self, error: ApiError) -> None:
        """Stop the parser from within one of its callbacks."""
        self.fault = error
        raise _Refused

    def _refuse(self, error: ApiError) -> None:
        """Read no more, and answer with an error when everything before it is answered."""
        self.refused, self.fault = True, error
        self._set_timer(None)
        if self.reserve:  # its place is free for the next one while it lingers
            self.connections.discard(self)
        if self.phase is Phase.BODY:
            if self.unfinished and self.unfinished[-1] is self.cycle:
                self.unfinished.pop()
                disconnect(self.cycle)
                if self.cycle.response_started:  # half an answer is out already
                    self.connection.abort()
            else:
                self._linger()  # answered before it was at fault
        if not self.unfinished:
            self._answer_fault()

    def _answer_fault(self) -> None:
        if self.transport.is_closing() or self in self.lingering or self.fault is None:
            return
        path = self.url.partition(b"?")[0].decode("latin-1") if self.requests else ""
        path = without_root(path, self.limits.root_path)
        self.transport.write(refusal(self.fault, path, self.server_state.default_headers))
        self._linger()

    def _linger(self) -> None:
        """Send the end of the stream, throw away what comes, and close when the client does or LINGER is over."""
        self.refused = True
        if len(self.lingering) >= MAX_LINGERING:
            self.connection.abort()
            return
        self.lingering.add(self)
        self.flow.resume_reading()
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._set_timer(None)
        self.timer = self.loop.call_later(LINGER, self._end)

    def _end(self) -> None:
        self.transport.close()
        self._watch_reader()

    def _head_too_large(self) -> ApiError:
        return ApiError(400, f"The head of the request is larger than {self.limits.max_header_bytes} bytes or has more than "
                             f"{self.limits.max_headers} headers.")

    def _body_too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than {self.limits.max_body_bytes} bytes.")

    # Time

    def _watch(self) -> None:
        """Set the timer of what the reader waits for; time that runs already goes on."""
        if self.refused or self.transport.is_closing():
            return
        if self.phase is Phase.BETWEEN and self.unfinished:
            self._set_timer(None)
        elif self.timer_of != (self.phase, self.requests):
            patience = min(self.limits.header_timeout, RESERVE_SECONDS) if self.reserve else self.limits.header_timeout
            match self.phase:
                case Phase.BETWEEN:
                    self._set_timer(self.config.timeout_keep_alive if self.requests else patience, self.finish)
                case Phase.HEAD:
                    self._set_timer(patience, self._head_timeout)
                case Phase.BODY:
                    self._set_timer(self.limits.body_timeout, self._body_timeout, self.body_bytes)
            self.timer_of = (self.phase, self.requests)

    def _set_timer(self, seconds: float | None, *call: Any) -> None:
        if self.timer is not None:
            self.timer.cancel()
        self.timer = None if seconds is None else self.loop.call_later(seconds, *call)
        self.timer_of = None

    def _head_timeout(self) -> None:
        self._refuse(ApiError(400, f"The head of the request did not arrive within {self.limits.header_timeout:g} s."))

    def _body_timeout(self, before: int) -> None:
        """Every body_timeout must bring its share of the body, unless it is us who do not read."""
        if not self.flow.read_paused and self.body_bytes - before < MIN_RATE * self.limits.body_timeout:
            self._refuse(ApiError(400, "The body of the request came too slowly."))
        else:
            self.timer_of = None
            self._watch()

    def _watch_reader(self) -> None:
        """Cut a client that lets the buffer stand still for send_timeout."""
        if self.send_timer is None and (size := self.connection.buffered()):
            self.send_timer = self.loop.call_later(self.limits.send_timeout, self._send_timeout, size)

    def _send_timeout(self, before: int) -> None:
        self.send_timer = None
        if self.connection.buffered() >= before:
            self.connection.abort()
        else:
            self._watch_reader()
