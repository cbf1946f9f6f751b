"""Linear layers: parts in any order give the stacked product, biases included."""

import itertools

import pytest
import torch

from octavo.layers.linear import Linear

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
