"""The products of up to 128 rows on Hopper against float64, and what they promise by the bit. Tolerances: products.py."""

import math

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
    same_bits_in_a_graph,
    wrong_beyond_31_bits,
)

import octavo.ops as ops
from octavo.errors import ConfigError

try:
    ops.load_cuda()
except ConfigError as error:
    pytest.skip(str(error), allow_module_level=True)

TILE_ROWS = 128  # most_rows of csrc/cuda/gemm_tile_sm90.cu
ROWS = (1, 7, 8, 16, 17, 24, 31, 32, 33, 48, 63, 64, 65, 96, 100, 127, 128)
# K, N of layers of small and large models: K split over clusters of 8, 4 and 2, and not at all, one tile a block and several
MODEL_SHAPES = (
    (1024, 4096), (2048, 1024), (3072, 1024), (896, 1152), (4864, 896), (2048, 3072), (2048, 2048), (8192, 2048), (4096, 6144),
    (14336, 4096), (1024, 40000),
)
# No multiple of anything the kernel counts in: chunks of 64 columns, tiles of 64 and 128 rows
ODD_SHAPES = ((8, 1), (8, 17), (24, 6), (72, 33), (200, 100), (520, 1030), (1000, 257), (2056, 130), (4864, 898), (64, 4099),
              (136, 9000))
GATED_SHAPES = (
    (1024, 3072), (2048, 8192), (896, 4864), (1024, 512), (3072, 1000), (8, 8), (72, 40), (200, 1016), (1000, 264), (136, 20008),
)

here = torch.cuda.get_device_capability() == (9, 0)
hopper = pytest.mark.skipif(not here, reason="the kernels are for compute capability 9.0")


@hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [MODEL_SHAPES, ODD_SHAPES], ids=["model", "odd"])
def test_linear(shapes, dtype):
    found = []
    for k, n in shapes:
        w, bias = normal(k + n, n, k, dtype=dtype, scale=2 / math.sqrt(k)), normal(n, n)
        x = normal(7, TILE_ROWS, k, dtype=dtype, scale=3)
        for with_bias in (None, bias):
            expected, bound = product(x, w, with_bias)
            for m in ROWS:
                for out_dtype in (dtype, torch.float32):
                    out = poisoned(m, n, dtype=out_dtype)
                    ops.tile_linear(out, x[:m], w, with_bias)
                    found += problems(f"K {k} N {n} M {m} bias {with_bias is not None} {out_dtype}", out, expected[:m], bound[:m])
    assert not found, "\n".join(found[:40])


@hopper
@pytest.mark.parametrize("dtype", DTYPES)
def test_gated(dtype):
    found = []
    for j, (k, n) in enumerate(GATED_SHAPES):
        w, bias = normal(k + n, 2 * n, k, dtype=dtype, scale=1 / math.sqrt(k)), normal(n, 2 * n)
        x = normal(7, TILE_ROWS, k, dtype=dtype, scale=2)
        for i, kind in enumerate(KINDS):
            with_bias = bias if (i + j) % 2 else None
            y, bound = product(x, w, with_bias)
            expected, bound = gate(kind, *y.chunk(2, 1), *bound.chunk(2, 1))
            for m in ROWS:
                out = poisoned(m, n, dtype=dtype)
                ops.tile_gated(out, x[:m], w, with_bias, kind)
                found += problems(f"K {k} I {n} M {m} {kind} bias {with_bias is not None}", out, expected[:m], bound[:m])
    assert not found, "\n".join(found[:40])


@hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k", "n"), [(1024, 4096), (2048, 1024), (2048, 16384), (1000, 272), (14336, 512), (2048, 2048)])
def test_a_row_does_not_depend_on_the_others(k, n, dtype):
    """The same bits at every number of rows, at every place, and beside rows of NaN; gated or not, the sums are the same."""
    w, x = normal(1, n, k, dtype=dtype), normal(2, TILE_ROWS, k, dtype=dtype)
    calls = {
        "linear": lambda out, i: ops.tile_linear(out, x[i], w, None),
        "gated": lambda out, i: ops.tile_gated(out, x[i], w, None, "relu"),
    }
    found = []
    for name, call in calls.items():
        def run(rows, call=call, columns=n // 2 if name == "gated" else n):
            out = poisoned(len(rows), columns, dtype=torch.float32)
            call(out, rows)
            return out

        whole = run(torch.arange(TILE_ROWS))
        found += [f"{name} M {m}" for m in range(1, TILE_ROWS) if not torch.equal(run(torch.arange(m)), whole[:m])]
        for m in (1, 5, 29, 64, 128):
            order = torch.randperm(TILE_ROWS, generator=torch.Generator().manual_seed(m))[:m]
            if not torch.equal(run(order), whole[order]):
                found.append(f"{name} shuffled {m}")
        clean = x.clone()
        for m in (2, 32, 40, 64, 90, 128):
            x[1:m] = math.nan
            if not torch.equal(run(torch.arange(m))[:1], whole[:1]):
                found.append(f"{name} beside NaN {m}")
            x.copy_(clean)
        if name == "linear":
            gate_sums, value_sums = whole.chunk(2, 1)
        elif not torch.equal(whole, gate_sums.clamp(min=0) * value_sums):
            found.append("gated is not the gate of the linear product")
    assert not found, found


@hopper
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows(dtype):
    x, w = normal(1, TILE_ROWS, 4096, dtype=dtype), normal(2, 1000, 2048, dtype=dtype)
    for m in (1, 5, 40, 128):
        plain, wide = poisoned(m, 1000, dtype=dtype), poisoned(m, 1031, dtype=dtype)
        ops.tile_linear(plain, x[:m, 1024:3072].contiguous(), w, None)
        ops.tile_linear(wide[:, 3:1003], x[:m, 1024:3072], w, None)
        assert torch.equal(wide[:, 3:1003], plain)
        assert wide[:, :3].isnan().all() and wide[:, 1003:].isnan().all()


@hopper
@pytest.mark.parametrize("rows", [17, 32, 50, 128])
def test_chain_in_a_graph(rows):
    hidden, inner, dtype = 1024, 3072, torch.bfloat16
    weights = chain_weights(hidden, inner, 12, gain=2.0)
    a, b = torch.zeros(rows, 2 * hidden, dtype=dtype, device="cuda"), torch.zeros(rows, inner, dtype=dtype, device="cuda")
    delta = torch.zeros(rows, hidden, dtype=dtype, device="cuda")

    def chain(pause):
        for qkv, o, up, down in weights:
            ops.tile_linear(a, delta, qkv, None)
            pause()
            ops.tile_linear(delta, a[:, hidden:], o, None)
            pause()
            ops.tile_gated(b, delta, up, None, "silu")
            pause()
            ops.tile_linear(delta, b, down, None)
            pause()
            delta.clamp_(-4, 4)

    def start(seed):
        delta.copy_(normal(seed + 1, rows, hidden, dtype=dtype, scale=3))

    same_bits_in_a_graph(chain, start, (delta,))
    assert delta.isfinite().all() and delta.abs().max() > 0


@hopper
@pytest.mark.skipif(torch.cuda.mem_get_info()[0] < 16 << 30, reason="needs 13 GB of the GPU's memory")
@pytest.mark.parametrize("rows", [17, 128])
def test_more_than_31_bits_of_elements(rows):
    found = wrong_beyond_31_bits(lambda out, x, w: ops.tile_linear(out, x, w, None), rows)
    assert not found, found


@hopper
def test_empty():
    w = normal(1, 48, 64, dtype=torch.bfloat16)
    ops.tile_linear(poisoned(0, 48, dtype=torch.bfloat16), normal(0, 0, 64, dtype=torch.bfloat16), w, None)
    torch.cuda.synchronize()


def linear(**changed):
    x, w = normal(0, 4, 64, dtype=torch.bfloat16), normal(1, 48, 64, dtype=torch.bfloat16)
    out = poisoned(4, 48, dtype=torch.bfloat16)
    ops.tile_linear(*{"out": out, "x": x, "w": w, "bias": None, **changed}.values())


@hopper
def test_contract():
    linear()
    with pytest.raises(RuntimeError, match="at most 128 rows"):
        linear(out=poisoned(129, 48, dtype=torch.bfloat16), x=normal(0, 129, 64, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="multiple of 8"):
        linear(x=normal(0, 4, 60, dtype=torch.bfloat16), w=normal(0, 48, 60, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="x"):
        linear(x=normal(0, 4, 64), w=normal(1, 48, 64))
    with pytest.raises(RuntimeError, match="one type"):
        linear(w=normal(1, 48, 64, dtype=torch.float16))
    with pytest.raises(RuntimeError, match="multiples of 16 bytes"):
        linear(x=normal(0, 4, 68, dtype=torch.bfloat16)[:, 4:])
    with pytest.raises(RuntimeError, match="must not overlap"):
        linear(x=normal(0, 1, 64, dtype=torch.bfloat16).expand(4, 64))
    with pytest.raises(RuntimeError, match="bias"):
        linear(bias=normal(0, 47))
    with pytest.raises(RuntimeError, match="weight"):
        linear(w=normal(1, 48, 72, dtype=torch.bfloat16))
    x, w, out = (normal(0, rows, 64, dtype=torch.bfloat16) for rows in (4, 40, 4))
    with pytest.raises(RuntimeError, match="twice"):
        ops.tile_gated(out, x, w, None, "silu")
    with pytest.raises(RuntimeError, match="multiple of 8"):
        ops.tile_gated(out[:, :20], x, w, None, "silu")
    with pytest.raises(RuntimeError, match="kind must be silu"):
        ops.tile_gated(out[:, :24], x, normal(0, 48, 64, dtype=torch.bfloat16), None, "swish")


@pytest.mark.skipif(here, reason="this device has the kernels")
def test_other_devices_are_refused():
    with pytest.raises(RuntimeError, match="compute capability"):
        linear()
