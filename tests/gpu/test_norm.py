"""Norms on a GPU against float64: all types, odd lengths, strided and poisoned tensors; a row is the same bits in any company."""

import itertools

import pytest
import torch

from octavo import ops

ACTS = (torch.float32, torch.bfloat16, torch.float16)
# both sides of a segment (256), of one warp, of a block, of what registers hold (16384); multiples of eight and not
HIDDEN = (1, 7, 8, 64, 100, 128, 256, 264, 576, 1000, 1024, 2048, 2056, 4096, 5120, 8192, 12288, 16384, 16392, 20001, 40000)
MANY = 1100  # rows for which the form for many rows is chosen, from 1024 elements a row
# Half a unit in the last place of the output, and what float32 sums of a row may add: a norm's terms are of the size of one.
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SLACK = 4e-6


def draw(*shape, dtype=torch.float32, seed=0, scale=3.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def poisoned(*shape, dtype):
    return torch.full(shape, float("nan"), device="cuda").to(dtype)


def exact_rms(x, weight, eps, offset):
    x = x.double()
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * (weight.double() + offset)


def exact_layer(x, weight, bias, eps):
    x = x.double()
    y = x - x.mean(-1, keepdim=True)
    y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + eps) * weight.double()
    return y if bias is None else y + bias.double()


def close(found, exact, what):
    error = (found.double() - exact).abs()
    bound = ROUNDING[found.dtype] * 1.01 * exact.abs() + SLACK * (1 + exact.abs())
    bad = ~(error <= bound)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        text = f"{int(bad.sum())} of {bad.numel()} wrong, first at {at}: {found[at].item()} for {exact[at].item()}"
        pytest.fail(f"{what}: {text}, largest error {error.max().item():.3g}", pytrace=False)


def close_e4m3(out, scale, exact, what):
    most = exact.abs().amax(-1)
    expected = torch.where(most > 0, most / 448, 1.0)
    torch.testing.assert_close(scale.double(), expected, rtol=2e-5, atol=0, msg=lambda m: f"{what}: scale: {m}")
    error = (out.double() * scale.double().unsqueeze(-1) - exact).abs()
    # three bits of fraction: half a unit is 2^-4 of the number; below 2^-6 of a scale the steps are 2^-9
    bound = 1.001 * exact.abs() * 2.0**-4 + scale.double().unsqueeze(-1) * 2.0**-10 * 1.01
    bad = ~(error <= bound)
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        text = f"{int(bad.sum())} of {bad.numel()} wrong, first at {at}, largest error {error.max().item():.3g}"
        pytest.fail(f"{what}: {text}", pytrace=False)


@pytest.mark.parametrize("dtype", ACTS)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_norms(dtype, hidden):
    weights = ACTS if hidden in (1000, 4096) else ACTS[:1]
    for rows, weight_dtype in itertools.product((0, 1, 5, MANY if hidden <= 4096 else 9), weights):
        x = draw(rows, hidden, dtype=dtype)
        weight, bias = (draw(hidden, dtype=weight_dtype, seed=seed, scale=1.0) for seed in (1, 2))
        what = f"{dtype} {rows} x {hidden}, weight {weight_dtype}"
        out = poisoned(rows, hidden, dtype=dtype)
        ops.rms_norm(out, x, weight, 1e-6, 1.0)
        close(out, exact_rms(x, weight, 1e-6, 1.0), f"rms_norm {what}")
        for b in (bias, None):
            out = poisoned(rows, hidden, dtype=dtype)
            ops.layer_norm(out, x, weight, b, 1e-5)
            close(out, exact_layer(x, weight, b, 1e-5), f"layer_norm {what}")


@pytest.mark.parametrize("stream", ["float32", "act"])
@pytest.mark.parametrize("dtype", ACTS)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_norms_after_the_addition(dtype, hidden, stream):
    stream = torch.float32 if stream == "float32" else dtype
    for rows in (1, 5, MANY if hidden <= 4096 else 9):
        x, residual = draw(rows, hidden, dtype=dtype), draw(rows, hidden, dtype=stream, seed=3, scale=20.0)
        weight, bias = draw(hidden, seed=1, scale=1.0), draw(hidden, seed=2, scale=1.0)
        total = (residual.float() + x.float()).to(stream)  # one addition in float32, rounded once: to be met exactly
        what = f"{dtype} {rows} x {hidden}, residual {stream}"
        given, out = residual.clone(), poisoned(rows, hidden, dtype=dtype)
        ops.add_rms_norm(out, given, x, weight, 1e-5, 0.0)
        assert torch.equal(given, total), f"add_rms_norm {what}: residual"
        close(out, exact_rms(total, weight, 1e-5, 0.0), f"add_rms_norm {what}")
        for b in (bias, None):
            given, out = residual.clone(), poisoned(rows, hidden, dtype=dtype)
            ops.add_layer_norm(out, given, x, weight, b, 1e-5)
            assert torch.equal(given, total), f"add_layer_norm {what}: residual"
            close(out, exact_layer(total, weight, b, 1e-5), f"add_layer_norm {what}")
        given, scale = residual.clone(), poisoned(rows, dtype=torch.float32)
        out8 = poisoned(rows, hidden, dtype=torch.float8_e4m3fn)
        ops.add_rms_norm_fp8(out8, scale, given, x, weight, 1e-5, 1.0)
        assert torch.equal(given, total), f"add_rms_norm_fp8 {what}: residual"
        close_e4m3(out8, scale, exact_rms(total, weight, 1e-5, 1.0), f"add_rms_norm_fp8 {what}")


@pytest.mark.parametrize("dtype", ACTS)
@pytest.mark.parametrize("hidden", HIDDEN)
def test_norms_to_e4m3(dtype, hidden):
    for rows in (1, 5, MANY if hidden <= 4096 else 9):
        x, weight, bias = draw(rows, hidden, dtype=dtype), draw(hidden, seed=1, scale=1.0), draw(hidden, seed=2, scale=1.0)
        what = f"{dtype} {rows} x {hidden}"
        out, scale = poisoned(rows, hidden, dtype=torch.float8_e4m3fn), poisoned(rows, dtype=torch.float32)
        ops.rms_norm_fp8(out, scale, x, weight, 1e-6, 0.0)
        close_e4m3(out, scale, exact_rms(x, weight, 1e-6, 0.0), f"rms_norm_fp8 {what}")
        for b in (bias, None):
            out, scale = poisoned(rows, hidden, dtype=torch.float8_e4m3fn), poisoned(rows, dtype=torch.float32)
            ops.layer_norm_fp8(out, scale, x, weight, b, 1e-5)
            # a row of one element and no bias is exactly zero
            close_e4m3(out, scale, exact_layer(x, weight, b, 1e-5), f"layer_norm_fp8 {what}")


@pytest.mark.parametrize("rows", [3, 3000])
def test_layer_norm_of_a_large_mean_does_not_cancel(rows):
    for hidden in (100, 576, 4096):
        x, out = draw(rows, hidden, scale=1.0) + 1000.0, poisoned(rows, hidden, dtype=torch.float32)
        weight = torch.ones(hidden, device="cuda")
        ops.layer_norm(out, x, weight, None, 1e-5)
        # the mean itself is rounded to 2^-14
        torch.testing.assert_close(out.double(), exact_layer(x, weight, None, 1e-5), rtol=1e-3, atol=3e-4)


def test_a_row_of_zeros_has_scale_one():
    out, scale = poisoned(3, 1024, dtype=torch.float8_e4m3fn), poisoned(3, dtype=torch.float32)
    ops.rms_norm_fp8(out, scale, torch.zeros(3, 1024, device="cuda"), torch.ones(1024, device="cuda"), 1e-6, 0.0)
    assert scale.tolist() == [1.0] * 3
    assert not out.float().any()


@pytest.mark.parametrize("dtype", ACTS[1:])
def test_a_float32_stream_into_the_type_of_activations(dtype):
    for rows, hidden in itertools.product((1, 1100), (64, 1000, 4096)):
        x, weight = draw(rows, hidden), draw(hidden, seed=1, scale=1.0)
        out = poisoned(rows, hidden, dtype=dtype)
        ops.rms_norm(out, x, weight, 1e-6, 0.0)
        close(out, exact_rms(x, weight, 1e-6, 0.0), f"rms_norm {rows} x {hidden}")
        ops.layer_norm(out, x, weight, None, 1e-6)
        close(out, exact_layer(x, weight, None, 1e-6), f"layer_norm {rows} x {hidden}")


@pytest.mark.parametrize("dtype", ACTS)
@pytest.mark.parametrize("dim", [64, 80, 100, 128, 256, 320])
def test_heads_inside_a_fused_tensor(dtype, dim):
    heads, rows = 6, 37
    qkv = draw(rows, heads + 4, dim, dtype=dtype)
    before = qkv.clone()
    weight = draw(dim, seed=1, scale=1.0)
    ops.rms_norm(qkv[:, 2 : 2 + heads], qkv[:, 2 : 2 + heads], weight, 1e-6, 0.0)  # in place
    close(qkv[:, 2 : 2 + heads], exact_rms(before[:, 2 : 2 + heads], weight, 1e-6, 0.0), f"{dtype} heads of {dim}")
    assert torch.equal(qkv[:, :2], before[:, :2])
    assert torch.equal(qkv[:, 2 + heads :], before[:, 2 + heads :])


@pytest.mark.parametrize("dtype", ACTS)
def test_rows_that_are_not_aligned(dtype):
    """Views that begin at odd elements: the loads of single elements, with the same bits as the loads of vectors."""
    for rows, hidden in itertools.product((3, 300), (256, 1024, 4096, 8192)):
        wide = draw(rows, hidden + 3, dtype=dtype)
        weight, odd = draw(hidden, seed=1, scale=1.0), poisoned(rows, hidden + 5, dtype=dtype)
        out = poisoned(rows, hidden, dtype=dtype)
        ops.rms_norm(odd[:, 1 : hidden + 1], wide[:, 3:], weight, 1e-6, 0.0)
        ops.rms_norm(out, wide[:, 3:].contiguous(), weight, 1e-6, 0.0)
        assert torch.equal(odd[:, 1 : hidden + 1], out), f"{dtype} {rows} x {hidden}"
        assert odd[:, 0].isnan().all()
        assert odd[:, hidden + 1 :].isnan().all()


def run_all(x, residual, weight, bias):
    """Every operator on these rows: a list of results."""
    rows, hidden = x.shape
    results = []
    plain = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm")
    for name in (*plain, "rms_norm_fp8", "add_rms_norm_fp8", "layer_norm_fp8"):
        eight = name.endswith("fp8")
        out = poisoned(rows, hidden, dtype=torch.float8_e4m3fn if eight else x.dtype)
        scale = [poisoned(rows, dtype=torch.float32)] if eight else []
        stream = [residual.clone()] if name.startswith("add") else []
        last = (weight, 1e-6, 0.5) if "rms" in name else (weight, bias, 1e-6)
        getattr(ops, name)(out, *scale, *stream, x, *last)
        results += [out.view(torch.uint8) if eight else out, *scale, *stream]
    return results


@pytest.mark.parametrize("dtype", ACTS)
@pytest.mark.parametrize("hidden", [64, 256, 768, 1024, 2048, 4096, 5120, 8192, 16384, 20480])
def test_a_row_is_the_same_bits_in_any_company(dtype, hidden):
    rows = 4096 if hidden <= 4096 else 600
    x, residual = draw(rows, hidden, dtype=dtype), draw(rows, hidden, seed=3)
    weight, bias = draw(hidden, seed=1, scale=1.0), draw(hidden, seed=2, scale=1.0)
    together = run_all(x, residual, weight, bias)
    for part in (slice(0, 1), slice(17, 18), slice(rows - 1, rows), slice(rows - 64, rows), slice(3, 260)):
        alone = run_all(x[part], residual[part], weight, bias)
        for i, (a, b) in enumerate(zip(alone, together, strict=True)):
            assert torch.equal(a, b[part]), f"{dtype} {hidden}, rows {part}: result {i} differs from its part of {rows} rows"


def test_in_a_graph():
    x, residual, weight, bias = draw(5, 4096, dtype=torch.bfloat16), draw(5, 4096), draw(4096, scale=1.0), draw(4096, scale=1.0)
    run_all(x, residual, weight, bias)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_all(x, residual, weight, bias)
    for seed in (7, 8):
        x.copy_(draw(5, 4096, dtype=torch.bfloat16, seed=seed))
        residual.copy_(draw(5, 4096, seed=seed + 10))
        graph.replay()
        for a, b in zip(captured, run_all(x, residual, weight, bias), strict=True):
            assert torch.equal(a, b)


def test_contracts():
    x, weight = draw(4, 64, dtype=torch.bfloat16), torch.ones(64, device="cuda")
    cases = [
        (lambda: ops.rms_norm(x[:, :32], x, weight, 1e-6, 0.0), r"rms_norm: out \[T, H\] has shape \[4, 32\]"),
        (lambda: ops.rms_norm(x.float(), x, weight, 1e-6, 0.0), "out .* must be bfloat16, not float32"),
        (lambda: ops.rms_norm(x, x, weight[:3], 1e-6, 0.0), r"weight \[H\] has shape \[3\], but H = 64"),
        (lambda: ops.add_rms_norm(x, x.half(), x, weight, 1e-6, 0.0), "residual .* must be float32 or bfloat16, not float16"),
        (lambda: ops.rms_norm(x.t(), x.t(), torch.ones(4, device="cuda"), 1e-6, 0.0), "contiguous in its last dimension"),
        (lambda: ops.rms_norm_fp8(x, weight, x, weight, 1e-6, 0.0), "out .* must be float8_e4m3fn"),
    ]
    for call, words in cases:
        with pytest.raises(RuntimeError, match=words):
            call()
