"""Speed of decode attention over a paged cache on this GPU, beside FlashAttention 3, and of the plan that it works by.

Every figure is the median replay of a CUDA graph of calls that rotate over caches larger than the L2 cache, in blocks of 16
tokens in random order. The peer's times were measured in the same way on an H100. Prints tables for people and one JSON object
as the last line:

    python benchmarks/kernels_attention.py --heads 32/8/128
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from timing import seconds

from octavo import ops
from octavo.ops.attention import partial_floats, work_ints

SHAPES = ((1, 512), (1, 4096), (1, 32768), (8, 1024), (32, 512), (32, 2048), (128, 512), (128, 2048), (256, 300), (256, 512))
PEER = {  # microseconds of FlashAttention 3 by SHAPES: query heads / KV heads / head_dim
    "32/8/128": (13.0, 16.4, 57.3, 21.5, 31.2, 98.8, 102.7, 364.5, 126.0, 193.2),
    "16/8/128": (11.2, 16.1, 56.5, 21.3, 30.7, 99.4, 100.1, 363.0, 125.4, 190.8),
    "32/8/64": (9.6, 13.0, 35.0, 15.1, 19.9, 58.1, 64.3, 204.0, 87.9, 120.4),
}
MORE = (("32/8/128", (8, 1024)), ("32/8/128", (128, 2048)), ("32/8/64", (256, 512)))  # with an e4m3 cache
OTHERS = (
    ("8/4/256", (32, 1024)), ("14/2/64", (32, 1024)), ("32/32/128", (8, 1024)), ("32/8/128", (1, 16)), ("32/8/128", (256, 16)),
)
PLANS = (1, 32, 256, 1024, 2048)
ROTATED = 160 << 20  # bytes of keys and values that a graph walks over, three times the L2 cache
BLOCK = 16
COPY = 3.0e12  # bytes per second, read and written, of a device copy on an H100
ROOM = 8192


def ints(values: list[int]) -> torch.Tensor:
    """On the GPU."""
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def decode(model: str, batch: int, context: int, kv: torch.dtype = torch.bfloat16, queries: int = 1) -> tuple[float, float]:
    """Seconds of a call, and the bytes of keys and values that it reads."""
    heads, kv_heads, head_dim = map(int, model.split("/"))
    blocks = -(-context // BLOCK)
    per_call = batch * context * kv_heads * head_dim * 2 * kv.itemsize
    sets = max(2, -(-ROTATED // per_call)) if batch * context < 200_000 else 1
    shape = (sets * batch * blocks, BLOCK, kv_heads, head_dim)
    k, v = (torch.randn(shape, device="cuda", dtype=torch.bfloat16).to(kv) for _ in range(2))
    tables = torch.randperm(shape[0], device="cuda").to(torch.int32).view(sets * batch, blocks)
    q = torch.randn(batch * queries, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(q)
    starts, contexts = ints([i * queries for i in range(batch + 1)]), ints([context] * batch)
    work = torch.zeros(work_ints(batch, batch * queries), dtype=torch.int32, device="cuda")
    partials = torch.empty(partial_floats(ROOM, heads, kv_heads, head_dim), device="cuda")
    ops.attention_plan(work, starts, contexts, heads, kv_heads, head_dim, 0, queries, ROOM)
    rows = [torch.arange(i * batch, (i + 1) * batch, dtype=torch.int32, device="cuda") for i in range(sets)]

    def call(row: torch.Tensor) -> Callable[[], None]:
        return lambda: ops.paged_attention(
            out, q, k, v, tables, row, starts, contexts, head_dim**-0.5, 0, 0.0, None, 1.0, 1.0, work, partials, queries
        )

    calls = [call(row) for row in rows]
    return seconds(calls * max(1, 20 // len(calls))), per_call


def shares(time: float, size: float) -> tuple[str, str, str]:
    """Microseconds, TB/s and the share of the copy's bandwidth."""
    return f"{time * 1e6:.1f}", f"{size / time / 1e12:.2f}", f"{size / COPY / time:.2f}"


def plan(num_seqs: int, context: int) -> float:
    """Seconds of attention_plan alone."""
    starts, contexts = ints(list(range(num_seqs + 1))), ints([context + i % 100 for i in range(num_seqs)])
    works = [torch.zeros(work_ints(num_seqs, num_seqs), dtype=torch.int32, device="cuda") for _ in range(2)]
    return seconds([lambda work=work: ops.attention_plan(work, starts, contexts, 32, 8, 128, 0, 1, ROOM) for work in works] * 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", action="append", choices=list(PEER), help="query heads / KV heads / head_dim; all by default")
    chosen = parser.parse_args().heads or list(PEER)
    ops.load_cuda()
    torch.manual_seed(0)
    found: dict[str, dict[str, object]] = {}
    print(f"{torch.cuda.get_device_name()}: decode attention, bfloat16, blocks of {BLOCK}\n")
    line = "{:>10} {:>12} {:>9} {:>7} {:>9} {:>9} {:>9}"
    print(line.format("heads", "shape", "us", "TB/s", "of copy", "peer us", "of peer"))
    for model in chosen:
        for (batch, context), peer in zip(SHAPES, PEER[model], strict=True):
            time, size = decode(model, batch, context)
            torch.cuda.empty_cache()
            print(line.format(model, f"{batch} x {context}", *shares(time, size), peer, f"{time * 1e6 / peer:.2f}"), flush=True)
            found[f"decode {model} {batch}x{context}"] = {"value": round(time * 1e6, 2), "unit": "us", "peer": peer}
    print("\n" + line.format("heads", "shape", "us", "TB/s", "of copy", "", ""))
    extra = [(m, s, torch.float8_e4m3fn, 1) for m, s in MORE] + [(m, s, torch.bfloat16, 1) for m, s in OTHERS]
    extra += [("32/8/128", (32, 1024), torch.bfloat16, 4), ("32/8/128", (32, 1024), torch.bfloat16, 8)]
    for model, (batch, context), kv, queries in extra:
        time, size = decode(model, batch, context, kv, queries)
        torch.cuda.empty_cache()
        cache = "e4m3" if kv.itemsize == 1 else ""
        print(line.format(model, f"{batch} x {context}", *shares(time, size), cache, f"q {queries}"), flush=True)
        name = " ".join(filter(None, (model, f"{batch}x{context}", cache, f"{queries} tokens" if queries > 1 else "")))
        found[f"decode {name}"] = {"value": round(time * 1e6, 2), "unit": "us", "floor": round(size / COPY * 1e6, 2)}
    print("\nplan, us: ", end="")
    for num_seqs in PLANS:
        time = plan(num_seqs, 600)
        print(f"{num_seqs} sequences {time * 1e6:.2f}", end="; ", flush=True)
        found[f"plan {num_seqs}"] = {"value": round(time * 1e6, 2), "unit": "us"}
    print("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
