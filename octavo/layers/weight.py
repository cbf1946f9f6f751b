"""Where a parameter lives: vectors in float32, matrices in a weight format that allocates, loads and applies itself.

Owns storage types and layouts; it does not know what a matrix means in the network or what a checkpoint calls it.
A format that other devices need (plain [rows, columns] for cuBLAS, int4 groups) is a second class with the methods of
``PackedWeight``. Invariant: what is stored is a copy of our own, never a view of the caller's tensor.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from octavo import ops


class Slot(NamedTuple):
    """A place that a checkpoint must fill: the shape it has there, and what takes the tensor."""

    shape: tuple[int, ...]
    store: Callable[[Tensor], None]


Slots = dict[str, Slot]


def prefixed(prefix: str, slots: Mapping[str, Slot]) -> Slots:
    """The slots under longer names."""
    return {prefix + name: slot for name, slot in slots.items()}


class Vector:
    """A float32 [size] parameter: norm weights and biases."""

    def __init__(self, size: int) -> None:
        self.value = torch.zeros(size, dtype=torch.float32)

    def slot(self, start: int = 0, size: int | None = None) -> Slot:
        """The place of entries start .. start + size; all of them by default."""
        part = self.value[start : None if size is None else start + size]
        return Slot((len(part),), lambda tensor: _fill(part, tensor))


class Table:
    """A [rows, columns] parameter that is only looked up: kept as it comes, in its storage type."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.value = torch.empty(rows, columns, dtype=dtype)

    def fill(self, weight: Tensor) -> None:
        """Take the weight [rows, columns]."""
        _fill(self.value, weight)

    def gather(self, out: Tensor, ids: Tensor) -> None:
        """out float32 [tokens, columns] = rows ids."""
        if self.value.dtype == torch.float32:
            torch.index_select(self.value, 0, ids, out=out)
        else:
            out.copy_(torch.index_select(self.value, 0, ids))


class PackedWeight:
    """A [rows, columns] matrix in the panels of ``ops.pack_linear``; rows are output features."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.rows, self.columns, self.dtype = rows, columns, dtype
        self.packed = torch.empty(0, columns, 32, dtype=dtype)

    def fill(self, weight: Tensor) -> None:
        """Take the weight [rows, columns] in any floating type."""
        assert weight.shape == (self.rows, self.columns)
        self.packed = ops.pack_linear(weight.to(self.dtype).contiguous())

    def apply(self, out: Tensor, x: Tensor, bias: Tensor | None) -> None:
        """out [tokens, rows] = x [tokens, columns] @ weight.T + bias."""
        ops.linear(out, x, self.packed, bias, self.rows)

    def gather(self, out: Tensor, ids: Tensor) -> None:
        """out float32 [tokens, columns] = rows ids."""
        ops.embedding(out, ids, self.packed, self.rows)


def _fill(destination: Tensor, tensor: Tensor) -> None:
    destination.copy_(tensor)
