"""Budget: what one rendering of a chat template that nobody trusts may use.

Owns the bounds (time, the size of a value, the size of all values) and the counting; it does not know Jinja. Invariant:
a size is refused before it is made wherever it can be foreseen, and counted right afterwards everywhere else.
"""

import time
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

MAX_TOTAL = 128  # times the bound of one value: all that one rendering may make
MAX_SECONDS = 5.0
MAX_BITS = 1 << 14  # of a whole number


class Exceeded(Exception):
    """A rendering went over one of its bounds."""


class Budget:
    """What one rendering may use: time, the size of each value, and the size of all values together."""

    def __init__(self, limit: int) -> None:
        self.limit, self.left = limit, limit * MAX_TOTAL
        self.deadline = time.monotonic() + MAX_SECONDS
        self._sizes: dict[int, tuple[Any, int]] = {}  # keeps what it names, so that no number is used again

    def tick(self) -> None:
        if time.monotonic() > self.deadline:
            raise Exceeded(f"took longer than {MAX_SECONDS:g} seconds")

    def fits(self, size: int) -> None:
        """Refuse a size before it is made."""
        if size > self.limit:
            raise Exceeded(f"made a value of more than {self.limit} characters")

    def charge(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise Exceeded(f"made values of more than {self.limit * MAX_TOTAL} characters together")

    def size(self, value: Any) -> int:
        """Characters of a value with all that it holds, as often as it holds it: lists of lists can double."""
        if isinstance(value, (str, bytes)):
            return len(value)
        if not isinstance(value, (list, tuple, dict, set, frozenset)):
            return 8
        found = self._sizes.get(id(value))
        if found is None:
            self.charge(8 * len(value))
            held: Iterable[Any] = [*value, *value.values()] if isinstance(value, dict) else value
            size = 8
            for item in held:
                size += 8 + self.size(item)
                self.fits(size)
            found = self._sizes[id(value)] = value, size
        return found[1]

    def take(self, value: Any) -> Any:
        """A value that an operation made: checked, counted, returned."""
        size = self.size(value)
        self.fits(size)
        if isinstance(value, (str, bytes)):
            self.charge(size)
        elif isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise Exceeded(f"made a number of more than {MAX_BITS} bits")
        return value

    def given(self, *values: Any) -> None:
        """Arguments of a call, of which none may ask for more than a value's bound."""
        for value in values:
            if isinstance(value, int):
                self.fits(abs(value))
            else:
                self.charge(self.size(value) if isinstance(value, str) else 0)


current_budget: ContextVar[Budget] = ContextVar("octavo_template_budget")
