"""What the tests of products share: random operands, the product in float64, how far a kernel may be from it, chains of layers.

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


def chain_weights(hidden, inner, layers, gain=1.0):
    """For each layer the weights of four products: to twice as many columns, back, to a gate and as many values, back."""
    def weights(seed, n, k, scale):
        return [normal(seed + i, n, k, dtype=torch.bfloat16, scale=scale) for i in range(layers)]

    return list(zip(
        weights(0, 2 * hidden, hidden, 1 / 32), weights(50, hidden, hidden, 1 / 32),
        weights(100, 2 * inner, hidden, gain / 32), weights(150, hidden, inner, gain / 55), strict=True,
    ))


def same_bits_in_a_graph(chain, start, results):
    """Kernels that start before their predecessor ends read what it wrote: a graph of a chain, and the chain launched at one go,
    give the bits of one call at a time.

    chain(pause): the calls, with pause() between them; start(seed): new inputs; results: the tensors to compare.
    """
    start(0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(lambda: None)
    for seed in range(0, 40, 4):
        start(seed)
        chain(torch.cuda.synchronize)
        expected = [t.clone() for t in results]
        for name, run in (("graph", graph.replay), ("at one go", lambda: chain(lambda: None))):
            start(seed)
            run()
            torch.cuda.synchronize()
            assert all(map(torch.equal, results, expected)), (name, seed)


def wrong_beyond_31_bits(linear, rows, span=2**31):
    """What ``linear(out, x, weight)`` gets wrong where weight, activations and outputs span more than 2^31 elements each."""
    k, used, dtype = 16384, 64, torch.bfloat16
    step = span // (rows - 1) // 8 * 8 + 8
    weight = torch.zeros(span // k + used, k, dtype=dtype, device="cuda")
    weight[-used:] = normal(1, used, k, dtype=dtype, scale=1 / 128)
    x, out = (poisoned((rows - 1) * step + n, dtype=dtype).as_strided((rows, n), (step, 1)) for n in (k, len(weight)))
    x.copy_(normal(2, rows, k, dtype=dtype))
    linear(out, x, weight)
    found = problems("the last rows of the weight", out[:, -used:], *product(x, weight[-used:], None))
    return found + ["an output of a row of zeros is not zero"] * bool(out[:, :-used].any())
