"""Pace: how many requests begin in one turn of the event loop.

Owns the line in which requests stand that came together; it does not know what they are. To begin one takes a good part of a
millisecond: hundreds at once would keep the loop from everything else, probes and running streams first of all. Invariant:
what is put in line begins once, in the order of its coming, and within the same turn where there is no line.
"""

import asyncio
from collections import deque
from collections.abc import Callable

PER_TURN = 8
"""Requests that begin in one turn: a few milliseconds."""


class Pace:
    """One per event loop."""

    def __init__(self) -> None:
        self._line: deque[Callable[[], None]] = deque()
        self._room = PER_TURN
        self._turning = False

    def begin(self, loop: asyncio.AbstractEventLoop, start: Callable[[], None]) -> None:
        """Call ``start``: now, or when it is its turn."""
        if self._room and not self._line:
            self._room -= 1
            start()
        else:
            self._line.append(start)
        if not self._turning:
            self._turning = True
            loop.call_soon(self._turn, loop)

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        self._room = PER_TURN
        self._turning = bool(self._line)
        if self._turning:  # first, so that one that cannot be begun does not keep those behind it
            loop.call_soon(self._turn, loop)
        while self._line and self._room:
            self._room -= 1
            self._line.popleft()()
