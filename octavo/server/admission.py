"""Admission: how many requests may wait, and when a client that was turned away should come back.

Owns the counts of what waits and the rate at which requests end; it does not know HTTP or the engine. Invariant: every
ticket that was given is either still counted or was left exactly once, so nothing is ever counted twice or lost.
"""

import time
from collections import deque
from collections.abc import Callable

from octavo.errors import CapacityError

WINDOW = 30.0
"""Seconds over which the rate of requests that end is measured."""
MIN_RETRY, MAX_RETRY = 1.0, 60.0


class Ticket:
    """A request's place. ``begin`` when it starts to run, ``leave`` when it is over; both may be called again."""

    __slots__ = ("_admission", "_tokens", "since", "waiting")

    def __init__(self, admission: "Admission") -> None:
        self._admission, self._tokens, self.since, self.waiting = admission, 0, admission.clock(), True

    def weigh(self, tokens: int) -> None:
        """Say how many prompt tokens the request brings; CapacityError when no more may wait."""
        admission = self._admission
        # One request alone may be as long as it likes: what it may be is the engine's to say.
        if admission.tokens and admission.tokens + tokens > admission.max_tokens:
            raise admission.refusal(f"{admission.tokens} prompt tokens wait already")
        self._tokens += tokens
        admission.tokens += tokens

    def begin(self) -> None:
        """The request runs: it does not wait any more."""
        if self.waiting:
            self.waiting = False
            self._admission.waiting -= 1
            self._admission.tokens -= self._tokens

    def leave(self, done: bool = True) -> None:
        """The request is over; ``done``: it was served, and counts for the rate."""
        self.begin()
        if self._admission.tickets.pop(self, None) is not None and done:
            self._admission.note_end()

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()


class Admission:
    """The door.

    Args:
        max_requests: requests that may wait. max_tokens: their prompt tokens together. clock: monotonic seconds.

    Attributes:
        waiting, tokens: what waits now. tickets: requests inside, waiting or running. closed: why nobody may enter, or "".
    """

    def __init__(self, max_requests: int, max_tokens: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_requests, self.max_tokens, self.clock = max_requests, max_tokens, clock
        self.waiting = self.tokens = 0
        self.tickets: dict[Ticket, None] = {}
        self.closed = ""
        self._ends: deque[float] = deque(maxlen=1024)

    def enter(self) -> Ticket:
        """A place for one more request, before anything of it is read; CapacityError when there is none."""
        if self.closed:
            raise CapacityError(self.closed, self.retry_after())
        if self.waiting >= self.max_requests:
            raise self.refusal(f"{self.waiting} requests wait already")
        ticket = Ticket(self)
        self.tickets[ticket] = None
        self.waiting += 1
        return ticket

    def refusal(self, what: str) -> CapacityError:
        """The error for a request that finds no place."""
        return CapacityError(f"The server is full: {what}. Try again later.", self.retry_after())

    def oldest_wait(self) -> float:
        """Seconds for which the first of those that wait has waited."""
        since = next((ticket.since for ticket in self.tickets if ticket.waiting), None)
        return 0.0 if since is None else self.clock() - since

    def note_end(self) -> None:
        """A request has been served."""
        self._ends.append(self.clock())

    def retry_after(self) -> float:
        """Seconds until about half of those that wait have begun, by the rate of the last half minute."""
        now = self.clock()
        while self._ends and now - self._ends[0] > WINDOW:
            self._ends.popleft()
        if len(self._ends) < 2 or now <= self._ends[0]:
            return MIN_RETRY
        rate = len(self._ends) / (now - self._ends[0])
        return min(MAX_RETRY, max(MIN_RETRY, 0.5 * self.waiting / rate))
