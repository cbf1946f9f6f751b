"""Weight formats: what goes in can be multiplied and looked up, whatever the storage type."""

from pathlib import Path

import pytest
import torch

from octavo import ops
from octavo.layers import weight as module
from octavo.layers.weight import DenseWeight, PackedWeight, Slot, Table, Vector, matrix, prefixed
from octavo.ops import fused_reference, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 3), (32, 8), (45, 17), (64, 40)])
def test_packed_weight_multiplies_and_gathers(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight, bias, x = torch.randn(shape), torch.randn(shape[0]), torch.randn(5, shape[1])
    packed = PackedWeight(*shape, dtype)
    packed.take(0, weight)
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
    table.take(0, weight)
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


def test_dense_weight_multiplies_as_packed_weight_does(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("skinny_linear", "skinny_gated", "tile_linear", "tile_gated", "lookup"):
        monkeypatch.setattr(ops, name, getattr(fused_reference, name))
    monkeypatch.setattr(ops, "gated_activation", reference.gated_activation)
    weight, bias, ids = torch.randn(24, 16), torch.randn(24), torch.tensor([0, 23, 7])
    dense, packed = DenseWeight(24, 16, torch.float32, "cpu:0"), matrix(24, 16, torch.float32, "cpu")
    assert isinstance(packed, PackedWeight)
    for part in (slice(8, 24), slice(0, 8)):  # in any order
        dense.take(part.start, weight[part])
        packed.take(part.start, weight[part])
    for tokens in (3, 100):
        x = torch.randn(tokens, 16)
        found = []
        for one in (dense, packed):
            out, gated, both = torch.empty(tokens, 24), torch.empty(tokens, 12), torch.empty(tokens, 24)
            one.apply(out, x, bias)
            one.apply_gated(gated, x, bias, "silu", both)
            found.append((out, gated))
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
    rows = torch.empty(3, 16)
    dense.gather(rows, ids)
    assert torch.equal(rows, weight[ids])


def test_only_a_gpu_without_the_tile_operators_does_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """What else goes wrong is not hidden: a library that lacks the kernel, an error of the device."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, dtype, device: empty(*shape, dtype=dtype))

    def has_tiles(error: Exception | None) -> bool:
        def run(*args: object) -> None:
            if error:
                raise error

        monkeypatch.setattr(ops, "tile_linear", run)
        return module._has_tiles.__wrapped__("cuda:0", torch.bfloat16)

    kernel = Path(module.__file__).parents[2] / "csrc" / "cuda" / "gemm_tile_sm90.cu"
    assert module.NO_TILES in kernel.read_text(encoding="utf-8")
    assert has_tiles(None) and not has_tiles(RuntimeError(f"tile_linear: {module.NO_TILES}, and a build"))
    for error in (NotImplementedError("no kernel for CUDA"), RuntimeError("CUDA error: an illegal memory access")):
        with pytest.raises(type(error), match=str(error)):
            has_tiles(error)


@pytest.mark.parametrize(("rows", "tokens", "product", "gated"), [
    (32, 1, "skinny_linear", "skinny_gated"), (32, 16, "skinny_linear", "skinny_gated"), (32, 17, "tile_linear", "tile_gated"),
    (32, 32, "tile_linear", "tile_gated"), (32, 33, None, None), (24, 17, "tile_linear", "tile_linear"),
])
def test_the_number_of_tokens_chooses_the_operator(
    monkeypatch: pytest.MonkeyPatch, rows: int, tokens: int, product: str | None, gated: str | None
) -> None:
    """24 rows are halves of 12, which the gated operator does not take: the product and the activation are two steps."""
    called: list[str] = []
    for name in ("skinny_linear", "skinny_gated", "tile_linear", "tile_gated"):
        def run(*args: object, name: str = name) -> None:
            called.append(name)
            getattr(fused_reference, name)(*args)
        monkeypatch.setattr(ops, name, run)
    monkeypatch.setattr(ops, "gated_activation", reference.gated_activation)
    weight, x = DenseWeight(rows, 16, torch.bfloat16, "cpu:0"), torch.randn(tokens, 16).bfloat16()
    weight.take(0, torch.randn(rows, 16))
    out, half, both = (torch.full((tokens, n), torch.nan, dtype=torch.bfloat16) for n in (rows, rows // 2, rows))
    weight.apply(out, x, None)
    assert called == ([product] if product else [])
    called.clear()
    weight.apply_gated(half, x, None, "silu", both)
    assert called[:1] == ([gated] if gated else [])
    exact = x.float() @ weight.value.float().T
    torch.testing.assert_close(out.float(), exact, rtol=0.02, atol=0.02)
    gate, up = exact.chunk(2, 1)
    torch.testing.assert_close(half.float(), torch.nn.functional.silu(gate) * up, rtol=0.05, atol=0.2)
