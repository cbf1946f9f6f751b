"""Prefill attention on Hopper: time and TFLOP/s of paged_attention over prompts, beside FlashAttention 3 and the chip.

Run: python3 benchmarks/kernels_sm90.py [--block-size 16] [--only TEXT]. Prints a table and, as the last line, one JSON object.
Causal FLOPs are counted as 2 n^2 head_dim heads a prompt (half of the square), as the peer's are. "peer" is FlashAttention 3 as
vLLM 0.26 ships it, paged with pages of 16 tokens, bf16, on an H100 SXM.
"""

import argparse
import json
import math
from functools import partial

import torch
from timing import seconds

import octavo.ops as ops
from octavo.ops.attention import work_ints

CEILING = 700.0  # TFLOP/s that a large bf16 product reaches on an H100
# name: prompts, tokens of each, cached tokens before them, peer in TFLOP/s
CASES_128 = {
    "16x128": (16, 128, 0, 30.0), "16x512": (16, 512, 0, 199.0), "8x1k": (8, 1024, 0, 313.0), "4x2k": (4, 2048, 0, 430.0),
    "2x8k": (2, 8192, 0, 625.0), "1x32k": (1, 32768, 0, 620.0), "4x512+8k": (4, 512, 8192, None),
}
CASES_64 = {
    "16x128": (16, 128, 0, 14.0), "16x512": (16, 512, 0, 108.0), "8x1k": (8, 1024, 0, 174.0), "4x2k": (4, 2048, 0, 255.0),
    "2x8k": (2, 8192, 0, 442.0), "1x32k": (1, 32768, 0, 484.0), "4x512+8k": (4, 512, 8192, None),
}


def measure(
    prompts: int, tokens: int, cached: int, heads: int, kv_heads: int, head_dim: int, block_size: int,
    dtype: torch.dtype = torch.bfloat16, window: int = 0,
) -> float:
    """Milliseconds of one call."""
    context = tokens + cached
    blocks = math.ceil(context / block_size)
    copies = max(2, min(8, math.ceil(100e6 / (prompts * context * kv_heads * head_dim * 4))))  # beyond the L2 cache
    caches = [torch.randn(prompts * blocks, block_size, kv_heads, head_dim, device="cuda").to(dtype) for _ in range(2 * copies)]
    total = prompts * tokens
    qkv = [torch.randn(total, heads + 2 * kv_heads, head_dim, device="cuda").to(dtype) for _ in range(copies)]
    outs = [torch.empty(total, heads, head_dim, dtype=dtype, device="cuda") for _ in range(copies)]
    tables = torch.randperm(prompts * blocks, device="cuda").to(torch.int32).view(prompts, blocks)
    rows = torch.arange(prompts, dtype=torch.int32, device="cuda")
    query_start = torch.arange(prompts + 1, dtype=torch.int32, device="cuda") * tokens
    context_len = torch.full((prompts,), context, dtype=torch.int32, device="cuda")
    work = torch.zeros(work_ints(prompts, total), dtype=torch.int32, device="cuda")
    partials = torch.empty(1 << 20, device="cuda")
    ops.attention_plan(work, query_start, context_len, heads, kv_heads, head_dim, window, tokens, len(partials) // (head_dim + 2))

    def call(i: int) -> None:
        c = i % copies
        ops.paged_attention(outs[c], qkv[c][:, :heads], caches[2 * c], caches[2 * c + 1], tables, rows, query_start, context_len,
                            head_dim**-0.5, window, 0.0, None, 1.0, 1.0, work, partials, tokens)

    flops = 2.0 * prompts * tokens * (tokens + 2 * cached) * head_dim * heads
    repeats = max(2, min(40, int(20e-3 / (flops / 400e12 + 10e-6))))
    return 1e3 * seconds([partial(call, i) for i in range(repeats)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    ops.load_cuda()
    figures = {}
    print(f"{'case':>26} {'us':>9} {'TFLOP/s':>8} {'of 700':>7} {'peer':>6}")
    for head_dim, cases in ((128, CASES_128), (64, CASES_64)):
        for name, (prompts, tokens, cached, peer) in cases.items():
            label = f"prefill {name} 32/8 x {head_dim}"
            if options.only not in label:
                continue
            time = measure(prompts, tokens, cached, 32, 8, head_dim, options.block_size)
            rate = 2.0 * prompts * tokens * (tokens + 2 * cached) * head_dim * 32 / time / 1e9
            print(f"{label:>26} {time * 1e3:9.1f} {rate:8.1f} {rate / CEILING:7.0%} {peer or math.nan:6.0f}", flush=True)
            figures[label] = {"value": round(rate, 1), "unit": "TFLOP/s", "ceiling": CEILING} | ({"peer": peer} if peer else {})
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
