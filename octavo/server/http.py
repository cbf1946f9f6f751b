"""What every request passes before and after its route: identity, keys, CORS, errors, and the one line in the log.

Owns the middleware ``Gate`` and what routes need of HTTP (reading a body, noticing that the client has left); it does not
know a single route except the few that need no key. Invariants: a path decides about its key in exactly the form in which
the router sees it; every answer that is no success has the shape of errors.py; no log line holds a key or a text of a
client's, and a client cannot break one in two.
"""

import asyncio
import functools
import logging
import re
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from octavo.errors import OctavoError
from octavo.log import get_logger
from octavo.server.auth import Keys
from octavo.server.config import ServerConfig
from octavo.server.connection import EXTENSION, Connection
from octavo.server.errors import ApiError, clip, to_api_error
from octavo.server.timing import ORIGIN, Origin

T = TypeVar("T")

OPEN_PATHS = frozenset({"/", "/health", "/ping", "/ready", "/readyz", "/livez"})
"""Paths that never need a key: the static page and the probes."""
PROBE_PATHS = OPEN_PATHS - {"/"}
"""Paths that are answered even when there are as many connections as may be."""
QUIET_PATHS = OPEN_PATHS | {"/metrics"}
"""Paths whose requests are logged at DEBUG only."""
CLIENT_LEFT = 499
"""What the log and the metrics say about a request whose client left before its answer; never sent."""

_READ = frozenset({
    b"x-request-id", b"authorization", b"x-api-key", b"origin", b"access-control-request-method",
    b"access-control-request-headers", b"traceparent", b"tracestate",
})
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
_METHODS = "DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT"
_EXPOSED = (b"access-control-expose-headers", b"x-request-id, retry-after, x-should-retry")

logger = get_logger(__name__)


class ClientDisconnected(OctavoError):
    """The client left before its answer was complete: nobody is there to be told anything."""


class Cors:
    """Which pages of a browser may call. ``*`` stands for every origin, method or header."""

    def __init__(
        self, origins: Sequence[str] = ("*",), methods: Sequence[str] = ("*",), headers: Sequence[str] = ("*",),
        credentials: bool = False,
    ) -> None:
        self._origins = None if "*" in origins else frozenset(origin.encode("latin-1") for origin in origins)
        self._methods = (_METHODS if "*" in methods else ", ".join(methods)).encode("latin-1")
        self._headers = None if "*" in headers else ", ".join(headers).encode("latin-1")
        self._credentials = credentials

    def headers(self, origin: bytes) -> list[tuple[bytes, bytes]]:
        """What an answer to a page of ``origin`` carries."""
        if self._origins is None and not self._credentials:
            return [(b"access-control-allow-origin", b"*"), _EXPOSED]
        found = [(b"vary", b"Origin")]
        if self._origins is None or origin in self._origins:
            found += [(b"access-control-allow-origin", origin), _EXPOSED]
            if self._credentials:
                found.append((b"access-control-allow-credentials", b"true"))
        return found

    def preflight(self, asked: bytes | None) -> list[tuple[bytes, bytes]]:
        """What the answer to a preflight carries beside them; ``asked``: the headers that the page wants to send."""
        # A literal * would not cover Authorization: the asked ones are repeated.
        allowed = self._headers if self._headers is not None else asked
        found = [(b"access-control-allow-methods", self._methods), (b"access-control-max-age", b"600")]
        return [*found, (b"access-control-allow-headers", allowed)] if allowed else found


class Gate:
    """The outermost ASGI application.

    It puts ``request_id`` and ``cache_salt`` into ``scope["state"]``, takes ``root_path`` off the path, answers preflights and
    requests without a key, and makes an answer of every exception of ``app``.

    Args:
        app: a bare router that does not redirect (its default: ``unknown_route``). server: its options for browsers, keys,
            request ids, the log. observe: called at the end of each request with its scope, its status (CLIENT_LEFT where
            nothing was sent) and its seconds.
    """

    def __init__(
        self, app: ASGIApp, server: ServerConfig, keys: Keys, observe: Callable[[Scope, int, float], None] | None = None,
    ) -> None:
        self.app, self._keys, self._observe = app, keys, observe
        self._cors = Cors(server.allowed_origins, server.allowed_methods, server.allowed_headers, server.allow_credentials)
        self._open = OPEN_PATHS if server.metrics_auth else OPEN_PATHS | {"/metrics"}
        self._request_ids, self._root_path = server.enable_request_id_headers, server.root_path
        self._level = logging.DEBUG if server.disable_uvicorn_access_log else logging.INFO

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self.app  # with it, the router raises where it would answer in plain text
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        start = time.perf_counter()
        asked: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in _READ:
                asked.setdefault(name, value)
        if self._root_path:
            scope["path"] = without_root(scope["path"], self._root_path)
        given = asked.get(b"x-request-id")
        request_id = given if given is not None and _REQUEST_ID.fullmatch(given) else secrets.token_hex(16).encode()
        state = scope.setdefault("state", {})
        state["request_id"] = request_id.decode("ascii")
        traces = (asked.get(name, b"").decode("latin-1") for name in (b"traceparent", b"tracestate"))
        ORIGIN.set(Origin(state["request_id"], *traces))
        extra = [(b"x-request-id", request_id)] if self._request_ids else []
        if (origin := asked.get(b"origin")) is not None:
            extra += self._cors.headers(origin)
        status = sent = 0

        async def answer(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *extra]
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            if scope["method"] == "OPTIONS" and origin is not None and b"access-control-request-method" in asked:
                extra += self._cors.preflight(asked.get(b"access-control-request-headers"))
                await answer({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
                await answer({"type": "http.response.body", "body": b""})
            else:
                state["cache_salt"] = self._admit(scope, asked)
                await self.app(scope, receive, answer)
        except ClientDisconnected:
            status = CLIENT_LEFT
        except Exception as exc:
            await self._fail(scope, exc, answer, started=status != 0)
        finally:
            state["response_bytes"] = sent
            self._note(scope, status or CLIENT_LEFT, time.perf_counter() - start)

    def _admit(self, scope: Scope, asked: dict[bytes, bytes]) -> str:
        """The cache salt of the request; ApiError 401 where a key is needed and missing."""
        salt = self._keys.salt(asked.get(b"authorization"), asked.get(b"x-api-key"))
        if salt is not None:
            return salt
        if scope["path"] in self._open or scope["method"] == "OPTIONS":
            return ""
        raise ApiError(401, "An API key is needed: send Authorization: Bearer KEY, or x-api-key: KEY."
                       if b"authorization" not in asked and b"x-api-key" not in asked else "The API key is not valid.",
                       code="invalid_api_key")

    async def _fail(self, scope: Scope, exc: Exception, answer: Send, started: bool) -> None:
        error = to_api_error(exc)
        if error is not exc and error.status == 500:
            logger.error("request %s failed", scope["state"]["request_id"], exc_info=exc)
        if not started:
            body = error.body(scope["path"])
            await answer({"type": "http.response.start", "status": error.status, "headers": error.raw_headers(body)})
            await answer({"type": "http.response.body", "body": body})
        elif (cut := cutter(scope)) is not None:
            cut()  # the answer breaks off: only a cut shows that it is not complete
        else:
            raise exc

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        if self._observe is not None:
            self._observe(scope, status, seconds)
        # Probes come every few seconds, and say nothing new.
        level = logging.DEBUG if scope["path"] in QUIET_PATHS else self._level
        if logger.isEnabledFor(level):
            path = clip(scope["path"]).encode("unicode_escape").decode("ascii")
            client = scope.get("client") or ("-", 0)
            logger.log(level, "%s %s %d %.1f ms from %s:%d id %s", scope["method"], path, status, seconds * 1e3,
                       *client, scope["state"]["request_id"])


def without_root(path: str, root_path: str) -> str:
    """A path as the router sees it. Both kinds of proxies work: those that pass the prefix on and those that take it off."""
    if path == root_path or path.startswith(root_path + "/"):
        return path[len(root_path) :] or "/"
    return path


async def unknown_route(scope: Scope, receive: Receive, send: Send) -> None:
    """A router's default: 404."""
    raise ApiError(404, f"There is no route {clip(scope['path'])}.", code="unknown_route")


def key_salt(scope: Scope) -> str:
    """What keeps the prefix cache of this client's key apart from others'; "" where no keys are set."""
    salt: str = scope["state"]["cache_salt"]
    return salt


def cutter(scope: Scope) -> Callable[[], None] | None:
    """Cuts the client's connection; None where the HTTP server is not ours."""
    connection: Connection | None = scope.get("extensions", {}).get(EXTENSION)
    return None if connection is None else connection.abort


async def read_json_body(scope: Scope, receive: Receive, server: ServerConfig, hold: Callable[[int], None]) -> bytes:
    """The body of a request that says, or does not deny, that it is JSON.

    Args:
        hold: told how many bytes are here whenever more have come; what it raises ends the reading.

    Raises:
        ApiError: 415 another type or an encoding; 413 longer than max_body_bytes.
        ClientDisconnected: it did not arrive in full.
    """
    for name, value in scope["headers"]:
        if name == b"content-type" and value != b"application/json" and not _is_json(value):
            raise ApiError(415, "The Content-Type must be application/json, in UTF-8.")
        if name == b"content-encoding" and value.strip().lower() != b"identity":
            raise ApiError(415, "The body must come without a Content-Encoding.")
    parts: list[bytes] = []
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnected
        part, more = message.get("body", b""), message.get("more_body", False)
        size += len(part)
        if size > server.max_body_bytes:
            raise ApiError(413, f"The body is larger than {server.max_body_bytes} bytes.")
        hold(size)
        parts.append(part)
    return b"".join(parts) if len(parts) > 1 else parts[0]


async def run_until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Await ``work``, which is cancelled as soon as the client leaves; the body of the request must have been read.

    Raises:
        ClientDisconnected: the client left.
    """
    task = asyncio.current_task()
    assert task is not None
    left = False

    async def watch() -> None:
        nonlocal left
        while (message := await receive())["type"] != "http.disconnect":
            pass
        if "complete" not in message:  # see Cycle.receive
            left = True
            task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if left and task.uncancel() == 0:
            raise ClientDisconnected from None
        raise
    finally:
        watcher.cancel()


@functools.lru_cache(64)
def _is_json(content_type: bytes) -> bool:
    """Whether a Content-Type is JSON in UTF-8."""
    kind, *params = (part.strip().lower() for part in content_type.split(b";"))
    pairs = [param.partition(b"=") for param in params]
    charsets = {value.strip(b'" ') for name, _, value in pairs if name.strip() == b"charset"}
    return kind == b"application/json" and charsets <= {b"utf-8", b"utf8"}
