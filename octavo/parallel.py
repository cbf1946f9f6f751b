"""The tensor-parallel group: which share of every layer this process computes, and how shares become whole.

Owns rank, size and the collective calls; it knows no layer and no process launcher. Layers receive a group when they
are built, so nothing asks for a global one. Invariant: in a group of size 1 a collective leaves its tensor as it is.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shards:
    """One member of a group.

    Attributes:
        rank: 0 <= rank < size. size: members; only 1 exists so far.
    """

    rank: int = 0
    size: int = 1

    def __post_init__(self) -> None:
        assert (self.rank, self.size) == (0, 1), f"a group of {self.size} members does not exist yet"

    def all_reduce(self, x: Tensor) -> None:
        """Sum x over the members, in place."""
