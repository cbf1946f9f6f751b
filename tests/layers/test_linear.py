"""Linear layers: parts in any order give the stacked product, biases included."""

import itertools

import pytest
import torch

from octavo import ops
from octavo.layers.linear import Linear
from octavo.layers.norm import LayerNorm, RMSNorm
from octavo.layers.workspace import Fresh, Workspace
from octavo.ops import fused_reference, reference
from octavo.ops.attention import AttentionMeta

PARTS = {"q": 12, "k": 5, "v": 5}


@pytest.mark.parametrize("order", list(itertools.permutations(PARTS)))
@pytest.mark.parametrize("bias", [True, False])
def test_parts_arrive_in_any_order(order: tuple[str, ...], bias: bool) -> None:
    linear = Linear(7, PARTS, bias=bias, dtype=torch.float32)
    weights = {part: torch.randn(rows, 7) for part, rows in PARTS.items()}
    biases = {part: torch.randn(rows) for part, rows in PARTS.items()}
    slots = linear.slots()
    assert list(slots) == [f"{part}.{kind}" for part in PARTS for kind in (("weight", "bias") if bias else ("weight",))]
    for part in order:
        slots[f"{part}.weight"].store(weights[part])
        if bias:
            slots[f"{part}.bias"].store(biases[part])
    x, out = torch.randn(4, 7), torch.empty(4, 22)
    linear(out, x)
    wanted = torch.cat([x @ weights[part].T + bias * biases[part] for part in PARTS], dim=1)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)


def test_slots_have_the_shapes_of_a_checkpoint() -> None:
    slots = Linear(7, PARTS, bias=True, dtype=torch.bfloat16).slots()
    assert {name: slot.shape for name, slot in slots.items()} == {
        "q.weight": (12, 7), "q.bias": (12,), "k.weight": (5, 7), "k.bias": (5,), "v.weight": (5, 7), "v.bias": (5,)}


def test_parts_are_packed_when_the_last_one_comes() -> None:
    linear = Linear(3, {"gate": 4, "up": 4}, bias=False, dtype=torch.float16)
    slots = linear.slots()
    slots["gate.weight"].store(torch.ones(4, 3))
    assert linear.weight.packed.numel() == 0
    slots["up.weight"].store(torch.ones(4, 3))
    assert linear.weight.packed.shape == (1, 3, 32)
    assert linear.weight.packed.dtype == torch.float16
    assert not linear.weight._arrived, "the parts should be gone once they are packed"


def test_rows_of_a_wider_tensor_are_read_and_written() -> None:
    linear = Linear(6, {"o": 9}, bias=False, dtype=torch.float32)
    weight = torch.randn(9, 6)
    linear.slots()["o.weight"].store(weight)
    x, out = torch.randn(3, 10), torch.zeros(3, 12)
    linear(out[:, :9], x[:, :6])
    torch.testing.assert_close(out[:, :9], x[:, :6] @ weight.T, rtol=1e-5, atol=1e-5)
    assert not out[:, 9:].any()


@pytest.mark.parametrize("tokens", [1, 16, 17, 33])
@pytest.mark.parametrize("norm_kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("gated", [False, True])
def test_a_norm_before_the_product_gives_the_same_in_one_launch_or_two(
    monkeypatch: pytest.MonkeyPatch, tokens: int, norm_kind: type, gated: bool
) -> None:
    """bfloat16 in the layout of a GPU: few tokens and an RMS norm go to the fused operator, the rest to two."""
    launched = []
    for name in ("norm_linear", "norm_gated", "skinny_linear", "skinny_gated", "tile_linear", "tile_gated"):
        def run(*args: object, name: str = name) -> None:
            launched.append(name)
            getattr(fused_reference, name)(*args)
        monkeypatch.setattr(ops, name, run)
    for name in ("add_rms_norm", "add_layer_norm", "gated_activation"):
        monkeypatch.setattr(ops, name, getattr(reference, name))
    linear = Linear(16, {"gate": 8, "up": 8}, bias=True, dtype=torch.bfloat16, device="cpu:0")
    for slot in linear.slots().values():
        slot.store(torch.randn(slot.shape))
    norm = RMSNorm(16, 1e-5, 0.0) if norm_kind is RMSNorm else LayerNorm(16, 1e-5, bias=True)
    for slot in norm.slots().values():
        slot.store(torch.rand(slot.shape) + 0.5)
    empty = torch.empty(0, dtype=torch.int32)
    work = Workspace(
        torch.randn(tokens, 16).bfloat16(), torch.empty(tokens, 16, dtype=torch.bfloat16), torch.arange(tokens),
        AttentionMeta(empty, empty, empty, empty, empty.long(), 0, 0), Fresh(), torch.float32, num_heads=1, num_kv_heads=1,
        head_dim=4, up_size=16, intermediate=8)
    work.residual.normal_()
    state = work.residual + work.delta
    normed = torch.empty(tokens, 16)
    if norm_kind is RMSNorm:
        reference.rms_norm(normed, state, norm.weight, 1e-5, 0.0)
    else:
        reference.layer_norm(normed, state, norm.weight, norm.bias, 1e-5)
    product = normed @ linear.weight.value.float().T + linear.bias
    out = torch.empty(tokens, 8 if gated else 16, dtype=torch.bfloat16)
    if gated:
        linear.normed_gated(out, norm, work, "silu")
        wanted = torch.empty(tokens, 8)
        reference.gated_activation(wanted, product, "silu")
    else:
        linear.normed(out, norm, work)
        wanted = product
    torch.testing.assert_close(out.float(), wanted, rtol=0.05, atol=0.1)
    torch.testing.assert_close(work.residual, state)
    fused = tokens <= 16 and norm_kind is RMSNorm
    assert ("norm_gated" if gated else "norm_linear") in launched if fused else not {"norm_gated", "norm_linear"} & {*launched}
