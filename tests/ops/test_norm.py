"""Norms against float64: odd sizes, strided views, poisoned outputs; a row is the same bits in any company."""

import pytest
import torch

HIDDEN = [1, 7, 16, 31, 64, 100, 576, 1000, 4096]


def draw(*shape, seed=0, scale=3.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def poisoned(*shape):
    return torch.full(shape, float("nan"))


def exact_rms(x, weight, eps, offset):
    x = x.double()
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps) * (weight.double() + offset)


def exact_layer(x, weight, bias, eps):
    x = x.double()
    mean = x.sum(-1, keepdim=True) / x.shape[-1]
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / x.shape[-1]
    y = (x - mean) / torch.sqrt(variance + eps) * weight.double()
    return y if bias is None else y + bias.double()


def close(found, exact):
    torch.testing.assert_close(found.double(), exact, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("tokens", [0, 1, 3, 17])
def test_rms_norm(impl, hidden, tokens):
    x, weight, out = draw(tokens, hidden), draw(hidden, seed=1, scale=1.0), poisoned(tokens, hidden)
    impl.rms_norm(out, x, weight, 1e-6, 1.0)
    close(out, exact_rms(x, weight, 1e-6, 1.0))


@pytest.mark.parametrize("hidden", HIDDEN)
def test_layer_norm(impl, hidden):
    x, weight, bias = draw(5, hidden) + 2.0, draw(hidden, seed=1, scale=1.0), draw(hidden, seed=2, scale=1.0)
    for b in (bias, None):
        out = poisoned(5, hidden)
        impl.layer_norm(out, x, weight, b, 1e-3)
        close(out, exact_layer(x, weight, b, 1e-3))


def test_layer_norm_of_a_large_mean_does_not_cancel(impl):
    x, out = draw(3, 576, scale=1.0) + 1000.0, poisoned(3, 576)
    impl.layer_norm(out, x, torch.ones(576), None, 1e-5)
    torch.testing.assert_close(out.double(), exact_layer(x, torch.ones(576), None, 1e-5), rtol=1e-3, atol=3e-4)


@pytest.mark.parametrize("hidden", HIDDEN)
def test_fused_norms_add_first(impl, hidden):
    x, residual, weight, bias = (draw(4, hidden), draw(4, hidden, seed=1), draw(hidden, seed=2), draw(hidden, seed=3))
    total = residual + x  # one float32 addition: the kernel has to store exactly this
    stream, out = residual.clone(), poisoned(4, hidden)
    impl.add_rms_norm(out, stream, x, weight, 1e-5, 0.0)
    assert torch.equal(stream, total)
    close(out, exact_rms(total, weight, 1e-5, 0.0))
    stream, out = residual.clone(), poisoned(4, hidden)
    impl.add_layer_norm(out, stream, x, weight, bias, 1e-5)
    assert torch.equal(stream, total)
    close(out, exact_layer(total, weight, bias, 1e-5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_widened(impl, dtype):
    x, weight, bias = draw(3, 65), draw(65, seed=1).to(dtype), draw(65, seed=2).to(dtype)
    out = poisoned(3, 65)
    impl.rms_norm(out, x, weight, 1e-6, 0.0)
    close(out, exact_rms(x, weight, 1e-6, 0.0))
    impl.layer_norm(out, x, weight, bias, 1e-6)
    close(out, exact_layer(x, weight, bias, 1e-6))


def test_strided_views(impl):
    wide = draw(6, 300)
    x = wide[:, 20:120]  # rows of 100 in a buffer of 300
    out = poisoned(6, 100)
    impl.rms_norm(out, x, torch.ones(100), 1e-6, 0.0)
    close(out, exact_rms(x, torch.ones(100), 1e-6, 0.0))
    heads = wide.view(6, 300)[:, 32:224].view(6, 3, 64)  # the queries inside a fused qkv buffer
    weight, before = draw(64, seed=1), wide.clone()
    exact = exact_rms(heads, weight, 1e-6, 0.0)
    impl.rms_norm(heads, heads, weight, 1e-6, 0.0)  # in place, as qk-norm does
    close(heads, exact)
    assert torch.equal(wide[:, :32], before[:, :32]) and torch.equal(wide[:, 224:], before[:, 224:])


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm"])
def test_a_row_is_the_same_bits_alone_in_a_batch_and_on_any_number_of_threads(kernels, name, on_threads):
    x, weight = draw(257, 576), draw(576, seed=1)
    rest = (1e-6, 0.0) if name == "rms_norm" else (None, 1e-6)

    def run(rows):
        out = poisoned(*rows.shape)
        getattr(kernels, name)(out, rows, weight, *rest)
        return out

    together = run(x)
    for row in (0, 1, 100, 256):
        assert torch.equal(run(x[row : row + 1])[0], together[row])
    for count in (1, 2, 3):
        assert torch.equal(on_threads(count, lambda: run(x)), together)


def test_contract_errors_name_the_tensor(kernels):
    x, out, weight = draw(3, 8), poisoned(3, 8), draw(8)
    with pytest.raises(RuntimeError, match=r"rms_norm: weight"):
        kernels.rms_norm(out, x, draw(9), 1e-6, 0.0)
    with pytest.raises(RuntimeError, match=r"rms_norm: x .*float32"):
        kernels.rms_norm(out, x.double(), weight, 1e-6, 0.0)
    with pytest.raises(RuntimeError, match=r"rms_norm: out"):
        kernels.rms_norm(poisoned(2, 8), x, weight, 1e-6, 0.0)
    with pytest.raises(RuntimeError, match=r"rms_norm: x .*last dimension"):
        kernels.rms_norm(out, draw(8, 3).t(), weight, 1e-6, 0.0)
    with pytest.raises(RuntimeError, match=r"layer_norm: bias"):
        kernels.layer_norm(out, x, weight, draw(7), 1e-6)
