"""Linear layers, single or fused: several matrices of a checkpoint become one product.

Owns the order of the parts inside the fused output; it knows neither attention nor MLP, nor how a device stores a matrix.
Invariant: parts lie in the order in which they were named, whatever the order in which they arrive.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from octavo.layers.weight import Slot, Slots, Vector, matrix


class Linear:
    """y = x @ weight.T + bias, where weight stacks the parts in their order.

    Args:
        columns: input features. parts: name -> output features of each part, stacked in this order.
        bias: every part has one. dtype: storage type of the weight. device: where it lives.
    """

    def __init__(
        self, columns: int, parts: Mapping[str, int], *, bias: bool, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        self._parts = dict(parts)
        rows = sum(parts.values())
        self.weight = matrix(rows, columns, dtype, device)
        self._vector = Vector(rows, device) if bias else None
        self.bias: Tensor | None = self._vector.value if self._vector else None

    def slots(self) -> Slots:
        """``<part>.weight`` [out, in] and ``<part>.bias`` [out] of every part."""
        found: Slots = {}
        start = 0
        for part, rows in self._parts.items():
            found[f"{part}.weight"] = Slot((rows, self.weight.columns), partial(self.weight.take, start))
            if self._vector:
                found[f"{part}.bias"] = self._vector.slot(start, rows)
            start += rows
        return found

    def __call__(self, out: Tensor, x: Tensor) -> None:
        """out [tokens, all parts] from x [tokens, columns]."""
        self.weight.apply(out, x, self.bias)

    def gated(self, out: Tensor, x: Tensor, kind: str, both: Tensor) -> None:
        """out [tokens, n] = act(first part) * second part, two parts of n features; ``both`` is room for [tokens, 2 n]."""
        self.weight.apply_gated(out, x, self.bias, kind, both)
