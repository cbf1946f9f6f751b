"""Activations against float64, over the whole range of floats, gated and plain, in place, strided and poisoned."""

import re
from pathlib import Path

import pytest
import torch

KINDS = ["silu", "gelu", "gelu_tanh", "relu"]


def exact(x, kind):
    x = x.double()
    if kind == "silu":
        return x / (1 + torch.exp(-x))
    if kind == "gelu":
        return 0.5 * x * torch.special.erfc(-x * 2**-0.5)
    if kind == "gelu_tanh":
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return x.clamp(min=0)


def close(found, wanted):
    torch.testing.assert_close(found.double(), wanted, rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 7, 16, 33, 100, 1536])
def test_gated_activation(impl, kind, d):
    x = torch.randn(5, 2 * d, generator=torch.Generator().manual_seed(d)) * 3
    out = torch.full((5, d), float("nan"))
    impl.gated_activation(out, x, kind)
    close(out, exact(x[:, :d], kind) * x[:, d:].double())


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_range(impl, kind):
    far = torch.tensor([-1e30, -200.0, -100.0, -88.0, 88.0, 100.0, 1e30, 0.0, -0.0])
    x = torch.cat((torch.linspace(-30, 30, 20001), far)).unsqueeze(0)
    out = torch.full_like(x, float("nan"))
    impl.activation(out, x, kind)
    wanted = exact(x, kind).nan_to_num(0.0)  # -1e30 * exp(-1e30) is 0 in the limit
    torch.testing.assert_close(out.double(), wanted, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_and_infinity_are_not_hidden(impl, kind):
    x = torch.tensor([[float("nan"), float("inf"), 1.0]])
    out = torch.zeros_like(x)
    impl.activation(out, x, kind)
    assert out[0, 0].isnan() and out[0, 1] == float("inf") and out[0, 2].isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_activation_in_place(impl, kind):
    x = torch.randn(3, 77)
    wanted = exact(x, kind)
    impl.activation(x, x, kind)
    close(x, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_an_element_is_the_same_bits_anywhere(kernels, kind, on_threads):
    x = torch.randn(400, 2 * 600)

    def run(rows):
        out = torch.full((rows.shape[0], 600), float("nan"))
        kernels.gated_activation(out, rows, kind)
        return out

    together = run(x)
    for row in (0, 399):
        assert torch.equal(run(x[row : row + 1])[0], together[row])
    for count in (1, 2, 3):
        assert torch.equal(on_threads(count, lambda: run(x)), together)
    shifted = torch.full((1, 2 * 600), 1.0)  # the same values at other places of a row
    shifted[0, :590], shifted[0, 600:1190] = x[0, 10:600], x[0, 610:1200]
    assert torch.equal(run(shifted)[0, :590], together[0, 10:])


def test_an_unknown_kind_is_an_error(impl):
    with pytest.raises(RuntimeError, match="swish"):
        impl.activation(torch.zeros(1, 2), torch.zeros(1, 2), "swish")
    with pytest.raises(RuntimeError, match="swish"):
        impl.gated_activation(torch.zeros(1, 2), torch.zeros(1, 4), "swish")


def test_contract_errors(kernels):
    with pytest.raises(RuntimeError, match="gated_activation: "):
        kernels.gated_activation(torch.zeros(2, 3), torch.zeros(2, 5), "silu")
    with pytest.raises(RuntimeError, match="activation: "):
        kernels.activation(torch.zeros(2, 3), torch.zeros(2, 4), "silu")


def test_a_call_leaves_nothing_behind(impl):
    """The name of the kind is handed over in memory that somebody has to give back, in every layer of every step."""

    def own() -> int:
        status = Path("/proc/self/status").read_text()
        return sum(1024 * int(size) for size in re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+)", status, re.MULTILINE))

    x, calls = torch.zeros(1, 16), 100_000
    for _ in range(1000):
        impl.activation(x, x, "relu")
    before = own()
    for _ in range(calls):
        impl.activation(x, x, "relu")
    assert own() - before < 10 * calls
