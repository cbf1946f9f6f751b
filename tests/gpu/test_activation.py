"""Activations and embedding lookup on a GPU against float64: all types and kinds, odd widths, strided and poisoned tensors."""

import itertools
import math

import pytest
import torch

from octavo import ops

ACTS = (torch.float32, torch.bfloat16, torch.float16)
KINDS = ("silu", "gelu", "gelu_tanh", "relu")
WIDTHS = (1, 7, 8, 100, 1024, 3072, 8192, 14336, 14337, 33000)  # the last two: what no vector fits, what no registers hold
# Half a unit in the last place of the output. In float32 the exponent of e^-u is rounded first, so the error grows with |u|: the
# values left of zero have it, and they are small.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SMALLEST = {torch.float32: 1e-35, torch.bfloat16: 1e-35, torch.float16: 2.0**-24}


def draw(*shape, dtype=torch.float32, seed=0, scale=4.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), device="cuda").to(dtype)


def exact(x, kind):
    x = x.double()
    if kind == "silu":
        return x / (1 + torch.exp(-x))
    if kind == "gelu":
        return 0.5 * x * torch.special.erfc(x * -math.sqrt(0.5))
    if kind == "gelu_tanh":
        return x / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return x.clamp(min=0)


def exact_gated(x, kind):
    gate, up = x.chunk(2, -1)
    return exact(gate, kind) * up.double()


def close(found, wanted, what):
    error = (found.double() - wanted).abs()
    bad = ~(error <= (ROUNDING[found.dtype] * 1.01 + 2e-5) * wanted.abs() + SMALLEST[found.dtype])
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        text = f"{int(bad.sum())} of {bad.numel()} wrong, first at {at}: {found[at].item()} for {wanted[at].item()}"
        pytest.fail(f"{what}: {text}, largest error {error.max().item():.3g}", pytrace=False)


def close_e4m3(out, scale, wanted, what):
    most = wanted.abs().amax(-1)
    expected = torch.where(most > 1e-30, most / 448, scale.double())  # what is smaller may be zero in float32
    torch.testing.assert_close(scale.double(), expected, rtol=1e-4, atol=0, msg=lambda m: f"{what}: {m}")
    step = scale.double().unsqueeze(-1)
    error = (out.double() * step - wanted).abs()
    # half a unit of three bits of fraction, or of the smallest step
    bad = ~(error <= 1.001 * wanted.abs() * 2.0**-4 + step * 2.0**-10 * 1.01)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        text = f"{int(bad.sum())} of {bad.numel()} wrong, first at {at}, largest error {error.max().item():.3g}"
        pytest.fail(f"{what}: {text}", pytrace=False)


@pytest.mark.parametrize("dtype", ACTS)
@pytest.mark.parametrize("kind", KINDS)
def test_activations(dtype, kind):
    for rows, width in itertools.product((0, 1, 3, 150), WIDTHS):
        x = draw(rows, 2 * width, dtype=dtype)
        what = f"{kind} {dtype} {rows} x {width}"
        out = poisoned(rows, width, dtype=dtype)
        ops.gated_activation(out, x, kind)
        close(out, exact_gated(x, kind), f"gated {what}")
        x = draw(rows, width, dtype=dtype, seed=1)
        out = poisoned(rows, width, dtype=dtype)
        ops.activation(out, x, kind)
        close(out, exact(x, kind), what)


@pytest.mark.parametrize("dtype", ACTS)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_to_e4m3(dtype, kind):
    for rows, width in itertools.product((1, 3, 150), WIDTHS):
        x = draw(rows, 2 * width, dtype=dtype)
        what = f"{kind} fp8 {dtype} {rows} x {width}"
        out, scale = poisoned(rows, width, dtype=torch.float8_e4m3fn), poisoned(rows, dtype=torch.float32)
        ops.gated_activation_fp8(out, scale, x, kind)
        close_e4m3(out, scale, exact_gated(x, kind), f"gated {what}")
        x = draw(rows, width, dtype=dtype, seed=1)
        x[0] = 0
        out, scale = poisoned(rows, width, dtype=torch.float8_e4m3fn), poisoned(rows, dtype=torch.float32)
        ops.activation_fp8(out, scale, x, kind)
        close_e4m3(out, scale, exact(x, kind), what)
        assert scale[0].item() == 1.0


@pytest.mark.parametrize("kind", KINDS)
def test_far_from_zero(kind):
    x = torch.tensor([[-200.0, -100.0, -20.0, -5.5, -0.0, 0.0, 1e-30, 20.0, 88.0, 1e30, math.inf, math.nan]], device="cuda")
    out = poisoned(1, x.shape[1], dtype=torch.float32)
    ops.activation(out, x, kind)
    wanted = exact(x, kind)
    assert out[0, -1].isnan()
    assert out[0, -2].item() == math.inf
    close(out[:, :-2], wanted[:, :-2], kind)


@pytest.mark.parametrize("dtype", ACTS)
def test_strided_rows(dtype):
    for width in (100, 1024):
        wide, target = draw(9, 2 * width + 24, dtype=dtype), poisoned(9, width + 16, dtype=dtype)
        for start in (3, 8):  # not aligned, and aligned
            target.fill_(math.nan)
            x, out = wide[:, start : start + 2 * width], target[:, 8 : 8 + width]
            ops.gated_activation(out, x, "silu")
            close(out, exact_gated(x, "silu"), f"{dtype} {width} from {start}")
            assert target[:, :8].isnan().all()
            assert target[:, 8 + width :].isnan().all()


def test_a_row_is_the_same_bits_in_any_company():
    x = draw(2000, 2 * 3072, dtype=torch.bfloat16)
    many, few = poisoned(2000, 3072, dtype=torch.bfloat16), poisoned(5, 3072, dtype=torch.bfloat16)
    for kind in KINDS:
        ops.gated_activation(many, x, kind)
        ops.gated_activation(few, x[100:105], kind)
        assert torch.equal(many[100:105], few), kind
        eights = [poisoned(rows, 3072, dtype=torch.float8_e4m3fn) for rows in (2000, 5)]
        scales = [poisoned(rows, dtype=torch.float32) for rows in (2000, 5)]
        ops.gated_activation_fp8(eights[0], scales[0], x, kind)
        ops.gated_activation_fp8(eights[1], scales[1], x[100:105], kind)
        assert torch.equal(scales[0][100:105], scales[1]), kind
        assert torch.equal(eights[0].view(torch.uint8)[100:105], eights[1].view(torch.uint8)), kind


@pytest.mark.parametrize("table_dtype", ACTS)
@pytest.mark.parametrize("dtype", ACTS)
def test_lookup(dtype, table_dtype):
    for rows, width in itertools.product((0, 1, 300), (1, 6, 100, 1024, 4096)):
        table = draw(77, width, dtype=table_dtype)
        ids = torch.arange(rows, device="cuda") * 31 % 77
        if rows > 2:
            ids[1], ids[2], ids[-1] = -1, 77, 2**40
        out = poisoned(rows, width, dtype=dtype)
        ops.lookup(out, ids, table)
        there = (ids >= 0) & (ids < 77)
        wanted = torch.where(there.unsqueeze(1), table[ids.clamp(0, 76)], 0).to(dtype)
        assert torch.equal(out, wanted), f"{rows} x {width}"
        part = table[:, : width // 2]  # rows with a stride, not aligned
        out = poisoned(rows, width // 2, dtype=dtype)
        ops.lookup(out, ids, part)
        assert torch.equal(out, wanted[:, : width // 2]), f"strided {rows} x {width}"


def test_in_a_graph():
    x, table, ids = draw(3, 2 * 3072, dtype=torch.bfloat16), draw(50, 64), torch.tensor([4, -1, 49], device="cuda")
    out, out8 = poisoned(3, 3072, dtype=torch.bfloat16), poisoned(3, 3072, dtype=torch.float8_e4m3fn)
    scale, rows = poisoned(3, dtype=torch.float32), poisoned(3, 64, dtype=torch.float32)

    def step():
        ops.gated_activation(out, x, "silu")
        ops.gated_activation_fp8(out8, scale, x, "silu")
        ops.lookup(rows, ids, table)
        return out.clone(), out8.view(torch.uint8).clone(), scale.clone(), rows.clone()

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(draw(3, 2 * 3072, dtype=torch.bfloat16, seed=9))
    ids.copy_(torch.tensor([0, 50, 7]))
    graph.replay()
    for a, b in zip([t.clone() for t in captured], step(), strict=True):
        assert torch.equal(a, b)


def test_contracts():
    x, out = draw(4, 64), draw(4, 32)
    with pytest.raises(RuntimeError, match="kind must be silu, gelu, gelu_tanh or relu, got 'tanh'"):
        ops.gated_activation(out, x, "tanh")
    with pytest.raises(RuntimeError, match="x must have twice the 32 columns of out, got 60"):
        ops.gated_activation(out, x[:, :60], "silu")
    with pytest.raises(RuntimeError, match=r"out .* must be float32, not bfloat16"):
        ops.activation(out.bfloat16(), out, "silu")
    with pytest.raises(RuntimeError, match=r"ids .* must be int64"):
        ops.lookup(out, torch.zeros(4, dtype=torch.int32, device="cuda"), out)
