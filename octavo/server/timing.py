"""Timing: what is known of one request when it is measured, logged and traced; Observer: who wants to know.

Owns these words only; it does not measure anything. Times are monotonic seconds, the same clock in all processes of a
machine. Invariant: a request that was opened is closed exactly once, and each of its continuations is finished once before.
"""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from octavo.params import SamplingParams


class Origin(NamedTuple):
    """Where a request came from: its id in HTTP, and the trace of the client's that it belongs to (W3C headers, or "")."""

    request_id: str
    traceparent: str = ""
    tracestate: str = ""


ORIGIN: ContextVar[Origin | None] = ContextVar("octavo_origin", default=None)
"""Of the HTTP request that the present task answers."""


@dataclass(slots=True)
class Timing:
    """When things happened to one prompt, and how much there was of it.

    Attributes:
        request_id: the engine's name for it. origin: the HTTP request that it is part of, None without one.
        arrival: it came. begun: the engine gave it a row. first, last: its first and last token came.
        prompt_tokens, cached_tokens: of the prompt, and those of them found in the prefix cache.
        counts: tokens of each continuation so far. reasons: finish reasons of those that have ended, in order of their ends.
    """

    request_id: str
    arrival: float
    params: SamplingParams
    prompt_tokens: int
    origin: Origin | None = None
    begun: float | None = None
    first: float | None = None
    last: float | None = None
    cached_tokens: int = 0
    counts: list[int] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = [0] * self.params.n

    @property
    def output_tokens(self) -> int:
        """Tokens of all continuations."""
        return sum(self.counts)


class Observer(Protocol):
    """Is told of requests, in the event loop: all but ``opened`` and ``closed`` must take microseconds."""

    def opened(self, timing: Timing, prompt: str | None, prompt_token_ids: Sequence[int]) -> None:
        """A request was sent to the engine; its text is None where the client sent ids."""

    def token(self, timing: Timing, now: float, count: int) -> None:
        """A step brought ``count`` tokens of a request; first and last are still those of before."""

    def finished(self, timing: Timing, reason: str) -> None:
        """A continuation ended: "stop", "length", "abort" or "error"."""

    def closed(self, timing: Timing) -> None:
        """A request is over."""
