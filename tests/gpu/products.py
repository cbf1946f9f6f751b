"""What the tests of products share: random operands, the product in float64, and how far a kernel may be from it.

Tolerances: a product of bf16 or fp16 numbers is exact in float32 and the sums are float32, so an output is off by less than
2^-17 of the sum of |x| |w| (thousands of additions, each within 2^-24 of the sum so far), and then by its own rounding.
"""

import math

import torch

from octavo.ops import reference

DTYPES = (torch.bfloat16, torch.float16)
KINDS = ("silu", "gelu", "gelu_tanh", "relu")


def normal(seed, *shape, dtype=torch.float32, scale=1.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)


def poisoned(*shape, dtype):
    return torch.full(shape, math.nan, dtype=dtype, device="cuda")


def product(x, weight, bias):
    """x @ weight.T + bias in float64, and the bound of a float32 sum's error."""
    x, weight = x.double(), weight.double()
    y = x @ weight.T
    if bias is not None:
        y = y + bias.double()
    return y, (x.abs() @ weight.abs().T + y.abs()) * 2.0**-17


def rounding(dtype):
    return {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]


def gate(kind, g, u, bound_g, bound_u):
    """activation(g) * u in float64 and its bound: no activation here is steeper than 1.2, and expf is good to 2^-21."""
    a = reference._act(g, kind)
    return a * u, u.abs() * (1.2 * bound_g + a.abs() * 2.0**-20) + a.abs() * bound_u + bound_g * bound_u * 1.2


def problems(name, out, expected, bound):
    """A line about the first wrong element, or nothing. fp16 may overflow where the reference is near its largest value."""
    bound = bound + expected.abs() * rounding(out.dtype) + 2.0**-24
    wrong = ~((out.double() - expected).abs() <= bound)
    if not wrong.any():
        return []
    i = int(wrong.flatten().nonzero()[0])
    got, want = float(out.flatten()[i]), float(expected.flatten()[i])
    at, within = divmod(i, expected.shape[1]), float(bound.flatten()[i])
    return [f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, first at {at}: {got}, expected {want} within {within:.3g}"]
