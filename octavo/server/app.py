"""The application: every route of the server and what lies in front of them.

Owns the table of routes and which of them need the engine; it does not know what any of them does. Invariant: a route
that is not in this table does not exist, and none but the probes and the page answers before the model is there.
"""

from collections.abc import Awaitable, Callable, Iterable

from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from octavo.server import chat, completions, generate, messages, models, openapi, responses, tokenize
from octavo.server.auth import Keys
from octavo.server.errors import ApiError, retry_after
from octavo.server.http import Gate, unknown_route
from octavo.server.metrics import Metrics
from octavo.server.page import page
from octavo.server.probes import Health, Probes
from octavo.server.service import Service

Handler = Callable[[Service, Scope, Receive, Send], Awaitable[None]]
APIS: tuple[tuple[str, str, Handler], ...] = (
    *completions.ROUTES, *chat.ROUTES, *responses.ROUTES, *messages.ROUTES, *generate.ROUTES, *tokenize.ROUTES,
    *models.ROUTES, *openapi.ROUTES)


class _Api:
    """A handler as an ASGI application that waits for nobody: while there is no engine it says so."""

    def __init__(self, handler: Handler, service: Service, health: Health) -> None:
        self._handler, self._service, self._health = handler, service, health

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if trouble := self._health.trouble():
            status = self._health.status(trouble)
            raise ApiError(503, f"The model is not ready: {status.status}, {status.phase}.", headers=retry_after(1.0))
        await self._handler(self._service, scope, receive, send)


class _Plain:
    """A route's function as an ASGI application (Router takes functions for something else)."""

    def __init__(self, function: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._function = function

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._function(scope, receive, send)


def build_app(service: Service, health: Health, metrics: Metrics, keys: Keys) -> ASGIApp:
    """The ASGI application of one API process."""
    table: list[tuple[str, str, ASGIApp]] = [
        (method, path, _Api(handler, service, health)) for method, path, handler in APIS]
    table += [(method, path, _Plain(handler)) for method, path, handler in Probes(health, metrics.num_open).routes()]
    table += [("GET", "/", _Plain(_page)), ("GET", "/metrics", _Plain(metrics.serve))]
    router = Router(_routes(table), redirect_slashes=False, default=unknown_route)
    return Gate(router, service.server, keys, metrics.http)


async def _page(scope: Scope, receive: Receive, send: Send) -> None:
    """The chat page, or 304 to a browser that has it."""
    body, headers = page()
    etag = headers["ETag"].encode()
    status = 304 if any(name == b"if-none-match" and value == etag for name, value in scope["headers"]) else 200
    await Response(body if status == 200 else b"", status, headers)(scope, receive, send)


class _Methods:
    """The applications of one path by method; HEAD is answered as GET, whose body the protocol leaves out."""

    def __init__(self) -> None:
        self.apps: dict[str, ASGIApp] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"]
        await self.apps["GET" if method == "HEAD" else method](scope, receive, send)


def _routes(table: Iterable[tuple[str, str, ASGIApp]]) -> list[Route]:
    """One Route per path, so that a wrong method is told all right ones."""
    paths: dict[str, _Methods] = {}
    for method, path, app in table:
        paths.setdefault(path, _Methods()).apps[method] = app
    return [Route(path, methods, methods=list(methods.apps)) for path, methods in paths.items()]
