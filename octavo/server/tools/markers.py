"""Markers and the text around them, in a text that arrives in pieces.

Owns the search for fixed strings and the newlines that frame them; it does not know what the strings mean. Invariant:
what must wait is the longest end of the text that may still become a marker, so always shorter than the longest marker.
"""

import re
from collections.abc import Sequence


class Markers:
    """A few strings to look for. Where several begin at one place, the shortest is found."""

    def __init__(self, *markers: str) -> None:
        ordered = sorted(markers, key=len)
        self._regex = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        self._prefixes = frozenset(marker[:size] for marker in markers for size in range(1, len(marker)))
        self._first = frozenset(marker[:1] for marker in markers)
        self._reach = max(map(len, markers), default=1) - 1

    def find(self, text: str, pos: int) -> tuple[int, int]:
        """(start, end) of the first marker; where none is complete, start == end and from start on the text must wait."""
        held = self._held(text, pos)
        found = self._regex.search(text, pos)
        return (held, held) if found is None or found.start() > held else found.span()

    def _held(self, text: str, pos: int) -> int:
        for start in range(max(pos, len(text) - self._reach), len(text)):
            if text[start] in self._first and text[start:] in self._prefixes:
                return start
        return len(text)


def expect(text: str, pos: int, options: Sequence[str]) -> str | None:
    """Which of the options stands at pos; "" if the text ends before that is known, None if it is none of them."""
    for option in options:
        if text.startswith(option, pos):
            return option
    rest = text[pos : pos + max(map(len, options))]
    return "" if any(option.startswith(rest) for option in options) else None


class Frame:
    """Text between markers, without the newlines that stand directly before or after one."""

    def __init__(self, fresh: bool = False) -> None:
        self._fresh = fresh  # a marker came last
        self._newlines = 0  # a number, because a run may be long and come one by one

    def push(self, text: str) -> str:
        """Take text, return what is known not to stand before a marker's newlines."""
        if self._fresh:
            text = text.lstrip("\n")
            if not text:
                return ""
            self._fresh = False
        body = text.rstrip("\n")
        if not body:
            self._newlines += len(text)
            return ""
        shown = "\n" * self._newlines + body
        self._newlines = len(text) - len(body)
        return shown

    def mark(self) -> None:
        """A marker stands here: the newlines before it are its own, and those after it will be."""
        self._newlines, self._fresh = 0, True

    def finish(self) -> str:
        """The text has ended: the newlines that waited."""
        newlines, self._newlines = "\n" * self._newlines, 0
        return newlines


class Ending:
    """A text without the control tokens that close it.

    Args:
        tokens: their texts. From the first of them on, everything is dropped if only such tokens and whitespace follow;
            otherwise it stays, because a text may well speak of ``</s>``.
    """

    def __init__(self, tokens: Sequence[str]) -> None:
        self._markers = Markers(*tokens)
        self._held = ""  # the beginning of a token
        self._waiting: list[str] = []  # from a token on

    def push(self, text: str) -> str:
        text, pos, shown = self._held + text, 0, list[str]()
        while True:
            start, end = self._markers.find(text, pos)
            between = text[pos:start]
            if self._waiting and between and not between.isspace():
                shown += self._waiting
                self._waiting.clear()
            (self._waiting if self._waiting else shown).append(between)
            if start == end:
                self._held = text[start:]
                return "".join(shown)
            self._waiting.append(text[start:end])
            pos = end

    def finish(self) -> str:
        held, self._held = self._held, ""
        if not held:
            return ""
        waiting, self._waiting = "".join(self._waiting), []
        return waiting + held
