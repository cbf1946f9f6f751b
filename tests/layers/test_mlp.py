"""Gated and plain MLPs against torch."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from octavo.layers.mlp import GatedMLP, PlainMLP
from octavo.layers.workspace import Fresh, Workspace
from octavo.ops.attention import AttentionMeta
from octavo.parallel import Shards

ACTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
EMPTY = torch.empty(0, dtype=torch.int32)
META = AttentionMeta(EMPTY, EMPTY, EMPTY, EMPTY, EMPTY.long(), 0, 0)


@pytest.mark.parametrize("kind", ACTS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_as_torch(kind: str, bias: bool, gated: bool) -> None:
    mlp = (GatedMLP if gated else PlainMLP)(10, 13, kind, bias=bias, dtype=torch.float32, shards=Shards())
    p = {name: torch.randn(slot.shape) for name, slot in mlp.slots().items()}
    assert set(p) == {
        f"{part}.{end}" for part in ("gate", "up", "down")[not gated :] for end in ("weight", "bias")[: 1 + bias]}
    for name, slot in mlp.slots().items():
        slot.store(p[name])
    x, out = torch.randn(6, 10), torch.empty(6, 10)
    work = Workspace(
        torch.zeros(6, 10), torch.empty(6, 10), torch.arange(6), META, Fresh(), torch.float32, num_heads=1, num_kv_heads=1,
        head_dim=2, up_size=13 * (1 + gated), intermediate=13)
    mlp(out, x, work)
    up = F.linear(x, p["up.weight"], p.get("up.bias"))
    inner = ACTS[kind](F.linear(x, p["gate.weight"], p.get("gate.bias"))) * up if gated else ACTS[kind](up)
    torch.testing.assert_close(out, F.linear(inner, p["down.weight"], p.get("down.bias")), rtol=1e-4, atol=1e-4)
