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
    """A request's place: it is read, then it waits, then it runs. Each call may be repeated, and ``leave`` comes last.

    Attributes:
        since: when it came. waiting: it has been read and does not run yet.
    """

    __slots__ = ("_admission", "_bytes", "_tokens", "since", "waiting")

    def __init__(self, admission: "Admission") -> None:
        self._admission, self._bytes, self._tokens = admission, 0, 0
        self.since, self.waiting = admission.clock(), False

    def hold(self, size: int) -> None:
        """So many bytes of it are here; CapacityError when the server holds as much as it may."""
        admission = self._admission
        # One request alone may be as long as it likes: how long is said elsewhere.
        if admission.bytes > self._bytes and admission.bytes - self._bytes + size > admission.max_bytes:
            raise admission.refusal(f"{admission.bytes} bytes of requests are held already")
        admission.bytes += size - self._bytes
        self._bytes = size

    def wait(self, tokens: int) -> None:
        """It is read, and brings so many prompt tokens; CapacityError when no more may wait."""
        admission = self._admission
        admission.check_room()
        if admission.tokens and admission.tokens + tokens > admission.max_tokens:
            raise admission.refusal(f"{admission.tokens} prompt tokens wait already")
        self.waiting = True
        self._tokens = tokens
        admission.waiting += 1
        admission.tokens += tokens

    def begin(self) -> None:
        """It runs: it does not wait any more."""
        if self.waiting:
            self.waiting = False
            self._admission.waiting -= 1
            self._admission.tokens -= self._tokens

    def leave(self, done: bool = False) -> None:
        """It is over; ``done``: it was served to its end, and counts for the rate."""
        self.begin()
        if self in self._admission.tickets:
            del self._admission.tickets[self]
            self._admission.bytes -= self._bytes
            if done:
                self._admission.note_end()

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()


class Admission:
    """The door.

    Args:
        max_requests: requests that may wait. max_tokens: their prompt tokens together. max_bytes: bytes of the bodies of
            all requests that are inside. clock: monotonic seconds.

    Attributes:
        waiting, tokens: what waits now. bytes: held. tickets: requests inside, read, waiting or running.
        closed: why nobody may enter, or "".
    """

    def __init__(self, max_requests: int, max_tokens: int, max_bytes: int,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self.max_requests, self.max_tokens, self.max_bytes, self.clock = max_requests, max_tokens, max_bytes, clock
        self.waiting = self.tokens = self.bytes = 0
        self.tickets: dict[Ticket, None] = {}
        self.closed = ""
        self._ends: deque[float] = deque(maxlen=1024)

    def enter(self) -> Ticket:
        """A place for one more request, before anything of it is read; CapacityError when there is none.

        A request that is still being read takes no place from those that wait: a client that sends slowly, or nothing,
        would keep the others out.
        """
        self.check_room()
        ticket = Ticket(self)
        self.tickets[ticket] = None
        return ticket

    def check_room(self) -> None:
        """CapacityError when no more requests may wait, or none at all."""
        if self.closed:
            raise CapacityError(self.closed, self.retry_after())
        if self.waiting >= self.max_requests:
            raise self.refusal(f"{self.waiting} requests wait already")

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
