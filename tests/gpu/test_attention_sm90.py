"""Prefill attention on Hopper: paged_attention for sequences with more than eight new tokens, where the device is of 9.0.

The other sequences of a step belong to the decode kernel; they are mixed in here and their rows are not looked at.
"""

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

import octavo.ops as ops
from octavo.ops.attention import work_ints

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a GPU of compute capability 9.0"
)
DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module", autouse=True)
def cuda_kernels() -> None:
    ops.load_cuda()


@dataclass
class Step:
    """One call of paged_attention. lengths: (new tokens, context) of every sequence."""

    lengths: list[tuple[int, int]]
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 128
    block_size: int = 16
    dtype: torch.dtype = torch.bfloat16
    window: int = 0
    softcap: float = 0.0
    spread: float = 1.0
    padding: int = 5  # rows of no sequence behind the last one
    seed: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        g = torch.Generator(device="cuda").manual_seed(self.seed)
        tokens = sum(n for n, _ in self.lengths)
        blocks = [math.ceil(c / self.block_size) for _, c in self.lengths]
        total = sum(blocks) + 3
        shape = (total, self.block_size, self.kv_heads, self.head_dim)
        # NaN wherever no token was written: unused blocks and what lies behind a context in its last block.
        caches = [torch.full(shape, math.nan, dtype=self.dtype, device="cuda") for _ in range(2)]
        order = torch.randperm(total, generator=torch.Generator().manual_seed(self.seed)).tolist()
        tables = torch.full((len(blocks) + 2, max(blocks) + 2), 10**6, dtype=torch.int32)
        rows = list(range(len(blocks)))[::-1]
        for (_, context), count, row in zip(self.lengths, blocks, rows, strict=True):
            mine = [order.pop() for _ in range(count)]
            tables[row, :count] = torch.tensor(mine, dtype=torch.int32)
            for cache in caches:
                values = torch.randn(count * self.block_size, self.kv_heads, self.head_dim, generator=g, device="cuda")
                values[context:] = math.nan
                cache[torch.tensor(mine, device="cuda")] = values.view(count, *shape[1:]).to(self.dtype)
        width = (self.heads + 2 * self.kv_heads) * self.head_dim  # q is a part of the rows of a larger tensor
        qkv = torch.randn(tokens + self.padding, width, generator=g, device="cuda").mul_(self.spread).to(self.dtype)
        starts = [0, *itertools.accumulate(n for n, _ in self.lengths)]
        self.tensors = {
            "q": qkv[:, : self.heads * self.head_dim].unflatten(1, (self.heads, self.head_dim)),
            "k_cache": caches[0], "v_cache": caches[1], "block_tables": tables.cuda(),
            "rows": torch.tensor(rows, dtype=torch.int32).cuda(),
            "query_start": torch.tensor(starts, dtype=torch.int32).cuda(),
            "context_len": torch.tensor([c for _, c in self.lengths], dtype=torch.int32).cuda(),
            "work": torch.full((work_ints(len(blocks), tokens + self.padding),), -7, dtype=torch.int32).cuda(),
            "partials": torch.empty(1 << 20).cuda(),
        }

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def max_query(self) -> int:
        return max(n for n, _ in self.lengths)

    def plan(self) -> None:
        t = self.tensors
        ops.attention_plan(t["work"], t["query_start"], t["context_len"], self.heads, self.kv_heads, self.head_dim, self.window,
                           self.max_query, len(t["partials"]) // (self.head_dim + 2))

    def attend(self, out: Tensor) -> None:
        t = self.tensors
        ops.paged_attention(out, t["q"], t["k_cache"], t["v_cache"], t["block_tables"], t["rows"], t["query_start"],
                            t["context_len"], self.scale, self.window, self.softcap, None, 1.0, 1.0, t["work"], t["partials"],
                            self.max_query)

    def run(self) -> Tensor:
        out = torch.full(self.tensors["q"].shape, math.nan, dtype=self.dtype, device="cuda")
        self.plan()
        self.attend(out)
        return out

    def expected(self, s: int) -> tuple[Tensor, Tensor]:
        """Float64 result [new tokens, heads, head_dim] of sequence s, and sum of |weight * value|, on the device."""
        t, (n, context) = self.tensors, self.lengths[s]
        start = int(t["query_start"][s])
        group = self.heads // self.kv_heads
        q = t["q"][start : start + n].double().view(n, self.kv_heads, group, self.head_dim)
        keys = torch.arange(context, device="cuda")
        blocks = t["block_tables"][t["rows"][s].long(), keys // self.block_size].long()
        k, v = (t[name][blocks, keys % self.block_size].double() for name in ("k_cache", "v_cache"))
        scores = torch.einsum("nhgd,khd->hgnk", q, k) * self.scale
        if self.softcap > 0:
            scores = self.softcap * torch.tanh(scores / self.softcap)
        distance = torch.arange(context - n, context, device="cuda").unsqueeze(1) - keys
        hidden = (distance < 0) | ((distance >= self.window) if self.window > 0 else False)
        weights = torch.softmax(scores.masked_fill(hidden, -math.inf), -1)
        out, size = (torch.einsum("hgnk,khd->nhgd", weights, x).reshape(n, self.heads, self.head_dim) for x in (v, v.abs()))
        return out, size

    def check(self, out: Tensor) -> None:
        tokens = 0
        # Weights and outputs are rounded to the type: half a unit each, relative to the terms and to the result; the exponential
        # and the sums add some 1e-6, and the factor 2 covers scores whose float32 rounding the exponential magnifies.
        unit = 2.0**-9 if self.dtype == torch.bfloat16 else 2.0**-12
        for s, (n, context) in enumerate(self.lengths):
            got = out[tokens : tokens + n].double()
            tokens += n
            if n <= 8:
                continue
            want, size = self.expected(s)
            wrong = ~((got - want).abs() <= 2 * unit * (size + want.abs()) + 1e-6)
            if wrong.any():
                place = wrong.nonzero()[0].tolist()
                worst = (got - want).abs().max().item()
                pytest.fail(f"{self}: sequence {s} ({n} of {context}): {int(wrong.sum())} of {wrong.numel()} wrong, first at "
                            f"{place}: {got[tuple(place)]:.5f} for {want[tuple(place)]:.5f}; most {worst:.3e}", pytrace=False)
        assert out[tokens:].isnan().all(), "rows of no sequence were written"

    def __repr__(self) -> str:
        return (f"{self.heads}/{self.kv_heads} x {self.head_dim}, page {self.block_size}, {self.dtype}, window {self.window}, "
                f"softcap {self.softcap}, {self.lengths[:6]}")


ODD = [(1, 700), (9, 9), (130, 130), (17, 1003), (3, 3), (257, 513), (64, 64), (300, 429)]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_block_of_keys(head_dim: int, dtype: torch.dtype) -> None:
    step = Step([(128, 128)], heads=1, kv_heads=1, head_dim=head_dim, dtype=dtype)
    step.check(step.run())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128, 256])
def test_blocks_of_the_cache(head_dim: int, dtype: torch.dtype, block_size: int) -> None:
    step = Step(ODD, head_dim=head_dim, dtype=dtype, block_size=block_size)
    step.check(step.run())


@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (10, 2), (14, 2), (16, 2), (9, 1), (32, 8), (48, 1)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_groups_of_heads(heads: tuple[int, int], head_dim: int) -> None:
    step = Step(ODD, heads=heads[0], kv_heads=heads[1], head_dim=head_dim)
    step.check(step.run())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [1, 5, 100, 128, 200, 1000])
def test_window(head_dim: int, window: int) -> None:
    step = Step([*ODD, (20, 2000)], head_dim=head_dim, window=window)
    step.check(step.run())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_softcap(head_dim: int) -> None:
    step = Step(ODD, head_dim=head_dim, softcap=30.0, spread=20.0, window=300)
    step.check(step.run())


@pytest.mark.parametrize("spread", [0.01, 8.0, 60.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_small_scores(spread: float, dtype: torch.dtype) -> None:
    """Scores of 60 standard deviations make the softmax pick one key: the running maximum has to be exact."""
    step = Step([(200, 900), (40, 40)], dtype=dtype, spread=spread)
    step.check(step.run())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_many_tiles_on_every_multiprocessor(head_dim: int) -> None:
    step = Step([(1500, 1500), (700, 2700), *[(10 + 37 * i % 300, 400 + 41 * i % 900) for i in range(60)]], heads=16, kv_heads=4,
                head_dim=head_dim)
    step.check(step.run())


def test_more_rounds_than_a_warp_looks_ahead() -> None:
    """64 sequences of two tiles and 72 heads: 70 rounds for each of 132 multiprocessors. The lists are read for 32 at a time."""
    step = Step([(129 + i, 129 + 2 * i) for i in range(64)], heads=72, kv_heads=72, head_dim=64)
    step.check(step.run())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_same_bits_whatever_is_in_the_batch_and_however_it_is_cut(head_dim: int) -> None:
    """A sequence alone, in the middle of others, and in chunks."""
    n = 500
    whole = Step([(n, n)], heads=6, kv_heads=2, head_dim=head_dim, padding=0)
    alone = whole.run()
    whole.check(alone)
    t = whole.tensors
    for chunks in ([(0, 100), (100, 231), (231, 500)], [(0, 491), (491, 500)]):
        for begin, end in chunks:
            step = Step([(end - begin, end)], heads=6, kv_heads=2, head_dim=head_dim, padding=0)
            step.tensors |= {name: t[name] for name in ("k_cache", "v_cache", "block_tables", "rows")}
            step.tensors["q"] = t["q"][begin:end]
            assert torch.equal(step.run(), alone[begin:end]), (begin, end)
    batch = Step([(33, 90), (n, n), (200, 1000)], heads=6, kv_heads=2, head_dim=head_dim, seed=3)
    mine = batch.tensors["block_tables"][int(batch.tensors["rows"][1])].long()
    theirs = t["block_tables"][int(t["rows"][0])].long()
    for i in range(math.ceil(n / 16)):
        for name in ("k_cache", "v_cache"):
            batch.tensors[name][mine[i]] = t[name][theirs[i]]
    batch.tensors["q"][33 : 33 + n] = t["q"]
    assert torch.equal(batch.run()[33 : 33 + n], alone)
    assert torch.equal(whole.run(), alone)


def test_graph() -> None:
    """Captured once, replayed with other lengths: what the graph reads are tensors, not numbers."""
    step = Step([(300, 300), (100, 900), (9, 50)])
    out = torch.full(step.tensors["q"].shape, math.nan, dtype=step.dtype, device="cuda")
    step.plan()
    step.attend(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.plan()
        step.attend(out)
    for lengths in ([(300, 300), (100, 900), (9, 50)], [(120, 299), (280, 500), (9, 11)]):
        other = Step(lengths, seed=len(lengths))
        for name in ("k_cache", "v_cache"):
            blocks = min(len(step.tensors[name]), len(other.tensors[name]))
            other.tensors["block_tables"].clamp_(max=blocks - 1)
            step.tensors[name][:blocks] = other.tensors[name][:blocks]
        width = min(step.tensors["block_tables"].shape[1], other.tensors["block_tables"].shape[1])
        step.tensors["block_tables"][:, :width] = other.tensors["block_tables"][:, :width]
        for name in ("rows", "query_start", "context_len"):
            step.tensors[name].copy_(other.tensors[name])
        step.lengths = lengths
        out.fill_(math.nan)
        graph.replay()
        used = sum(n for n, _ in lengths)
        expected = torch.full_like(out, math.nan)
        step.plan()
        step.attend(expected)
        assert torch.equal(out[:used], expected[:used])
        step.check(out)


def test_short_work_list_is_an_error() -> None:
    step = Step([(100, 100), (300, 300)])
    step.plan()
    step.tensors["work"] = step.tensors["work"][: work_ints(2, 0)]
    with pytest.raises(RuntimeError, match="work list"):
        step.attend(torch.empty_like(step.tensors["q"]).contiguous())


def test_nothing_to_do() -> None:
    step = Step([(9, 9)])
    step.tensors["context_len"].zero_()
    out = step.run()
    assert out.isnan().all()
