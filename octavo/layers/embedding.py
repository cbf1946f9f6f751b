"""Both ends of a network: token ids to vectors, and vectors to logits.

Owns the embedding table, learned positions, the projections around a narrow table, and the head. Rows of the table
beyond the vocabulary are padding that no id reaches: they are cut off when the checkpoint is read. Invariant: a tied
table is stored once, in the layout of the head, and looked up there.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from octavo.layers.linear import Linear
from octavo.layers.weight import Slot, Slots, Table, Vector, Weight, matrix, prefixed

Step = Callable[[Tensor, Tensor], Tensor]


class Embedding:
    """The table of token vectors.

    Args:
        vocab_size: rows that are kept. rows: rows in the checkpoint. columns: size of a vector.
        tied: the head multiplies by the same table. dtype: storage type. device: where it lives.
    """

    def __init__(
        self, vocab_size: int, rows: int, columns: int, *, tied: bool, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self.vocab_size, self.rows, self.columns = vocab_size, rows, columns
        self.table: Weight | Table = (matrix if tied else Table)(vocab_size, columns, dtype, device)

    def slots(self) -> Slots:
        """``weight`` [rows, columns]."""
        return {"weight": Slot((self.rows, self.columns), lambda weight: self.table.take(0, weight[: self.vocab_size]))}

    def __call__(self, out: Tensor, ids: Tensor) -> None:
        """out [tokens, columns] of ids int64 [tokens]."""
        self.table.gather(out, ids)


class Scale:
    """Multiply embeddings by a number."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def slots(self) -> Slots:
        """No parameters."""
        return {}

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x, scaled in place."""
        return x.mul_(self.factor)


class Project:
    """Widen or narrow vectors by a linear map without bias.

    Args:
        name: of the parameter. columns, rows: input and output features. dtype: storage type. device: where it lives.
    """

    def __init__(self, name: str, columns: int, rows: int, dtype: torch.dtype, device: str = "cpu") -> None:
        self.rows, self.linear = rows, Linear(columns, {name: rows}, bias=False, dtype=dtype, device=device)

    def slots(self) -> Slots:
        """``<name>.weight`` [rows, columns]."""
        return self.linear.slots()

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """A new tensor [tokens, rows]."""
        out = x.new_empty(len(x), self.rows)
        self.linear(out, x)
        return out


class LearnedPositions:
    """Add a learned vector per position.

    Args:
        rows: of the table. columns: size of a vector. offset: position p has row p + offset. device: where it lives.
    """

    def __init__(self, rows: int, columns: int, offset: int, device: str = "cpu") -> None:
        self.table, self.offset = Table(rows, columns, torch.float32, device), offset

    def slots(self) -> Slots:
        """``positions.weight`` [rows, columns]."""
        return {"positions.weight": Slot(tuple(self.table.value.shape), lambda weight: self.table.take(0, weight))}

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x plus the rows of positions int64 [tokens], in place."""
        return x.add_(self.table.value.index_select(0, positions + self.offset))


class Head:
    """Hidden states to logits: weight (its own or the embedding's), bias, scale, soft cap.

    Args:
        table: the embedding where the head is tied to it; None for a matrix of its own. vocab_size, rows, columns: as
            of Embedding. bias: per row. scale: multiplies logits. softcap: softcap * tanh(logits / softcap), 0 off.
        device: where it lives.
    """

    def __init__(
        self, table: Weight | None, *, vocab_size: int, rows: int, columns: int, bias: bool, scale: float,
        softcap: float, dtype: torch.dtype, device: str = "cpu",
    ) -> None:
        self.vocab_size, self.rows, self.columns, self._tied = vocab_size, rows, columns, table is not None
        self.weight = table or matrix(vocab_size, columns, dtype, device)
        self._bias = Vector(vocab_size, device) if bias else None
        self.bias: Tensor | None = self._bias.value if self._bias else None
        self._finish: tuple[Callable[[Tensor], None], ...] = (
            *((lambda logits: logits.mul_(scale),) if scale != 1.0 else ()),
            *((lambda logits: logits.div_(softcap).tanh_().mul_(softcap),) if softcap else ()),
        )

    def slots(self) -> Slots:
        """``head.weight`` [rows, columns] unless tied, and ``head.bias`` [rows] where there is one."""
        found: Slots = {}
        if not self._tied:
            shape = (self.rows, self.columns)
            found["weight"] = Slot(shape, lambda weight: self.weight.take(0, weight[: self.vocab_size]))
        if self._bias:
            place = self._bias.slot()
            found["bias"] = Slot((self.rows,), lambda bias: place.store(bias[: self.vocab_size]))
        return prefixed("head.", found)

    def __call__(self, logits: Tensor, x: Tensor) -> None:
        """logits float32 [rows, vocab_size] of x [rows, columns]."""
        self.weight.apply(logits, x, self.bias)
        for step in self._finish:
            step(logits)
