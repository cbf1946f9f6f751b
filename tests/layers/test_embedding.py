"""Both ends of a network: lookups, learned positions, projections, and the head in all its forms."""

import pytest
import torch

from octavo.layers.embedding import Embedding, Head, LearnedPositions, Project, Scale
from octavo.layers.weight import PackedWeight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_are_looked_up_and_padding_is_dropped(tied: bool, dtype: torch.dtype) -> None:
    embedding, weight = Embedding(40, 64, 6, tied=tied, dtype=dtype), torch.randn(64, 6)
    slot = embedding.slots()["weight"]
    assert slot.shape == (64, 6)
    slot.store(weight)
    ids = torch.tensor([0, 39, 33, 33])
    found = torch.empty(4, 6)
    embedding(found, ids)
    assert torch.equal(found, weight.to(dtype).float()[ids])
    assert isinstance(embedding.table, PackedWeight) == tied
    stored = embedding.table.packed if isinstance(embedding.table, PackedWeight) else embedding.table.value
    assert stored.numel() == (64 if tied else 40) * 6  # 40 rows, in panels of 32


def test_steps_after_the_lookup() -> None:
    x, positions = torch.randn(3, 4), torch.tensor([0, 5, 2])
    assert torch.equal(Scale(2.5)(x.clone(), positions), x * 2.5)
    learned, table = LearnedPositions(9, 4, 2), torch.randn(9, 4)
    learned.slots()["positions.weight"].store(table)
    assert torch.equal(learned(x.clone(), positions), x + table[positions + 2])
    project, weight = Project("project_in", 4, 7, torch.float32), torch.randn(7, 4)
    project.slots()["project_in.weight"].store(weight)
    torch.testing.assert_close(project(x, positions), x @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.5, 0.0), (1.0, 2.0), (0.5, 2.0)])
def test_the_head(bias: bool, scale: float, softcap: float) -> None:
    head = Head(None, vocab_size=40, rows=48, columns=6, bias=bias, scale=scale, softcap=softcap, dtype=torch.float32)
    weight, shift, x = torch.randn(48, 6), torch.randn(48), torch.randn(3, 6)
    slots = head.slots()
    assert {name: slot.shape for name, slot in slots.items()} == {
        "head.weight": (48, 6), **({"head.bias": (48,)} if bias else {})}
    slots["head.weight"].store(weight)
    if bias:
        slots["head.bias"].store(shift)
    wanted = ((x @ weight.T + bias * shift) * scale)[:, :40]
    if softcap:
        wanted = softcap * torch.tanh(wanted / softcap)
    logits = torch.empty(3, 40)
    head(logits, x)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


def test_a_tied_head_stores_nothing_of_its_own() -> None:
    embedding, weight = Embedding(40, 40, 6, tied=True, dtype=torch.float32), torch.randn(40, 6)
    assert isinstance(embedding.table, PackedWeight)
    head = Head(
        embedding.table, vocab_size=40, rows=40, columns=6, bias=False, scale=1.0, softcap=0.0, dtype=torch.float32)
    assert head.slots() == {}
    embedding.slots()["weight"].store(weight)
    x, logits = torch.randn(2, 6), torch.empty(2, 40)
    head(logits, x)
    torch.testing.assert_close(logits, x @ weight.T, rtol=1e-5, atol=1e-5)
