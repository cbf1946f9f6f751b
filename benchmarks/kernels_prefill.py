"""Speed of prefill attention over a paged cache on this GPU, beside torch's attention over contiguous keys.

Every figure is the median replay of a CUDA graph of calls over rotating tensors, with blocks of 16 tokens. Two columns are ours:
the kernel that the operator chooses for this GPU, and the same step with ALiBi, which the kernel for Hopper does not take: so the
portable one (mma.sync) is measured too, slopes included. A layer's queries lie in one tensor with its keys and values, those of
the tables alone; one more figure says what that changes. The peer is FlashAttention 3, measured on an H100 with the same blocks.
Prints tables for people and one JSON object as the last line:

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
from timing import seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo import ops
from octavo.ops.attention import partial_floats, work_ints

SHAPES = ((16, 128), (16, 512), (8, 1024), (4, 2048), (2, 8192), (1, 32768))  # prompts, tokens each
HEADS = ("32/8/128", "16/8/128", "32/8/64", "16/8/256", "32/32/96")  # query heads, KV heads, head_dim
PEER = {  # TFLOP/s of FlashAttention 3 by SHAPES
    "32/8/128": (30, 199, 313, 430, 625, 620),
    "32/8/64": (14, 108, 174, 255, 442, 484),
}
ROTATED = 128 << 20  # bytes that a graph walks over, more than twice the L2 cache
CEILING = 650  # TFLOP/s of large bfloat16 products on an H100
DTYPE = torch.bfloat16
BLOCK_SIZE = 16
PARTIALS = 1024


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

    def __init__(self, model: Model, sequences: list[tuple[int, int]], kv: torch.dtype = DTYPE, alibi: bool = False,
                 act: torch.dtype = DTYPE, joined: bool = False) -> None:
        """joined: queries are a part of the rows that a layer's first product makes, so the next row's do not follow them."""
        tokens, longest = sum(new for new, _ in sequences), max(keys for _, keys in sequences)
        needed = [-(-keys // BLOCK_SIZE) for _, keys in sequences]
        width = -(-longest // BLOCK_SIZE)
        self.model, self.max_query = model, max(new for new, _ in sequences)
        heads = model.heads + (2 * model.kv_heads if joined else 0)
        self.q = torch.randn(tokens, heads, model.head_dim, device="cuda").to(act)[:, : model.heads]
        self.out = torch.empty(self.q.shape, device="cuda", dtype=act)
        shape = (sum(needed), BLOCK_SIZE, model.kv_heads, model.head_dim)
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
        self.slopes = torch.rand(model.heads, device="cuda") if alibi else None
        self.work = torch.zeros(work_ints(len(needed), tokens), dtype=torch.int32, device="cuda")
        self.partials = torch.empty(partial_floats(PARTIALS, model.heads, model.kv_heads, model.head_dim), device="cuda")
        self.plan()

    def plan(self) -> None:
        m = self.model
        ops.attention_plan(self.work, self.starts, self.contexts, m.heads, m.kv_heads, m.head_dim, 0, self.max_query, PARTIALS)

    def __call__(self) -> None:
        ops.paged_attention(
            self.out, self.q, self.k, self.v, self.tables, self.rows, self.starts, self.contexts, self.model.head_dim**-0.5, 0,
            0.0, self.slopes, 1.0, 1.0, self.work, self.partials, self.max_query,
        )


def paged_seconds(
    model: Model, sequences: list[tuple[int, int]], kv: torch.dtype = DTYPE, alibi: bool = False, joined: bool = False
) -> float:
    tokens = sum(new for new, _ in sequences)
    keys = sum(keys for _, keys in sequences)
    size = 4 * tokens * model.heads * model.head_dim + 4 * keys * model.kv_heads * model.head_dim
    sets = [Paged(model, sequences, kv, alibi, joined=joined) for _ in range(max(1, min(8, math.ceil(ROTATED / size))))]
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
    print(f"{'prompts':>10} {'us':>9} {'ours':>7} {'ALiBi':>9} {'FA3':>6} {'torch FA2':>10} {'cuDNN':>7}")
    for i, (batch, length) in enumerate(SHAPES):
        sequences = [(length, length)] * batch
        work = model.flops(sequences) / 1e12
        ours, portable = paged_seconds(model, sequences), paged_seconds(model, sequences, alibi=True)
        flash = torch_seconds(model, batch, length, SDPBackend.FLASH_ATTENTION)
        cudnn = torch_seconds(model, batch, length, SDPBackend.CUDNN_ATTENTION)
        peer = PEER[name][i] if name in PEER else math.nan
        print(f"{batch:>4} x {length:<5}{1e6 * ours:9.1f} {work / ours:7.0f} {work / portable:9.0f} {peer:6.0f} "
              f"{work / flash:10.0f} {work / cudnn:7.0f}", flush=True)
        for label, time in (("", ours), (" ALiBi", portable)):
            beside = {"ceiling": CEILING} if math.isnan(peer) else {"peer": peer}
            figures[f"prefill {name} {batch}x{length}{label}"] = {"value": round(work / time, 1), "unit": "TFLOP/s", **beside}


def mixed(name: str, figures: dict[str, dict[str, object]]) -> None:
    """Chunks of 256 and 512 tokens after 1,024 and 8,192 that are cached, an 8-bit cache, and queries as a layer has them."""
    model = Model(*(int(part) for part in name.split("/")))
    for label, sequences, kv, alibi, joined in (
        ("2 chunks of 256 over 1k", [(256, 1280)] * 2, DTYPE, False, False),
        ("2 chunks of 256 over 1k, ALiBi", [(256, 1280)] * 2, DTYPE, True, False),
        ("4 chunks of 512 over 8k", [(512, 8704)] * 4, DTYPE, False, False),
        ("2 x 8192, q joined with k and v", [(8192, 8192)] * 2, DTYPE, False, True),
        ("4 x 2048, e4m3 cache", [(2048, 2048)] * 4, torch.float8_e4m3fn, False, False),
        ("16 x 512, e4m3 cache", [(512, 512)] * 16, torch.float8_e4m3fn, False, False),
    ):
        time, work = paged_seconds(model, sequences, kv, alibi, joined), model.flops(sequences) / 1e12
        print(f"{name} {label}: {1e6 * time:.1f} us, {work / time:.0f} TFLOP/s", flush=True)
        figures[f"prefill {name} {label}"] = {"value": round(work / time, 1), "unit": "TFLOP/s", "ceiling": CEILING}


def others(figures: dict[str, dict[str, object]]) -> None:
    """The list of work, which is made once a step, and the plain kernel that float32 has."""
    model = Model(32, 8, 128)
    step = Paged(model, [(1, 600)] * 256 + [(256, 1280)] * 2)
    plain = [Paged(model, sequences, torch.float32, act=torch.float32) for sequences in ([(1, 1024)] * 64, [(512, 512)] * 2)]
    print()
    for name, time in (
        ("plan of 256 decodes and 2 chunks", seconds([step.plan] * 20)),
        ("float32: 64 decodes over 1k", seconds([plain[0]] * 4)),
        ("float32: 2 prompts of 512", seconds([plain[1]] * 4)),
    ):
        print(f"{name}: {1e6 * time:.1f} us")
        figures[f"prefill {name}"] = {"value": round(1e6 * time, 1), "unit": "us"}


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
    others(figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
