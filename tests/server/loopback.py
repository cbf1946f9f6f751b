"""The fake engine's service behind real HTTP on a free port of 127.0.0.1, for clients that nobody here wrote; and one that
sends every kind of value in every place."""

import asyncio
import copy
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fake_service import ROUTES, FakeEngine, Script, make_service, send_request, texts
from starlette.routing import Route, Router
from wire import Plain, until

from octavo.server.auth import Keys
from octavo.server.http import Gate, unknown_route
from octavo.server.protocol import uvicorn_config


@contextmanager
def listening(script: Script, keys: tuple[str, ...] = (), **options: Any) -> Iterator[tuple[str, FakeEngine]]:
    """(address of the server, its engine); options as for make_service."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(64)
    made: list[tuple[uvicorn.Server, FakeEngine]] = []

    async def run() -> None:
        service, link = make_service(script, **options)

        def plain(handler: Any) -> Plain:
            return Plain(lambda scope, receive, send: handler(service, scope, receive, send))

        routes = [Route(path, plain(handler), methods=[method]) for method, path, handler in ROUTES]
        gate = Gate(Router(routes, redirect_slashes=False, default=unknown_route), service.server, Keys(keys))
        server = uvicorn.Server(uvicorn_config(gate, service.server, lifespan="off"))
        made.append((server, link))
        await server.serve(sockets=[sock])
        service.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        until(lambda: made and made[0][0].started)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", made[0][1]
    finally:
        made[0][0].should_exit = made[0][0].force_exit = True
        thread.join(20)
        sock.close()
        assert not thread.is_alive()


ODD: tuple[Any, ...] = (None, True, -1, 1.5, "", "\x00odd", [], [[]], [{}], {}, {"type": "odd"}, {"type": ["odd"]}, 2**70)


def survey(path: str, body: Any, **options: Any) -> list[int]:
    """The statuses of the answers to a body with each of its values in turn made an odd one, or with a strange key beside it."""

    async def run() -> list[int]:
        service, link = make_service(texts("x"), **options)
        statuses = []
        for changed in _changed(body):
            statuses.append((await send_request(service, path, changed)).status)
        await asyncio.gather(*link.tasks)
        service.close()
        return statuses

    return asyncio.run(run())


def _changed(value: Any) -> Iterator[Any]:
    """The value with one place in it made odd."""
    yield from ODD
    if isinstance(value, dict):
        yield value | {"odd": 1}
    for key in (list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()):
        for changed in _changed(value[key]):
            whole = copy.copy(value)
            whole[key] = changed
            yield whole
