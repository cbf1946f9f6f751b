"""Weight formats: what goes in can be multiplied and looked up, whatever the storage type."""

import pytest
import torch

from octavo.layers.weight import PackedWeight, Slot, Table, Vector, prefixed

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (32, 8), (45, 17), (64, 40)])
def test_packed_weight_multiplies_and_gathers(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias, x = torch.randn(shape), torch.randn(shape[0]), torch.randn(5, shape[1])
    packed = PackedWeight(*shape, dtype)
    packed.fill(weight)
    stored = weight.to(dtype).float()
    out = torch.empty(5, shape[0])
    packed.apply(out, x, bias)
    torch.testing.assert_close(out, x @ stored.T + bias, rtol=1e-4, atol=1e-4)
    ids = torch.tensor([0, shape[0] - 1, shape[0] // 2])
    rows = torch.empty(3, shape[1])
    packed.gather(rows, ids)
    assert torch.equal(rows, stored[ids])


@pytest.mark.parametrize("dtype", DTYPES)
def test_table_looks_up(dtype: torch.dtype) -> None:
    weight, ids = torch.randn(11, 6), torch.tensor([10, 0, 3])
    table = Table(11, 6, dtype)
    table.fill(weight)
    out = torch.empty(3, 6)
    table.gather(out, ids)
    assert torch.equal(out, weight.to(dtype).float()[ids])


def test_what_is_stored_is_a_copy_in_float32() -> None:
    vector, given = Vector(4), torch.ones(4, dtype=torch.bfloat16)
    vector.slot().store(given)
    given.zero_()
    assert vector.value.dtype == torch.float32
    assert vector.value.tolist() == [1.0] * 4


def test_a_slice_of_a_vector_is_a_slot_of_its_own() -> None:
    vector = Vector(5)
    slot = vector.slot(1, 3)
    assert slot.shape == (3,)
    slot.store(torch.tensor([1.0, 2.0, 3.0]))
    assert vector.value.tolist() == [0.0, 1.0, 2.0, 3.0, 0.0]


def test_prefixed_keeps_the_slots() -> None:
    slot = Slot((1,), lambda tensor: None)
    assert prefixed("a.", {"b": slot}) == {"a.b": slot}
