"""Probes: does the server live, is it ready, how far has it come, how much is it doing.

Owns what "healthy" means and the routes that say so; it does not know requests. Health means progress: a process that
answers while its engine stands still is not healthy. Invariant: every answer here is made of what is known already, so
that it comes at once however busy the engine is.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from starlette.types import Receive, Scope, Send

from octavo import __version__
from octavo.server.sse import send_json

HEARTBEAT_LIMIT = 8.0
"""Seconds without a heartbeat after which the engine process counts as hung."""


class Vitals(Protocol):
    """What is known of the engine process; EngineClient has it."""

    phase: str
    progress: float

    @property
    def ready(self) -> bool:
        """True while requests are taken."""

    def heartbeat_age(self) -> float:
        """Seconds since the last heartbeat."""

    def step_age(self) -> float:
        """Seconds that the present step has taken so far."""


class Status(msgspec.Struct):
    """The body of a 503.

    Attributes:
        status: "loading", "restarting", "hanging" or "draining". phase, progress: of the engine, progress 0 to 1.
    """

    status: str
    phase: str
    progress: float


@dataclass(slots=True)
class Health:
    """The state of one API process.

    Attributes:
        has_text: tokenizer and template are loaded, too. was_ready: it has been ready once, so that what is loaded now is
            a restart. draining: it takes no more requests.
    """

    vitals: Vitals
    step_timeout: float
    has_text: bool = False
    was_ready: bool = False
    draining: bool = False

    def trouble(self) -> str:
        """Why /health says 503, or ""."""
        vitals = self.vitals
        # Only a ready engine can hang: one that starts may be busy for long without a word, in a library that is being loaded.
        if vitals.ready and (vitals.heartbeat_age() > HEARTBEAT_LIMIT or vitals.step_age() > self.step_timeout):
            return "hanging"
        if vitals.ready and self.has_text:
            self.was_ready = True
            return ""
        return "restarting" if self.was_ready else "loading"

    def status(self, trouble: str) -> Status:
        """The body that says so."""
        return Status(trouble, self.vitals.phase, round(self.vitals.progress, 3))


class Probes:
    """The routes. Each is a raw ASGI application.

    Args:
        num_open: requests that wait or run in the whole server.
    """

    def __init__(self, health: Health, num_open: Callable[[], Awaitable[int]]) -> None:
        self.health, self._num_open = health, num_open

    def routes(self) -> Sequence[tuple[str, str, Callable[[Scope, Receive, Send], Awaitable[None]]]]:
        """(method, path, application)."""
        probes = {"/health": self.healthy, "/ping": self.healthy, "/livez": self.live, "/ready": self.ready,
                "/readyz": self.ready, "/version": self.version, "/load": self.load}
        return [("GET", path, handler) for path, handler in probes.items()] + [("POST", "/ping", self.healthy)]

    async def healthy(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 when ready and while draining."""
        await self._answer(send, self.health.trouble())

    async def live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As /health, but loading, after a restart of the engine too, is no trouble: to end the process would begin it again."""
        trouble = self.health.trouble()
        await self._answer(send, "" if trouble in ("loading", "restarting") else trouble)

    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """200 while requests are taken; the length of the queue has no part in it."""
        await self._answer(send, self.health.trouble() or ("draining" if self.health.draining else ""))

    async def version(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The version of Octavo."""
        await send_json(send, msgspec.json.encode({"version": __version__}))

    async def load(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Requests that wait or run, in all API processes."""
        await send_json(send, msgspec.json.encode({"server_load": await self._num_open()}))

    async def _answer(self, send: Send, trouble: str) -> None:
        if not trouble:
            await send_json(send, b"")
            return
        body = msgspec.json.encode(self.health.status(trouble))
        await send_json(send, body, 503, [(b"retry-after", b"1")])
