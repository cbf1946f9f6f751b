"""Linear layers, single or fused: several matrices of a checkpoint become one product.

Owns the order of the parts inside the fused output; it knows neither attention nor MLP, nor how a device stores a matrix.
Invariant: parts lie in the order in which they were named, whatever the order in which they arrive.
"""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from octavo import ops
from octavo.layers.norm import Norm, RMSNorm
from octavo.layers.weight import DenseWeight, Slot, Slots, Vector, matrix
from octavo.layers.workspace import Workspace


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

    def normed(self, out: Tensor, norm: Norm, work: Workspace) -> None:
        """Advance the state, residual += delta, and out = this product of its norm; one launch where the device has it."""
        w = self.weight
        if isinstance(w, DenseWeight) and isinstance(norm, RMSNorm) and work.fuses and w.takes_norm(len(out)):
            ops.norm_linear(
                out, work.total, work.residual, work.delta, norm.weight, norm.eps, norm.offset, w.value, self.bias, w.scratch)
            work.exchange()
        else:
            norm.add(work.normed, work.residual, work.delta)
            self(out, work.normed)

    def normed_gated(self, out: Tensor, norm: Norm, work: Workspace, kind: str) -> None:
        """The same for ``gated``, with ``work.up`` as the room."""
        w = self.weight
        if isinstance(w, DenseWeight) and isinstance(norm, RMSNorm) and work.fuses and w.takes_norm(len(out)):
            ops.norm_gated(
                out, work.total, work.residual, work.delta, norm.weight, norm.eps, norm.offset, w.value, self.bias, kind,
                w.scratch)
            work.exchange()
        else:
            norm.add(work.normed, work.residual, work.delta)
            self.gated(out, work.normed, kind, work.up)

    def gated(self, out: Tensor, x: Tensor, kind: str, both: Tensor) -> None:
        """out [tokens, n] = act(first part) * second part, two parts of n features; ``both`` is room for [tokens, 2 n]."""
        self.weight.apply_gated(out, x, self.bias, kind, both)
