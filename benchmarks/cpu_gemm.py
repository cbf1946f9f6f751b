"""Speed of ``linear`` on this CPU, against torch's float32 linear and against the memory and arithmetic it could use.

Every matrix is timed over a set of copies larger than the caches, so that a decode step's reads come from memory as they do
in a model. Prints a table for people and one JSON object as the last line:

    python benchmarks/cpu_gemm.py --threads 2,4
"""

from __future__ import annotations

import argparse
import json
import platform
from functools import partial

import torch
import torch.nn.functional as F
from cpu_timing import CACHES, DTYPES, seconds
from torch import Tensor

from octavo import ops

# (K, N): the layers and the head of SmolLM2-135M, and one layer of a larger model
SHAPES = ((576, 960), (576, 576), (576, 3072), (1536, 576), (576, 49152), (2048, 8192))
ROWS = (1, 4, 16, 64, 512)


def read_bandwidth() -> float:
    """Bytes per second of reading memory once with all of torch's threads: the sum of a vector far larger than the caches."""
    x = torch.ones(128 << 20)
    return x.numel() * 4 / seconds(lambda i: x.sum(), 1.0)


def copies_of(first: Tensor) -> list[Tensor]:
    count = max(2, min(64, CACHES // max(1, first.numel() * first.element_size())))
    return [first, *(first.clone() for _ in range(count - 1))]


def run_ours(out: Tensor, x: Tensor, packed: list[Tensor], n: int, i: int) -> None:
    ops.linear(out, x, packed[i % len(packed)], None, n)


def run_torch(x: Tensor, weights: list[Tensor], i: int) -> None:
    F.linear(x, weights[i % len(weights)])


def measure(threads: int, dtype: str, budget: float) -> list[dict[str, object]]:
    torch.set_num_threads(threads)
    bandwidth = read_bandwidth()
    print(f"\n{threads} threads, {dtype} weights, kernels {ops.isa()}, reading memory: {bandwidth / 1e9:.1f} GB/s")
    print(f"{'K x N':>14} {'M':>5} {'linear us':>10} {'GB/s':>7} {'of read':>8} {'GFLOP/s':>8} {'torch us':>10} {'speed-up':>10}")
    figures: list[dict[str, object]] = []
    for k, n in SHAPES:
        weight = torch.randn(n, k)
        plain = copies_of(weight)
        packed = copies_of(ops.pack_linear(weight.to(DTYPES[dtype])))
        for m in ROWS:
            x, out = torch.randn(m, k), torch.empty(m, n)
            ours = seconds(partial(run_ours, out, x, packed, n), budget)
            theirs = seconds(partial(run_torch, x, plain), budget)
            moved = packed[0].numel() * packed[0].element_size() / ours
            flops = 2 * m * k * n / ours
            print(
                f"{k:>6} x {n:<5} {m:>5} {ours * 1e6:>10.1f} {moved / 1e9:>7.1f} {moved / bandwidth:>8.2f} {flops / 1e9:>8.1f}"
                f" {theirs * 1e6:>10.1f} {theirs / ours:>10.2f}"
            )
            figures.append({
                "threads": threads, "dtype": dtype, "k": k, "n": n, "m": m, "us": round(ours * 1e6, 2),
                "gb_per_s": round(moved / 1e9, 2), "of_read_bandwidth": round(moved / bandwidth, 3),
                "gflop_per_s": round(flops / 1e9, 1), "torch_us": round(theirs * 1e6, 2),
                "speed_up_over_torch": round(theirs / ours, 3),
            })
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", default="2,4", help="comma-separated thread counts")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="comma-separated weight dtypes")
    parser.add_argument("--budget", type=float, default=0.2, help="seconds for each time")
    args = parser.parse_args()
    figures = []
    with torch.inference_mode():
        for threads in map(int, args.threads.split(",")):
            for dtype in args.dtypes.split(","):
                figures += measure(threads, dtype, args.budget)
    machine = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__, "isa": ops.isa()}
    print(json.dumps({"benchmark": "cpu_gemm", **machine, "figures": figures}))


if __name__ == "__main__":
    main()
