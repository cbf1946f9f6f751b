"""Norms against torch's own, alone and with the addition before them."""

import pytest
import torch
import torch.nn.functional as F

from octavo.layers.norm import LayerNorm, NoNorm, Norm, RMSNorm


def rms(offset: float) -> tuple[Norm, torch.Tensor, None]:
    norm, weight = RMSNorm(9, 1e-3, offset), torch.randn(9)
    norm.slots()["weight"].store(weight)
    return norm, weight + offset, None


def layer(bias: bool) -> tuple[Norm, torch.Tensor, torch.Tensor | None]:
    norm, weight, shift = LayerNorm(9, 1e-3, bias=bias), torch.randn(9), torch.randn(9)
    slots = norm.slots()
    slots["weight"].store(weight)
    if bias:
        slots["bias"].store(shift)
    assert set(slots) == ({"weight", "bias"} if bias else {"weight"})
    return norm, weight, shift if bias else None


def wanted(norm: Norm, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if isinstance(norm, RMSNorm):
        return F.rms_norm(x, (9,), weight, 1e-3)
    return F.layer_norm(x, (9,), weight, bias, 1e-3)


@pytest.mark.parametrize("kind", [lambda: rms(0.0), lambda: rms(1.0), lambda: layer(True), lambda: layer(False)])
def test_norms(kind: object) -> None:
    norm, weight, bias = kind()  # type: ignore[operator]
    x, residual, out = torch.randn(5, 9), torch.randn(5, 9), torch.empty(5, 9)
    norm(out, x)
    torch.testing.assert_close(out, wanted(norm, x, weight, bias), rtol=1e-5, atol=1e-5)
    total, before = residual + x, x.clone()
    norm.add(out, residual, x)
    assert torch.equal(residual, total)
    assert torch.equal(x, before)
    torch.testing.assert_close(out, wanted(norm, total, weight, bias), rtol=1e-5, atol=1e-5)


def test_heads_are_normed_in_place() -> None:
    """As qk norm does it: heads inside a wider tensor, out is x."""
    norm, weight, _ = rms(0.0)
    wide = torch.randn(4, 5, 9)
    heads, rest = wide[:, :3], wide[:, 3:].clone()
    before = heads.clone()
    norm(heads, heads)
    torch.testing.assert_close(heads, F.rms_norm(before, (9,), weight, 1e-3), rtol=1e-5, atol=1e-5)
    assert torch.equal(wide[:, 3:], rest)


def test_no_norm_only_adds() -> None:
    x, residual, out = torch.randn(5, 9), torch.randn(5, 9), torch.empty(5, 9)
    total = residual + x
    NoNorm().add(out, residual, x)
    assert torch.equal(out, total)
    assert NoNorm().slots() == {}
