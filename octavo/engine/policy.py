"""The waiting queue and the policies that order it.

Owns who is next and who must give way first; it does not know blocks, rows or budgets. A policy is one class with two keys,
smaller is sooner: ``key`` orders the waiting queue, ``rank`` orders running sequences (the largest gives up its blocks
first). Both are fixed when a sequence is queued, so the queue is a plain heap.

Invariant: ranks are unique, so the sequence with the smallest one is never preempted for another and always ends.
"""

import heapq
from collections.abc import Iterator
from typing import Any, Protocol

from octavo.engine.request import Sequence, Status

Key = tuple[Any, ...]

SJF_TOKENS_PER_SECOND = 256.0
"""Ageing: a second of waiting counts as much as so many prompt tokens, so a 16k prompt is passed for at most a minute."""


class Policy(Protocol):
    """What a policy offers."""

    def key(self, sequence: Sequence) -> Key:
        """Place in the waiting queue."""

    def rank(self, sequence: Sequence) -> Key:
        """Place in the order of preemption."""


def _arrival(sequence: Sequence) -> Key:
    return (sequence.request.number, sequence.index)


class FirstCome:
    """``fcfs``: by arrival; a preempted sequence is older than all that wait and so comes back to the head."""

    def key(self, sequence: Sequence) -> Key:
        """By arrival."""
        return _arrival(sequence)

    def rank(self, sequence: Sequence) -> Key:
        """The last arrival gives way."""
        return _arrival(sequence)


class Priority:
    """``priority``: the lower value first, ties by arrival; among running ones the highest value gives way first."""

    def key(self, sequence: Sequence) -> Key:
        """By priority, then arrival."""
        return (sequence.request.priority, *_arrival(sequence))

    def rank(self, sequence: Sequence) -> Key:
        """By priority, then arrival."""
        return self.key(sequence)


class ShortestFirst:
    """``sjf``: the shortest remaining prompt first, with ageing; sequences that have run before go ahead, by arrival.

    Everybody ages at one rate, so ``tokens - rate * (now - arrival)`` orders like ``tokens + rate * arrival``: fixed.
    """

    def key(self, sequence: Sequence) -> Key:
        """By length of the prompt and arrival, both in tokens."""
        request = sequence.request
        if request.started:
            return (0, *_arrival(sequence))
        return (1, request.num_prompt + SJF_TOKENS_PER_SECOND * request.arrival, *_arrival(sequence))

    def rank(self, sequence: Sequence) -> Key:
        """The last arrival gives way."""
        return _arrival(sequence)


POLICIES: dict[str, type[FirstCome] | type[Priority] | type[ShortestFirst]] = {
    "fcfs": FirstCome, "priority": Priority, "sjf": ShortestFirst}


class WaitingQueue:
    """Waiting sequences in the order of a policy.

    Args:
        policy: gives the keys.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._heap: list[tuple[Key, int, Sequence]] = []
        self._pushes = 0
        self._dead = 0  # entries whose sequence ended while it waited; they leave when they reach the head

    def push(self, sequence: Sequence) -> None:
        """Queue a WAITING sequence at its place."""
        self._pushes += 1
        heapq.heappush(self._heap, (self._policy.key(sequence), self._pushes, sequence))

    def removed(self) -> None:
        """A queued sequence has ended. Amortised O(log n): the heap is cleaned when half of it is dead."""
        self._dead += 1
        if 2 * self._dead > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[2].status is Status.WAITING]
            heapq.heapify(self._heap)
            self._dead = 0

    def head(self) -> Sequence | None:
        """Who is next, left in place; None when nobody waits."""
        heap = self._heap
        while heap and heap[0][2].status is not Status.WAITING:
            heapq.heappop(heap)
            self._dead -= 1
        return heap[0][2] if heap else None

    def pop(self) -> Sequence:
        """Remove and return the head."""
        head = self.head()
        assert head is not None
        heapq.heappop(self._heap)
        return head

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for _, _, sequence in self._heap if sequence.status is Status.WAITING)

    def __len__(self) -> int:
        return len(self._heap) - self._dead
