"""StopMatcher: finds the first stop string in a text that arrives in pieces.

Owns the search (an Aho-Corasick automaton) and the text that must wait; it does not know tokens. Invariant: text that
was given out never becomes part of a stop string later, and what waits is the longest end of the text that may still
grow into one, so at most one character less than the longest stop string.
"""

from collections import deque
from functools import lru_cache


class StopAutomaton:
    """States are prefixes of the stop strings; a state is the longest prefix that the text ends with."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.stops = stops
        self.step: list[dict[str, int]] = [{}]
        self.depth = [0]
        self.match = [-1]  # index of the stop string that is complete here, the first as given when there are several
        for order, stop in enumerate(stops):
            state = 0
            for char in stop:
                if char not in self.step[state]:
                    self.step[state][char] = len(self.step)
                    self.step.append({})
                    self.depth.append(self.depth[state] + 1)
                    self.match.append(-1)
                state = self.step[state][char]
            if self.match[state] < 0:
                self.match[state] = order
        self.fail = [0] * len(self.step)
        queue = deque(self.step[0].values())
        while queue:
            state = queue.popleft()
            for char, child in self.step[state].items():
                queue.append(child)
                self.fail[child] = self.next(self.fail[state], char)
                shorter = self.match[self.fail[child]]
                if shorter >= 0 and not 0 <= self.match[child] < shorter:
                    self.match[child] = shorter
        self.first = frozenset(self.step[0])

    def next(self, state: int, char: str) -> int:
        """The state after one more character."""
        while (found := self.step[state].get(char)) is None:
            if state == 0:
                return 0
            state = self.fail[state]
        return found


@lru_cache(maxsize=256)
def automaton(stops: tuple[str, ...]) -> StopAutomaton:
    """One automaton per set of stop strings: most requests of a service send the same."""
    return StopAutomaton(stops)


class StopMatcher:
    """Text in, text out, until a stop string is complete.

    Args:
        stops: none empty. include: give out the stop string too.

    Attributes:
        stop: the stop string that ended the text, or None. The one that is complete first; among several that end
            at the same character the first as given.
    """

    def __init__(self, stops: tuple[str, ...], include: bool = False) -> None:
        self._machine, self._include = automaton(stops), include
        self._state, self._held = 0, ""
        self.stop: str | None = None

    def push(self, text: str, armed: bool = True) -> str:
        """Take more text, return what may be shown. armed: False ignores stop strings that end in this text."""
        machine = self._machine
        if self._state == 0 and machine.first.isdisjoint(text):
            return text
        state = self._state
        for i, char in enumerate(text):
            state = machine.next(state, char)
            if armed and machine.match[state] >= 0:
                self.stop = machine.stops[machine.match[state]]
                whole, self._state, self._held = self._held + text[: i + 1], 0, ""
                return whole if self._include else whole[: len(whole) - len(self.stop)]
        whole, self._state = self._held + text, state
        shown = len(whole) - machine.depth[state]
        self._held = whole[shown:]
        return whole[:shown]

    def finish(self) -> str:
        """What waited: the text has ended."""
        held, self._held, self._state = self._held, "", 0
        return held
