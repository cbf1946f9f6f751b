"""The MLP of a block, gated or plain.

Owns its projections and the name of its activation; it does not know its place in a block. Invariant: both classes
answer to the same call, so that a block never asks which one it has.
"""

import torch
from torch import Tensor

from octavo import ops
from octavo.layers.linear import Linear
from octavo.layers.norm import Norm
from octavo.layers.weight import Slots
from octavo.layers.workspace import Workspace
from octavo.parallel import Shards


class GatedMLP:
    """down(act(gate(x)) * up(x)).

    Args:
        hidden, intermediate: sizes. kind: activation as ``ops.gated_activation`` names it. bias: of all projections.
    """

    def __init__(
        self, hidden: int, intermediate: int, kind: str, *, bias: bool, dtype: torch.dtype, shards: Shards,
        device: str = "cpu",
    ) -> None:
        self.up = Linear(hidden, {"gate": intermediate, "up": intermediate}, bias=bias, dtype=dtype, device=device)
        self.down = Linear(intermediate, {"down": hidden}, bias=bias, dtype=dtype, device=device)
        self.kind, self.shards = kind, shards

    def slots(self) -> Slots:
        """``gate|up|down.weight`` and biases."""
        return self.up.slots() | self.down.slots()

    def __call__(self, out: Tensor, x: Tensor, work: Workspace) -> None:
        """out [tokens, hidden] from x [tokens, hidden]."""
        self.up.gated(work.act, x, self.kind, work.up)
        self.down(out, work.act)
        self.shards.all_reduce(out)

    def advance(self, norm: Norm, work: Workspace) -> None:
        """residual += delta, then delta = this MLP of the residual's norm."""
        self.up.normed_gated(work.act, norm, work, self.kind)
        self.down(work.delta, work.act)
        self.shards.all_reduce(work.delta)


class PlainMLP:
    """down(act(up(x))). Arguments as of GatedMLP."""

    def __init__(
        self, hidden: int, intermediate: int, kind: str, *, bias: bool, dtype: torch.dtype, shards: Shards,
        device: str = "cpu",
    ) -> None:
        self.up = Linear(hidden, {"up": intermediate}, bias=bias, dtype=dtype, device=device)
        self.down = Linear(intermediate, {"down": hidden}, bias=bias, dtype=dtype, device=device)
        self.kind, self.shards = kind, shards

    def slots(self) -> Slots:
        """``up|down.weight`` and biases."""
        return self.up.slots() | self.down.slots()

    def __call__(self, out: Tensor, x: Tensor, work: Workspace) -> None:
        """out [tokens, hidden] from x [tokens, hidden]."""
        self.up(work.up, x)
        ops.activation(work.act, work.up, self.kind)
        self.down(out, work.act)
        self.shards.all_reduce(out)

    def advance(self, norm: Norm, work: Workspace) -> None:
        """residual += delta, then delta = this MLP of the residual's norm."""
        self.up.normed(work.up, norm, work)
        ops.activation(work.act, work.up, self.kind)
        self.down(work.delta, work.act)
        self.shards.all_reduce(work.delta)


MLP = GatedMLP | PlainMLP
