"""Speed of the products of few rows on this GPU: weight bandwidth by shape and rows, beside cuBLAS, and whole chains of layers.

Every figure is the median replay of a CUDA graph that walks over more weights than the L2 cache holds. The floor is the time that
the device needs to copy as many bytes. Prints tables for people and one JSON object as the last line:

    python benchmarks/kernels_gemm.py --rows 1,8,16,17,32,64,128

"Ours" is what DenseWeight takes: the skinny operators up to 16 rows, above them the tile operators, where the device has them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from timing import seconds
from torch import Tensor

from octavo import ops
from octavo.ops.fused import SKINNY_ROWS, SKINNY_SCRATCH

# hidden, columns of qkv, columns of q, inner size, vocabulary, layers in a chain
MODELS = {
    "0.6B": (1024, 4096, 2048, 3072, 151936, 28),
    "1B": (2048, 3072, 2048, 8192, 128256, 16),
    "8B": (4096, 6144, 4096, 14336, 128256, 6),
}
ROTATED = 400 << 20  # bytes of weights that a graph walks over, several times the L2 cache
DTYPE = torch.bfloat16


def copy_bandwidth() -> float:
    """Bytes per second read and written by a large copy (a kernel: the copy engines are slower)."""
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return 8 * source.numel() / seconds([lambda: torch.neg(source, out=target)] * 4)


class Pool:
    """Random weights, handed out one after the other and again from the start."""

    def __init__(self, size: int) -> None:
        self.data = torch.randn(size // 2, dtype=DTYPE, device="cuda").mul_(0.03)
        self.next = 0

    def weight(self, n: int, k: int) -> Tensor:
        if self.next + n * k > len(self.data):
            self.next = 0
        found = self.data[self.next : self.next + n * k].view(n, k)
        self.next += n * k
        return found


def layer_shapes(name: str) -> list[tuple[str, int, int]]:
    """(operator, K, N) of the products of a layer and of the head."""
    hidden, qkv, q, inner, vocabulary, _ = MODELS[name]
    return [
        ("linear", hidden, qkv), ("linear", q, hidden), ("gated", hidden, 2 * inner), ("linear", inner, hidden),
        ("head", hidden, vocabulary),
    ]


def operators(m: int) -> tuple[Callable[..., None], Callable[..., None]]:
    """linear(out, x, weight) and gated(out, x, weight) for m rows."""
    if m > SKINNY_ROWS and torch.cuda.get_device_capability() == (9, 0):
        return (lambda out, x, w: ops.tile_linear(out, x, w, None)), (lambda out, x, w: ops.tile_gated(out, x, w, None, "silu"))
    scratch = torch.zeros(SKINNY_SCRATCH, device="cuda")
    return (
        lambda out, x, w: ops.skinny_linear(out, x, w, None, scratch),
        lambda out, x, w: ops.skinny_gated(out, x, w, None, "silu", scratch),
    )


def one_shape(pool: Pool, kind: str, k: int, n: int, m: int) -> tuple[float, float]:
    """Seconds of ours and of cuBLAS for one product."""
    count = max(2, min(64, ROTATED // (2 * n * k)))
    weights = [pool.weight(n, k) for _ in range(count)]
    x = torch.randn(m, k, dtype=DTYPE, device="cuda")
    columns = n // 2 if kind == "gated" else n
    out = torch.empty(m, columns, dtype=torch.float32 if kind == "head" else DTYPE, device="cuda")
    linear, gated = operators(m)
    ours = seconds([partial(gated if kind == "gated" else linear, out, x, w) for w in weights])
    if kind == "head":
        return ours, seconds([partial(torch.mm, x, w.t(), out_dtype=torch.float32, out=out) for w in weights])
    return ours, seconds([partial(F.linear, x, w) for w in weights])


def chain(pool: Pool, name: str, m: int, form: str) -> tuple[float, int]:
    """Seconds of all layers one after the other, each product reading what the one before wrote, and the bytes of the weights.

    form: "plain", "normed" (the additions and norms are part of the first and third), "cublas" (four bare products).
    """
    hidden, qkv_size, q_size, inner, _, layers = MODELS[name]
    scratch = torch.zeros(SKINNY_SCRATCH, device="cuda")
    totals = torch.randn(2, m, hidden, device="cuda")
    delta, nw = torch.randn(m, hidden, dtype=DTYPE, device="cuda"), torch.ones(hidden, device="cuda")
    linear, gated = operators(m)
    a, b = torch.empty(m, qkv_size, dtype=DTYPE, device="cuda"), torch.empty(m, inner, dtype=DTYPE, device="cuda")
    weights = [
        [pool.weight(n, k) for n, k in ((qkv_size, hidden), (hidden, q_size), (2 * inner, hidden), (hidden, inner))]
        for _ in range(layers)
    ]

    def run() -> None:
        nonlocal delta
        for qkv, o, up, down in weights:
            if form == "cublas":
                delta = F.linear(F.linear(F.linear(F.linear(delta, qkv)[:, :q_size], o), up)[:, :inner], down)
                continue
            if form == "normed":
                ops.norm_linear(a, totals[1], totals[0], delta, nw, 1e-6, 0.0, qkv, None, scratch)
            else:
                linear(a, delta, qkv)
            linear(delta, a[:, :q_size], o)
            if form == "normed":
                ops.norm_gated(b, totals[0], totals[1], delta, nw, 1e-6, 0.0, up, None, "silu", scratch)
            else:
                gated(b, delta, up)
            linear(delta, b, down)

    return seconds([run]), sum(w.numel() * 2 for layer in weights for w in layer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,8,16,17,32,64,128", help="comma-separated numbers of rows")
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated names of sizes")
    args = parser.parse_args()
    rows, models = [int(m) for m in args.rows.split(",")], args.models.split(",")
    ops.load_cuda()
    figures: dict[str, dict[str, object]] = {}
    with torch.inference_mode():
        pool = Pool(3 << 30)
        floor = copy_bandwidth()
        print(f"{torch.cuda.get_device_name()}, copy {floor / 1e12:.2f} TB/s; us, TB/s of weight, cuBLAS us, TB/s")
        print("         K x N      " + "".join(f"|{'M ' + str(m):^29}" for m in rows))
        for name in models:
            for kind, k, n in layer_shapes(name):
                line = f"{name:>4} {k:>6} x {n:<6} "
                for m in rows:
                    ours, theirs = one_shape(pool, kind, k, n, m)
                    size = 2 * k * n
                    line += f"| {ours * 1e6:6.1f} {size / ours / 1e12:5.2f}  {theirs * 1e6:6.1f} {size / theirs / 1e12:5.2f} "
                    figures[f"{kind} {k}x{n} M={m}"] = {
                        "value": round(size / ours / 1e12, 3), "unit": "TB/s", "peer": round(size / theirs / 1e12, 3),
                        "ceiling": round(floor / 1e12, 3),
                    }
                print(line, flush=True)
        print("chains: us a layer, TB/s of weights")
        for name in models:
            for m in rows:
                line = f"{name:>4} M {m:<3}"
                for form in ("plain", "normed", "cublas") if m <= SKINNY_ROWS else ("plain", "cublas"):
                    time, size = chain(pool, name, m, form)
                    line += f" | {form} {time / MODELS[name][-1] * 1e6:6.1f} {size / time / 1e12:5.2f}"
                    figures[f"chain {form} {name} M={m}"] = {
                        "value": round(size / time / 1e12, 3), "unit": "TB/s", "ceiling": round(floor / 1e12, 3),
                    }
                print(line, flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
