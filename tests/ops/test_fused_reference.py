"""The operators that only GPUs have, against formulas of their own in float64; 8-bit floats against a table of all of them."""

import bisect
import math
from itertools import pairwise

import pytest
import torch

from octavo.ops import fused_reference as fused

HALVES = [torch.float32, torch.bfloat16, torch.float16]
SCRATCH = torch.empty(0)
# The magnitudes of e4m3 in order: seven steps below the smallest normal number, then eight in each of 16 octaves but the last.
E4M3 = [m / 8 * 2.0**-6 for m in range(8)] + [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)][:-1]


def draw(*shape, seed=0, scale=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


def close(found, exact, dtype=torch.float32):
    """``found`` in its type is the rounding of ``exact`` float64, but for float32 arithmetic before it."""
    assert found.dtype == dtype
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 2.0**-8 + 1e-5, torch.float16: 2.0**-11 + 1e-5}[dtype]
    torch.testing.assert_close(found.double(), exact.double(), rtol=tolerance, atol=1e-5)


def nearest(x):
    """x rounded to the nearest magnitude of the table; a tie goes to the even place, which has an even last bit."""
    place = bisect.bisect_left(E4M3, abs(x))
    if place == len(E4M3):
        return math.copysign(E4M3[-1], x)
    middle = (E4M3[place - 1] + E4M3[place]) / 2 if place else -1.0
    if abs(x) < middle or (abs(x) == middle and place % 2):
        place -= 1
    return math.copysign(E4M3[place], x)


def check_fp8(out, scale, exact):
    """``out`` and ``scale`` are ``exact`` float64 in 8 bits, with the scale of a row that makes its largest value 448."""
    assert out.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32
    most = exact.abs().amax(-1)
    torch.testing.assert_close(scale.double(), torch.where(most > 0, most / 448, 1.0), rtol=1e-5, atol=0)
    shrunk = exact / scale.double().unsqueeze(-1)
    for found, wanted in zip(out.float().flatten().tolist(), shrunk.flatten().tolist(), strict=True):
        # float32 arithmetic may carry a value over the middle between two neighbours
        assert found in {nearest(wanted * (1 + e)) for e in (-1e-5, 0.0, 1e-5)} | {nearest(wanted + e) for e in (-1e-5, 1e-5)}


def outputs(*shape):
    return torch.empty(shape, dtype=torch.float8_e4m3fn), torch.full(shape[:1], math.nan)


def rms(x, weight, eps, offset):
    x = x.double()
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) * (weight.double() + offset)


def layer(x, weight, bias, eps):
    x = x.double()
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    y = (x - mean) / torch.sqrt(((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1] + eps) * weight.double()
    return y if bias is None else y + bias.double()


def act(x, kind):
    x = x.double()
    return {
        "silu": lambda: x / (1 + torch.exp(-x)),
        "gelu": lambda: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
        "gelu_tanh": lambda: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
        "relu": lambda: torch.clamp(x, min=0),
    }[kind]()


# 8-bit outputs


def test_the_table_is_the_type():
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert codes.tolist() == E4M3 and max(E4M3) == 448


def test_quantised_rows_are_rounded_to_the_nearest_and_ties_to_even():
    """A row whose largest magnitude is 448 has scale 1, so that what is rounded is what is written here."""
    middles = [(a + b) / 2 for a, b in pairwise(E4M3)]
    near = [m * (1 + e) for m in middles for e in (-1e-6, 1e-6)]
    values = torch.tensor([448.0, *E4M3, *middles, *near])
    for row in (values, -values):
        out, scale = outputs(1, len(row))
        fused.quantize(out, scale, row.unsqueeze(0))
        assert scale.tolist() == [1.0]
        assert out.float()[0].tolist() == [nearest(x) for x in row.tolist()]


def test_the_scale_of_a_row_is_its_own_and_zeros_have_one():
    y = torch.tensor([[0.0, 0.0], [0.0, -1e-3], [3.0, 1e30], [896.0, 448.0]])
    out, scale = outputs(4, 2)
    fused.quantize(out, scale, y)
    torch.testing.assert_close(scale, torch.tensor([1.0, 1e-3 / 448, 1e30 / 448, 2.0]))
    assert out.float().tolist() == [[0, 0], [0, -448], [0, 448], [448, 224]]


@pytest.mark.parametrize("dtype", HALVES)
def test_norms_in_8_bits(dtype):
    x, weight, bias = draw(5, 40, scale=3.0, dtype=dtype), draw(40, seed=1), draw(40, seed=2)
    out, scale = outputs(5, 40)
    fused.rms_norm_fp8(out, scale, x, weight, 1e-6, 1.0)
    check_fp8(out, scale, rms(x, weight, 1e-6, 1.0))
    for b in (bias, None):
        out, scale = outputs(5, 40)
        fused.layer_norm_fp8(out, scale, x, weight, b, 1e-5)
        check_fp8(out, scale, layer(x, weight, b, 1e-5))


@pytest.mark.parametrize("dtype", HALVES)
def test_add_and_norm_in_8_bits(dtype):
    x, residual, weight = draw(5, 40, dtype=dtype), draw(5, 40, seed=1, dtype=dtype), draw(40, seed=2)
    total = (residual.double() + x.double()).to(dtype)
    out, scale = outputs(5, 40)
    fused.add_rms_norm_fp8(out, scale, residual, x, weight, 1e-6, 0.0)
    assert torch.equal(residual, total)
    check_fp8(out, scale, rms(total, weight, 1e-6, 0.0))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations_in_8_bits(kind, dtype):
    x = draw(4, 48, scale=2.0, dtype=dtype)
    out, scale = outputs(4, 24)
    fused.gated_activation_fp8(out, scale, x, kind)
    check_fp8(out, scale, act(x[:, :24], kind) * x[:, 24:].double())
    out, scale = outputs(4, 48)
    fused.activation_fp8(out, scale, x, kind)
    check_fp8(out, scale, act(x, kind))


# Tokens, heads and the cache


@pytest.mark.parametrize("dtype", HALVES)
def test_lookup_gives_zeros_for_padding(dtype):
    table, ids = draw(9, 6, dtype=dtype), torch.tensor([0, 8, -1, 9, 3, 10**9])
    out = torch.full((6, 6), math.nan, dtype=dtype)
    fused.lookup(out, ids, table)
    assert out.tolist() == [table[i].tolist() if 0 <= i < 9 else [0.0] * 6 for i in ids.tolist()]


def rotated(x, position, cos_sin, interleaved):
    """One head in float64, pair by pair, as a complex number times another."""
    y, half = x.double().clone(), cos_sin.shape[1] // 2
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        turned = complex(x[a], x[b]) * complex(cos_sin[position, i], cos_sin[position, half + i])
        y[a], y[b] = turned.real, turned.imag
    return y


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("normed", "turned"), [(True, True), (True, False), (False, True), (False, False)])
def test_rotate_and_cache(interleaved, normed, turned, dtype):
    tokens, heads, kv_heads, size, block_size = 4, 4, 2, 8, 3
    wide = draw(tokens, heads + 2 * kv_heads, size, dtype=dtype)  # q, k and v are views of one product
    before = wide.clone()
    q, k, v = torch.split(wide, [heads, kv_heads, kv_heads], dim=1)
    caches = [torch.full((3, block_size, kv_heads, size), 7.0, dtype=dtype) for _ in range(2)]
    slots, positions = torch.tensor([7, 0, -1, 2]), torch.tensor([3, 0, 1, 2])
    cos_sin = draw(4, 6, seed=3)  # of the 8 dims of a head, 6 turn
    weights = [draw(size, seed=4), draw(size, seed=5)] if normed else [None, None]
    fused.rotate_and_cache(q, k, v, *caches, slots, positions, cos_sin if turned else None, interleaved, *weights, 1e-6, 1.0)

    def exact(x, weight):
        x = rms(x, weight, 1e-6, 1.0) if normed else x.double()
        if not turned:
            return x
        return torch.stack([torch.stack([rotated(h, p, cos_sin, interleaved) for h in x[t]]) for t, p in enumerate(positions)])

    old_q, old_k, old_v = torch.split(before, [heads, kv_heads, kv_heads], dim=1)
    close(q, exact(old_q, weights[0]), dtype)
    assert torch.equal(v, old_v)
    for cache, values in zip(caches, (exact(old_k, weights[1]), old_v.double()), strict=True):
        written = cache.view(-1, kv_heads, size)
        close(written[[7, 0, 2]], values[[0, 1, 3]], dtype)
        assert (written[[1, 3, 4, 5, 6, 8]] == 7.0).all()  # token 2 has no slot


def test_a_cache_of_8_bits_is_divided_by_its_scale():
    q, k, v = draw(2, 1, 4), draw(2, 1, 4, seed=1, scale=900.0), draw(2, 1, 4, seed=2)
    caches = [torch.zeros(1, 2, 1, 4, dtype=torch.float8_e4m3fn) for _ in range(2)]
    nothing = (None, False, None, None, 0.0, 0.0)
    fused.rotate_and_cache(q, k, v, *caches, torch.tensor([1, 0]), torch.tensor([0, 1]), *nothing, k_scale=0.5, v_scale=0.25)
    for cache, values, scale in ((caches[0], k, 0.5), (caches[1], v, 0.25)):
        found = cache.float().view(2, 4)[[1, 0]]
        assert found.tolist() == [[nearest(x / scale) for x in row] for row in values.view(2, 4).tolist()]
    assert (caches[0].float().abs() == 448).any()  # what is too large is the largest, not a NaN


# Few rows


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("biased", [False, True])
def test_skinny_products(biased, dtype):
    x, weight = draw(3, 40, dtype=dtype), draw(24, 40, seed=1, scale=0.2, dtype=dtype)
    bias = draw(24, seed=2) if biased else None
    exact = torch.einsum("rk,nk->rn", x.double(), weight.double()) + (0 if bias is None else bias.double())
    for store in (dtype, torch.float32):
        out = torch.full((3, 24), math.nan, dtype=store)
        fused.skinny_linear(out, x, weight, bias, SCRATCH)
        close(out, exact, store)
    for kind in ("silu", "gelu", "gelu_tanh"):
        out = torch.full((3, 12), math.nan, dtype=dtype)
        fused.skinny_gated(out, x, weight, bias, kind, SCRATCH)
        close(out, act(exact[:, :12], kind) * exact[:, 12:], dtype)  # rounded once, at the end


@pytest.mark.parametrize("dtype", HALVES)
def test_tile_products_are_those_of_few_rows(dtype):
    x, weight, bias = draw(50, 40, dtype=dtype), draw(32, 40, seed=1, scale=0.2, dtype=dtype), draw(32, seed=2)
    skinny, tile = torch.empty(50, 32, dtype=dtype), torch.full((50, 32), math.nan, dtype=dtype)
    fused.skinny_linear(skinny, x, weight, bias, SCRATCH)
    fused.tile_linear(tile, x, weight, bias)
    assert torch.equal(tile, skinny)
    skinny, tile = torch.empty(50, 16, dtype=dtype), torch.full((50, 16), math.nan, dtype=dtype)
    fused.skinny_gated(skinny, x, weight, bias, "gelu", SCRATCH)
    fused.tile_gated(tile, x, weight, bias, "gelu")
    assert torch.equal(tile, skinny)


@pytest.mark.parametrize("dtype", HALVES)
def test_norms_before_skinny_products(dtype):
    residual, delta = draw(3, 40), draw(3, 40, seed=1, dtype=dtype)
    norm, weight, bias = draw(40, seed=2), draw(24, 40, seed=3, scale=0.2, dtype=dtype), draw(24, seed=4)
    kept = residual.clone()
    added = residual + delta.float()  # one float32 addition
    normed = rms(added, norm, 1e-6, 1.0).to(dtype)
    exact = torch.einsum("rk,nk->rn", normed.double(), weight.double()) + bias.double()
    total, out = torch.empty(3, 40), torch.empty(3, 24, dtype=dtype)
    fused.norm_linear(out, total, residual, delta, norm, 1e-6, 1.0, weight, bias, SCRATCH)
    assert torch.equal(total, added) and torch.equal(residual, kept)
    # a normed value that lies at the middle of two of its type may be rounded to the other one
    loose = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(out.double(), exact, rtol=loose, atol=loose)
    total, out = torch.empty(3, 40), torch.empty(3, 12, dtype=dtype)
    fused.norm_gated(out, total, residual, delta, norm, 1e-6, 1.0, weight, bias, "silu", SCRATCH)
    assert torch.equal(total, added) and torch.equal(residual, kept)
    torch.testing.assert_close(out.double(), act(exact[:, :12], "silu") * exact[:, 12:], rtol=loose, atol=2 * loose)


# Steps; begin_step is tested with what is packed for it, in tests/worker/test_staging.py


def test_tokens_are_counted_where_there_is_a_slot_and_a_token():
    counts = torch.ones(3, 5, dtype=torch.int32)
    slots, tokens = [2, 0, 2, -1, 1, 2], [4, 0, 4, 3, -1, 1]
    fused.count_tokens(counts, torch.tensor(slots, dtype=torch.int32), torch.tensor(tokens, dtype=torch.int32))
    expected = [[1] * 5 for _ in range(3)]
    for slot, token in zip(slots, tokens, strict=True):
        if slot >= 0 and token >= 0:
            expected[slot][token] += 1
    assert counts.tolist() == expected


def test_the_end_of_a_step_hands_tokens_to_rows_and_to_the_host():
    def ints(*values):
        return torch.tensor(values, dtype=torch.int32)

    last, results = ints(90, 91, 92, 93, 94), torch.full((4, 5), 7, dtype=torch.int32)
    fused.end_step(ints(11, -1, 13, 14), ints(3, 1, -1, 0), last, results, ints(2))
    assert last.tolist() == [14, 0, 92, 11, 94]  # 0 where none could be sampled; a row that the host continues keeps its own
    assert results.tolist() == [[7] * 5, [7] * 5, [11, -1, 13, 14, 7], [7] * 5]


def test_a_plan_of_the_work_changes_nothing():
    work = torch.full((64,), 7, dtype=torch.int32)
    lists = torch.tensor([0, 1], dtype=torch.int32)
    fused.attention_plan(work, lists, lists[1:], 4, 2, 8, 0, 1, 3)
    assert (work == 7).all()
