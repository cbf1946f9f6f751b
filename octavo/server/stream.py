"""Stream: the answers to the prompts of one request, on their way from the engine to the route that asked.

Owns what has come and was not read yet, the deadlines, and the end; it does not know where Steps come from. Invariant: a
stream ends exactly once, after its last Step or with one error, and then every request of it has ended, too.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from octavo.params import SamplingParams
from octavo.server.admission import Ticket
from octavo.server.timing import Timing
from octavo.text.deltas import Step

CHARS_PER_STEP, CHARS_PER_TOKEN = 60, 40
"""What a Delta takes when it is written, about; for the bound on what waits for a slow reader."""


@dataclass(slots=True)
class Opened:
    """An Ask on its way: its text and ids as they were computed."""

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    timing: Timing
    done: bool = False


@dataclass(eq=False)
class Stream:
    """The answers to some prompts, as an async iterator over what came since the last look: (prompt number, Step).

    Use it as ``async with``: leaving aborts what still runs. Iterating raises ApiError when it cannot go on.

    Attributes:
        drop: ends a request that has not ended. ticket: of the admission. opened: the requests, by prompt number.
        cut: breaks the client's connection. open: how many of the requests have not ended.
        size, since: what waits to be read, in bytes about, and since when. error: why it cannot go on.
        begun: one of the requests runs, or has run. writing: what was read is being written in a thread, which takes its time.
    """

    drop: Callable[[Opened, str], None]
    ticket: Ticket
    opened: list[Opened]
    cut: Callable[[], None] | None
    open: int
    size: int = 0
    since: float = 0.0
    error: Exception | None = None
    begun: bool = False
    writing: bool = False
    _news: list[tuple[int, Step]] = field(default_factory=list)
    _waiter: asyncio.Future[None] | None = None
    _timers: list[asyncio.TimerHandle] = field(default_factory=list)

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> list[tuple[int, Step]]:
        while not self._news:
            if self.error is not None:
                raise self.error
            if not self.open:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        news, self._news, self.size = self._news, [], 0
        return news

    async def __aenter__(self) -> "Stream":
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def push(self, number: int, step: Step, now: float) -> None:
        """Take a Step in; whoever waits is woken once."""
        if not self._news:
            self.since = now
        self._news.append((number, step))
        for delta in step.deltas:
            self.size += CHARS_PER_STEP + len(delta.text) + CHARS_PER_TOKEN * len(delta.token_ids)
        self._wake()

    def fail(self, error: Exception) -> None:
        """End with an error, after what has already come; the engine drops what runs."""
        if self.error is None:
            self.error = error
            self._release("error", done=False)
        self._wake()

    def close(self) -> None:
        """Nobody reads any more."""
        done = self.error is None and not self.open
        if self.error is None:
            self.error = RuntimeError("the stream was left")  # for a second reader, which would be a bug
        self._release("abort", done)

    def arm(self, timer: asyncio.TimerHandle) -> None:
        """Remember a deadline; it is cancelled when the stream is over."""
        self._timers.append(timer)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _release(self, reason: str, done: bool) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        for opened in self.opened:
            if not opened.done:
                self.drop(opened, reason)
        self.ticket.leave(done)
