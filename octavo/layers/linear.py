"""Linear layers, single or fused: several matrices of a checkpoint become one product.

Owns the order of the parts inside the fused output; it knows neither attention nor MLP. Invariant: the matrix is packed
at the moment its last part arrives, so that loading never holds more than one layer's parts beside the packed weights.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from octavo.layers.weight import PackedWeight, Slot, Slots, Vector


class Linear:
    """y = x @ weight.T + bias, where weight stacks the parts in their order.

    Args:
        columns: input features. parts: name -> output features of each part, stacked in this order.
        bias: every part has one. dtype: storage type of the weight.
    """

    def __init__(self, columns: int, parts: Mapping[str, int], *, bias: bool, dtype: torch.dtype) -> None:
        self._parts = dict(parts)
        rows = sum(parts.values())
        self.weight = PackedWeight(rows, columns, dtype)
        self._vector = Vector(rows) if bias else None
        self.bias: Tensor | None = self._vector.value if self._vector else None
        self._arrived: dict[str, Tensor] = {}

    def slots(self) -> Slots:
        """``<part>.weight`` [out, in] and ``<part>.bias`` [out] of every part."""
        found: Slots = {}
        start = 0
        for part, rows in self._parts.items():
            found[f"{part}.weight"] = Slot((rows, self.weight.columns), partial(self._take, part))
            if self._vector:
                found[f"{part}.bias"] = self._vector.slot(start, rows)
            start += rows
        return found

    def __call__(self, out: Tensor, x: Tensor) -> None:
        """out [tokens, all parts] from x [tokens, columns], both float32."""
        self.weight.apply(out, x, self.bias)

    def _take(self, part: str, tensor: Tensor) -> None:
        self._arrived[part] = tensor.to(self.weight.dtype)
        if len(self._arrived) == len(self._parts):
            stacked = [self._arrived.pop(name) for name in self._parts]
            self.weight.fill(stacked[0] if len(stacked) == 1 else torch.cat(stacked))
