"""The products of few rows against float64, and what they promise by the bit. Tolerances: products.py."""

import math
from functools import partial

import pytest
import torch
from products import (
    DTYPES,
    KINDS,
    chain_weights,
    gate,
    normal,
    poisoned,
    problems,
    product,
    rounding,
    same_bits_in_a_graph,
    wrong_beyond_31_bits,
)

import octavo.ops as ops
from octavo.errors import ConfigError
from octavo.ops import reference
from octavo.ops.fused import SKINNY_SCRATCH

try:
    ops.load_cuda()
except ConfigError as error:
    pytest.skip(str(error), allow_module_level=True)

ROWS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64)
# K, N: layers of small and large models, then sizes that are no multiple of anything the kernels count in
MODEL_SHAPES = (
    (1024, 4096), (2048, 1024), (1024, 6144), (3072, 1024), (2048, 3072), (2048, 2048), (8192, 2048), (896, 1152),
    (4096, 6144), (14336, 4096), (2048, 32000),
)
ODD_SHAPES = ((8, 1), (8, 17), (24, 6), (72, 33), (200, 100), (520, 1030), (1000, 257), (2056, 130), (4864, 898), (64, 4099))


@pytest.fixture(scope="module")
def scratch():
    return torch.zeros(SKINNY_SCRATCH, device="cuda")


def test_scratch_size_is_that_of_the_kernels(scratch):
    x, w = normal(0, 1, 64, dtype=torch.bfloat16), normal(1, 16, 64, dtype=torch.bfloat16)
    out, total, nw = poisoned(1, 16, dtype=torch.bfloat16), poisoned(1, 64, dtype=torch.float32), torch.ones(64, device="cuda")
    ops.norm_linear(out, total, normal(2, 1, 64), x, nw, 1e-6, 0.0, w, None, scratch)
    with pytest.raises(RuntimeError, match=f"scratch needs {SKINNY_SCRATCH} elements"):
        ops.norm_linear(out, total, normal(2, 1, 64), x, nw, 1e-6, 0.0, w, None, scratch[:-1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [MODEL_SHAPES, ODD_SHAPES], ids=["model", "odd"])
def test_linear(shapes, dtype, scratch):
    found = []
    for k, n in shapes:
        w, bias = normal(k + n, n, k, dtype=dtype, scale=2 / math.sqrt(k)), normal(n, n)
        x = normal(7, 64, k, dtype=dtype, scale=3)
        for with_bias in (None, bias):
            expected, bound = product(x, w, with_bias)
            for m in ROWS:
                for out_dtype in (dtype, torch.float32):
                    out = poisoned(m, n, dtype=out_dtype)
                    ops.skinny_linear(out, x[:m], w, with_bias, scratch)
                    found += problems(f"K {k} N {n} M {m} bias {with_bias is not None} {out_dtype}", out, expected[:m], bound[:m])
    assert not found, "\n".join(found[:40])
    assert not scratch.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [((1024, 3072), (2048, 8192), (896, 4864)), ODD_SHAPES], ids=["model", "odd"])
def test_gated(shapes, dtype, scratch):
    found = []
    for j, (k, n) in enumerate(shapes):
        w, bias = normal(k + n, 2 * n, k, dtype=dtype, scale=1 / math.sqrt(k)), normal(n, 2 * n)
        x = normal(7, 64, k, dtype=dtype, scale=2)
        for i, kind in enumerate(KINDS):
            with_bias = bias if (i + j) % 2 else None
            y, bound = product(x, w, with_bias)
            expected, bound = gate(kind, *y.chunk(2, 1), *bound.chunk(2, 1))
            for m in ROWS:
                out = poisoned(m, n, dtype=dtype)
                ops.skinny_gated(out, x[:m], w, with_bias, kind, scratch)
                found += problems(f"K {k} I {n} M {m} {kind} bias {with_bias is not None}", out, expected[:m], bound[:m])
    assert not found, "\n".join(found[:40])


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_before_the_product(dtype, scratch):
    found = []
    shapes = ((1024, 4096), (2048, 3072), (4096, 512), (8192, 256), (896, 1152), (8, 3), (72, 33), (1000, 258), (16384, 64))
    for k, n in (*shapes, (1024, 8192), (1000, 9001)):  # the last two: several tiles in a block
        w, bias = normal(k + n, 2 * n, k, dtype=dtype, scale=1 / math.sqrt(k)), normal(n, 2 * n)
        residual, delta = normal(3, 64, k, scale=4), normal(4, 64, k, dtype=dtype, scale=2)
        nw = normal(5, k, scale=0.1) + 0.5
        want_total = residual + delta.float()
        normed = torch.empty(64, k, device="cuda")
        reference.rms_norm(normed, want_total, nw, 1e-5, 0.5)
        normed = normed.to(dtype)
        y, bound = product(normed, w, bias)
        # Two float32 norms may round an element of the row to neighbouring numbers: three such elements at their worst.
        bound = bound + 3 * rounding(dtype) * float(normed.abs().max()) * float(w.abs().max())
        expected, gated_bound = gate("silu", *y.chunk(2, 1), *bound.chunk(2, 1))
        for m in ROWS:
            arguments = (residual[:m], delta[:m], nw, 1e-5, 0.5, w, bias)
            total, out = poisoned(m, k, dtype=torch.float32), poisoned(m, 2 * n, dtype=dtype)
            ops.norm_linear(out, total, *arguments, scratch)
            found += problems(f"norm_linear K {k} N {2 * n} M {m}", out, y[:m], bound[:m])
            gated_total, gated = poisoned(m, k, dtype=torch.float32), poisoned(m, n, dtype=dtype)
            ops.norm_gated(gated, gated_total, *arguments, "silu", scratch)
            found += problems(f"norm_gated K {k} I {n} M {m}", gated, expected[:m], gated_bound[:m])
            for name, t in (("norm_linear", total), ("norm_gated", gated_total)):
                if not torch.equal(t, want_total[:m]):
                    found.append(f"{name} K {k} M {m}: total is wrong")
    assert not found, "\n".join(found[:40])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(1024, 4096), (2048, 1024), (2048, 8192), (3072, 1024), (1000, 258), (14336, 512)])
def test_a_row_does_not_depend_on_the_others(k, n, dtype, scratch):
    """The same bits alone, at every number of rows, at every place, and beside rows of NaN."""
    w, x = normal(1, n, k, dtype=dtype), normal(2, 64, k, dtype=dtype)
    residual, nw = normal(3, 64, k), normal(4, k)
    new = partial(torch.empty, device="cuda")
    calls = {
        "linear": lambda out, i: ops.skinny_linear(out, x[i], w, None, scratch),
        "gated": lambda out, i: ops.skinny_gated(out, x[i], w, None, "silu", scratch),
        "norm": lambda out, i: ops.norm_linear(out, new(len(i), k), residual[i], x[i], nw, 1e-6, 0.0, w, None, scratch),
    }
    found = []
    for name, call in calls.items():
        def run(rows, call=call, columns=n // 2 if name == "gated" else n):
            out = poisoned(len(rows), columns, dtype=dtype)
            call(out, rows)
            return out

        whole = run(torch.arange(64))
        found += [f"{name} M {m}" for m in range(1, 65) if not torch.equal(run(torch.arange(m)), whole[:m])]
        found += [f"{name} row {r} alone" for r in range(64) if not torch.equal(run(torch.tensor([r])), whole[r : r + 1])]
        for m in (5, 16, 29, 64):
            order = torch.randperm(64, generator=torch.Generator().manual_seed(m))[:m]
            if not torch.equal(run(order), whole[order]):
                found.append(f"{name} shuffled {m}")
        clean = x.clone()
        for m in (2, 8, 12, 32, 64):
            x[1:m] = math.nan
            if not torch.equal(run(torch.arange(m))[:1], whole[:1]):
                found.append(f"{name} beside NaN {m}")
            x.copy_(clean)
    assert not found, found


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(dtype, scratch):
    x, w = normal(1, 64, 4096, dtype=dtype), normal(2, 1000, 2048, dtype=dtype)
    for m in (1, 5, 16, 40):
        plain, wide = poisoned(m, 1000, dtype=dtype), poisoned(m, 1031, dtype=dtype)
        ops.skinny_linear(plain, x[:m, 1024:3072].contiguous(), w, None, scratch)
        ops.skinny_linear(wide[:, 3:1003], x[:m, 1024:3072], w, None, scratch)
        assert torch.equal(wide[:, 3:1003], plain)
        assert wide[:, :3].isnan().all() and wide[:, 1003:].isnan().all()


@pytest.mark.parametrize("rows", [1, 4, 12, 40])
def test_chain_in_a_graph(rows, scratch):
    hidden, inner, dtype = 1024, 3072, torch.bfloat16
    weights = chain_weights(hidden, inner, 12)
    nw = torch.ones(hidden, device="cuda")
    totals = [torch.zeros(rows, hidden, device="cuda") for _ in range(2)]
    a, b = torch.zeros(rows, 2 * hidden, dtype=dtype, device="cuda"), torch.zeros(rows, inner, dtype=dtype, device="cuda")
    delta = torch.zeros(rows, hidden, dtype=dtype, device="cuda")

    def chain(pause):
        for qkv, o, up, down in weights:
            ops.norm_linear(a, totals[1], totals[0], delta, nw, 1e-6, 0.0, qkv, None, scratch)
            pause()
            ops.skinny_linear(delta, a[:, hidden:], o, None, scratch)
            pause()
            ops.norm_gated(b, totals[0], totals[1], delta, nw, 1e-6, 0.0, up, None, "silu", scratch)
            pause()
            ops.skinny_linear(delta, b, down, None, scratch)
            pause()

    def start(seed):
        totals[0].copy_(normal(seed, rows, hidden, scale=3))
        delta.copy_(normal(seed + 1, rows, hidden, dtype=dtype))

    same_bits_in_a_graph(chain, start, (delta, totals[0]))
    assert delta.isfinite().all() and delta.abs().max() > 0.1


@pytest.mark.skipif(torch.cuda.mem_get_info()[0] < 16 << 30, reason="needs 13 GB of the GPU's memory")
@pytest.mark.parametrize("rows", [2, 64])
def test_more_than_31_bits_of_elements(rows, scratch):
    found = wrong_beyond_31_bits(lambda out, x, w: ops.skinny_linear(out, x, w, None, scratch), rows)
    assert not found, found


def test_empty(scratch):
    w = normal(1, 48, 64, dtype=torch.bfloat16)
    ops.skinny_linear(poisoned(0, 48, dtype=torch.bfloat16), normal(0, 0, 64, dtype=torch.bfloat16), w, None, scratch)
    torch.cuda.synchronize()


def test_contract(scratch):
    x, w = normal(0, 4, 64, dtype=torch.bfloat16), normal(1, 48, 64, dtype=torch.bfloat16)
    out = poisoned(4, 48, dtype=torch.bfloat16)

    def linear(**changed):
        ops.skinny_linear(*{"out": out, "x": x, "w": w, "bias": None, "scratch": scratch, **changed}.values())

    linear()
    with pytest.raises(RuntimeError, match="at most 64 rows"):
        linear(out=poisoned(65, 48, dtype=torch.bfloat16), x=normal(0, 65, 64, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="multiple of 8"):
        linear(x=normal(0, 4, 60, dtype=torch.bfloat16), w=normal(0, 48, 60, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="float32 has no kernel"):
        linear(x=x.float(), w=w.float(), out=out.float())
    with pytest.raises(RuntimeError, match="one type"):
        linear(w=w.half())
    with pytest.raises(RuntimeError, match="multiples of 16 bytes"):
        linear(x=normal(0, 4, 68, dtype=torch.bfloat16)[:, 4:])
    with pytest.raises(RuntimeError, match="bias"):
        linear(bias=normal(0, 47))
    with pytest.raises(RuntimeError, match="weight"):
        linear(w=normal(1, 48, 72, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="twice"):
        ops.skinny_gated(out, x, w, None, "silu", scratch)
    with pytest.raises(RuntimeError, match="kind must be silu"):
        ops.skinny_gated(out[:, :24].contiguous(), x, w, None, "swish", scratch)
    residual, nw = normal(3, 4, 64), torch.ones(64, device="cuda")
    with pytest.raises(RuntimeError, match="another tensor than residual"):
        ops.norm_linear(out, residual, residual, x, nw, 1e-6, 0.0, w, None, scratch)
