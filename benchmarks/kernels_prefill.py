"""Speed of prefill attention over a paged cache on this GPU, beside torch's attention over contiguous keys.

Every figure is the median replay of a CUDA graph of calls over rotating tensors. Two columns are ours: blocks of 16 tokens, with
the kernel that the operator chooses for this GPU, and blocks of 48, which the kernel for Hopper does not take, so that the
portable one (mma.sync) is measured too. The peer is FlashAttention 3, measured on an H100 with the same blocks of 16. Prints
tables for people and one JSON object as the last line:

    python benchmarks/kernels_prefill.py --heads 32/8/128
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo import ops

SHAPES = ((16, 128), (16, 512), (8, 1024), (4, 2048), (2, 8192), (1, 32768))  # prompts, tokens each
HEADS = ("32/8/128", "16/8/128", "32/8/64")  # query heads, KV heads, head_dim
PEER = {  # TFLOP/s of FlashAttention 3 by SHAPES
    "32/8/128": (30, 199, 313, 430, 625, 620),
    "32/8/64": (14, 108, 174, 255, 442, 484),
}
ROTATED = 128 << 20  # bytes that a graph walks over, more than twice the L2 cache
DTYPE = torch.bfloat16


def seconds(calls: list[Callable[[], object]], repeats: int = 5) -> float:
    """Median time of one call, all of them captured in one graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return sorted(times)[len(times) // 2] / len(calls)


@dataclass(frozen=True)
class Model:
    heads: int
    kv_heads: int
    head_dim: int

    def flops(self, sequences: list[tuple[int, int]]) -> float:
        """Of causal attention of (new tokens, keys) each, half of the square on the diagonal."""
        pairs = sum(new * (keys - new) + new * new / 2 for new, keys in sequences)
        return 4.0 * pairs * self.head_dim * self.heads


class Paged:
    """One set of tensors of a step; calling it runs the operator."""

    def __init__(self, model: Model, sequences: list[tuple[int, int]], block_size: int, kv: torch.dtype = DTYPE) -> None:
        tokens, longest = sum(new for new, _ in sequences), max(keys for _, keys in sequences)
        needed = [-(-keys // block_size) for _, keys in sequences]
        width = -(-longest // block_size)
        self.model, self.max_query = model, max(new for new, _ in sequences)
        self.q = torch.randn(tokens, model.heads, model.head_dim, device="cuda").to(DTYPE)
        self.out = torch.empty_like(self.q)
        shape = (sum(needed), block_size, model.kv_heads, model.head_dim)
        self.k, self.v = (torch.randn(shape, device="cuda").to(kv) for _ in range(2))
        tables = torch.zeros(len(needed), width, dtype=torch.int32)
        for row, blocks in enumerate(torch.randperm(sum(needed)).to(torch.int32).split(needed)):
            tables[row, : len(blocks)] = blocks
        self.tables = tables.cuda()
        self.rows = torch.arange(len(needed), dtype=torch.int32, device="cuda")
        starts = [0]
        for new, _ in sequences:
            starts.append(starts[-1] + new)
        self.starts = torch.tensor(starts, dtype=torch.int32, device="cuda")
        self.contexts = torch.tensor([keys for _, keys in sequences], dtype=torch.int32, device="cuda")
        self.work = torch.zeros(4096 + 128 * len(needed) + 16 * tokens, dtype=torch.int32, device="cuda")
        self.partials = torch.empty(1024 * model.heads * (model.head_dim + 8), device="cuda")
        self.plan()

    def plan(self) -> None:
        m = self.model
        ops.attention_plan(self.work, self.starts, self.contexts, m.heads, m.kv_heads, m.head_dim, 0, self.max_query, 1024)

    def __call__(self) -> None:
        ops.paged_attention(
            self.out, self.q, self.k, self.v, self.tables, self.rows, self.starts, self.contexts, self.model.head_dim**-0.5, 0,
            0.0, None, 1.0, 1.0, self.work, self.partials, self.max_query,
        )


def paged_seconds(model: Model, sequences: list[tuple[int, int]], block_size: int, kv: torch.dtype = DTYPE) -> float:
    tokens = sum(new for new, _ in sequences)
    keys = sum(keys for _, keys in sequences)
    size = 4 * tokens * model.heads * model.head_dim + 4 * keys * model.kv_heads * model.head_dim
    sets = [Paged(model, sequences, block_size, kv) for _ in range(max(1, min(8, math.ceil(ROTATED / size))))]
    return seconds(sets if size >= ROTATED else sets * max(1, 8 // len(sets)))


def torch_seconds(model: Model, batch: int, length: int, backend: SDPBackend) -> float:
    """torch's attention of contiguous prompts, or nan where it refuses."""
    def tensor(heads: int) -> Tensor:
        return torch.randn(batch, heads, length, model.head_dim, device="cuda", dtype=DTYPE)

    size = 4 * batch * length * model.head_dim * (model.heads + model.kv_heads)
    count = max(1, min(8, math.ceil(ROTATED / size)))
    sets = [(tensor(model.heads), tensor(model.kv_heads), tensor(model.kv_heads)) for _ in range(count)]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Callable[[], object]:
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    try:
        with sdpa_kernel(backend):
            return seconds([call(*one) for one in sets])
    except RuntimeError:
        return math.nan


def prompts(name: str, figures: dict[str, dict[str, object]]) -> None:
    """The table of one model: TFLOP/s by shape."""
    model = Model(*(int(part) for part in name.split("/")))
    print(f"\nprefill {name} (query heads / KV heads / head_dim), TFLOP/s")
    print(f"{'prompts':>10} {'us':>9} {'ours':>7} {'mma.sync':>9} {'FA3':>6} {'torch FA2':>10} {'cuDNN':>7}")
    for i, (batch, length) in enumerate(SHAPES):
        sequences = [(length, length)] * batch
        work = model.flops(sequences) / 1e12
        ours, portable = paged_seconds(model, sequences, 16), paged_seconds(model, sequences, 48)
        flash = torch_seconds(model, batch, length, SDPBackend.FLASH_ATTENTION)
        cudnn = torch_seconds(model, batch, length, SDPBackend.CUDNN_ATTENTION)
        peer = PEER[name][i] if name in PEER else math.nan
        print(f"{batch:>4} x {length:<5}{1e6 * ours:9.1f} {work / ours:7.0f} {work / portable:9.0f} {peer:6.0f} "
              f"{work / flash:10.0f} {work / cudnn:7.0f}", flush=True)
        for label, time in (("", ours), (" mma.sync", portable)):
            figure: dict[str, object] = {"value": round(work / time, 1), "unit": "TFLOP/s"}
            if peer == peer:
                figure["peer"] = peer
            figures[f"prefill {name} {batch}x{length}{label}"] = figure


def mixed(name: str, figures: dict[str, dict[str, object]]) -> None:
    """Two chunks of 256 tokens after 1,024 that are cached, and prompts with an 8-bit cache."""
    model = Model(*(int(part) for part in name.split("/")))
    for label, sequences, block_size, kv in (
        ("2 chunks of 256 over 1k", [(256, 1280)] * 2, 16, DTYPE),
        ("2 chunks of 256 over 1k, mma.sync", [(256, 1280)] * 2, 48, DTYPE),
        ("4 x 2048, e4m3 cache", [(2048, 2048)] * 4, 16, torch.float8_e4m3fn),
        ("16 x 512, e4m3 cache", [(512, 512)] * 16, 16, torch.float8_e4m3fn),
    ):
        time, work = paged_seconds(model, sequences, block_size, kv), model.flops(sequences) / 1e12
        print(f"{name} {label}: {1e6 * time:.1f} us, {work / time:.0f} TFLOP/s", flush=True)
        figures[f"prefill {name} {label}"] = {"value": round(work / time, 1), "unit": "TFLOP/s"}


def plan_time(figures: dict[str, dict[str, object]]) -> None:
    """The list of work of a step with 256 decodes and two chunks, made once a step."""
    step = Paged(Model(32, 8, 128), [(1, 600)] * 256 + [(256, 1280)] * 2, 16)
    time = seconds([step.plan] * 20)
    print(f"\nplan of 256 decodes and 2 chunks: {1e6 * time:.1f} us")
    figures["attention plan"] = {"value": round(1e6 * time, 2), "unit": "us"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--heads", default=",".join(HEADS), help="query heads/KV heads/head_dim, by comma")
    args = parser.parse_args()
    ops.load_cuda()
    torch.manual_seed(0)
    figures: dict[str, dict[str, object]] = {}
    for name in args.heads.split(","):
        prompts(name, figures)
        mixed(name, figures)
    plan_time(figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
