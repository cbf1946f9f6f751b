"""Controls: which strings a tokenizer would take for control tokens, and where they stand in a text.

Owns the search only; it knows neither templates nor ids. Invariant: ``find`` cuts a text where the tokenizer would:
leftmost first, the longest of those that begin there.
"""

import re
from collections.abc import Iterable, Iterator

Span = tuple[int, int]
STRETCH = 1 << 14
"""Characters that are searched at a time: while the library searches, no other thread runs."""


class Controls:
    """The control strings of one vocabulary.

    Args:
        special: contents of the control tokens. others: contents of the other added tokens, which the tokenizer matches
            in the same pass. whole_words: those of both that do not match inside a word.
    """

    def __init__(self, special: Iterable[str], others: Iterable[str] = (), whole_words: Iterable[str] = ()) -> None:
        self.special = frozenset(special)
        whole = frozenset(whole_words)
        every = sorted(self.special | set(others), key=len, reverse=True)
        self._any = re.compile("|".join(_pattern(text, text in whole) for text in every) or "(?!)")
        longest = sorted(self.special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest)) or "(?!)")
        # A lookahead finds occurrences that overlap, too.
        self._overlapping = re.compile(f"(?=({self._special.pattern}))")
        self._max = max(map(len, self.special), default=0)
        self._reach = max(map(len, every), default=0) + 1  # one more, which a whole word must not go on with
        self._heads = {text[:k] for text in self.special for k in range(1, len(text))}
        self._tails = {text[k:] for text in self.special for k in range(1, len(text))}
        self._joined = "\0".join(self.special)

    def find(self, text: str, start: int = 0, end: int | None = None) -> list[Span]:
        """Where the tokenizer would see a control token in text[start:end]."""
        end = len(text) if end is None else end
        return [m.span() for m in self._matches(self._any, text, start, end) if m.group() in self.special]

    def whole(self, text: str) -> list[Span]:
        """Every place of a control string, united where they overlap."""
        if next(self._matches(self._special, text, 0, len(text)), None) is None:
            return []
        return _unite((m.start(1), m.end(1)) for m in self._matches(self._overlapping, text, 0, len(text)))

    def parts(self, text: str) -> list[Span]:
        """Beginnings and ends of a text that could become a control string together with what is put around it."""
        size = len(text)
        if 0 < size < self._max and text in self._joined:
            return [(0, size)]
        reach = range(min(self._max - 1, size), 0, -1)
        tail = next((k for k in reach if text[:k] in self._tails), 0)
        head = next((k for k in reach if text[size - k :] in self._heads), 0)
        return [span for span in ((0, tail), (size - head, size)) if span[0] < span[1]]

    def _matches(self, pattern: re.Pattern[str], text: str, start: int, end: int) -> Iterator[re.Match[str]]:
        """``pattern.finditer``, a stretch at a time."""
        for cut in range(start + STRETCH, end + STRETCH, STRETCH):
            for match in pattern.finditer(text, start, min(cut + self._reach, end)):
                if match.start() >= cut:
                    break
                yield match
                start = match.end()
            start = max(start, cut)


def _pattern(text: str, whole_word: bool) -> str:
    return rf"(?<!\w){re.escape(text)}(?!\w)" if whole_word else re.escape(text)


def _unite(spans: Iterable[Span]) -> list[Span]:
    united: list[Span] = []
    for start, end in sorted(spans):
        if united and start <= united[-1][1]:
            united[-1] = (united[-1][0], max(end, united[-1][1]))
        else:
            united.append((start, end))
    return united


def unite(*groups: Iterable[Span]) -> list[Span]:
    """Spans of several groups, those that touch or overlap made one."""
    return _unite(span for group in groups for span in group)
