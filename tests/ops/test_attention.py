"""Paged attention: the values against float64, and the promise that a query's bits depend on nothing but its own keys.

Every cache is poisoned: cells that no token was written to hold NaN, blocks that no sequence owns too, and the unused
entries of the block tables name no block at all.
"""

from dataclasses import dataclass, field, replace
from itertools import accumulate

import pytest
import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_BLOCK = -7


@dataclass(frozen=True)
class Case:
    """A step: (new tokens, keys) per sequence, and the model's side of attention."""

    sequences: tuple[tuple[int, int], ...]
    heads: tuple[int, int] = (9, 3)
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False
    seed: int = 0


@dataclass
class Step:
    """The tensors of a Case; run() calls the operator on a poisoned output."""

    case: Case
    q: torch.Tensor = field(init=False)
    k: torch.Tensor = field(init=False)
    v: torch.Tensor = field(init=False)

    def __post_init__(self):
        case = self.case
        heads, kv_heads = case.heads
        random = torch.Generator().manual_seed(case.seed)
        needed = [-(-keys // case.block_size) for _, keys in case.sequences]
        num_rows, num_blocks = len(needed) + 2, sum(needed) + 2
        owned = iter(torch.randperm(num_blocks, generator=random).tolist())
        shape = (num_blocks, case.block_size, kv_heads, case.head_dim)
        self.k = torch.full(shape, float("nan"), dtype=case.dtype)
        self.v = self.k.clone()
        self.tables = torch.full((num_rows, max(needed) + 1), NO_BLOCK, dtype=torch.int32)
        self.rows = torch.randperm(num_rows, generator=random)[: len(needed)].to(torch.int32)
        for row, (_, keys) in zip(self.rows.tolist(), case.sequences, strict=True):
            for start in range(0, keys, case.block_size):
                block, used = next(owned), min(case.block_size, keys - start)
                self.tables[row, start // case.block_size] = block
                for cache in (self.k, self.v):
                    cache[block, :used] = torch.randn(used, kv_heads, case.head_dim, generator=random).to(case.dtype)
        counts = [new for new, _ in case.sequences]
        self.starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
        self.contexts = torch.tensor([keys for _, keys in case.sequences], dtype=torch.int32)
        # q is a slice of a fused projection in real life: its rows are further apart than they are long
        self.q = torch.randn(sum(counts), heads + 2, case.head_dim, generator=random)[:, :heads]
        self.slopes = torch.rand(heads, generator=random) if case.alibi else None

    def call(self, ops, q, rows, starts, contexts):
        out = torch.full(q.shape, float("nan"))
        ops.paged_attention(
            out, q, self.k, self.v, self.tables, rows, starts, contexts, self.case.head_dim**-0.5, self.case.window,
            self.case.softcap, self.slopes,
        )
        return out

    def run(self, ops):
        return self.call(ops, self.q, self.rows, self.starts, self.contexts)

    def run_part(self, ops, sequence, begin, end):
        """Queries [begin, end) of one sequence's new tokens, alone, as if the later ones did not exist yet."""
        start, new = int(self.starts[sequence]), self.case.sequences[sequence][0]
        context = self.contexts[sequence : sequence + 1] - (new - end)
        starts = torch.tensor([0, end - begin], dtype=torch.int32)
        return self.call(ops, self.q[start + begin : start + end], self.rows[sequence : sequence + 1], starts, context)

    def oracle(self):
        """Softmax over all visible keys at once, in float64."""
        case, group = self.case, self.case.heads[0] // self.case.heads[1]
        out = torch.empty(self.q.shape, dtype=torch.float64)
        for s, (new, keys) in enumerate(case.sequences):
            j = torch.arange(keys)
            blocks = self.tables[self.rows[s], j // case.block_size].long()
            k, v = (x[blocks, j % case.block_size].double().repeat_interleave(group, 1) for x in (self.k, self.v))
            part = slice(int(self.starts[s]), int(self.starts[s + 1]))
            scores = torch.einsum("qhd,khd->hqk", self.q[part].double(), k) * case.head_dim**-0.5
            if case.softcap > 0:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            distance = torch.arange(keys - new, keys).unsqueeze(1) - j
            if self.slopes is not None:
                scores = scores - self.slopes.double().view(-1, 1, 1) * distance
            hidden = (distance < 0) | ((distance >= case.window) if case.window else False)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            out[part] = torch.einsum("hqk,khd->qhd", weights, v)
        return out


MIXED = ((1, 1), (1, 300), (7, 7), (70, 600), (0, 0), (0, 5), (3, 3), (1, 256), (1, 257), (5, 512))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(9, 3), (4, 4), (8, 1)])
def test_a_mixed_step_agrees_with_float64(impl, dtype, heads):
    step = Step(Case(MIXED, heads=heads, dtype=dtype))
    torch.testing.assert_close(step.run(impl).double(), step.oracle(), atol=4e-6, rtol=0)


@pytest.mark.parametrize("head_dim", [16, 24, 32, 40, 64, 72, 80, 96, 128, 192, 256, 1, 7, 12, 65])
def test_every_head_dim(impl, head_dim):
    step = Step(Case(((1, 40), (30, 290)), heads=(4, 2), head_dim=head_dim, dtype=torch.bfloat16, seed=1))
    torch.testing.assert_close(step.run(impl).double(), step.oracle(), atol=4e-6, rtol=0)


@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128, 5])
def test_every_block_size(impl, block_size):
    step = Step(Case(((1, 129), (33, 270), (2, 2)), block_size=block_size, seed=2))
    torch.testing.assert_close(step.run(impl).double(), step.oracle(), atol=4e-6, rtol=0)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("window", [0, 1, 2, 17, 64, 255, 256, 257, 400])
def test_windows_soft_caps_and_slopes(impl, window, alibi, softcap):
    step = Step(Case(((1, 700), (40, 600), (3, 3)), window=window, alibi=alibi, softcap=softcap, seed=3))
    torch.testing.assert_close(step.run(impl).double(), step.oracle(), atol=6e-6, rtol=0)


def test_single_tokens_of_many_heads(impl, on_threads):
    step = Step(Case(((1, 300), (1, 77), (1, 256)), heads=(32, 8), head_dim=128, dtype=torch.bfloat16, alibi=True, seed=11))
    for threads in (1, 3):  # one thread takes all kv heads of a token at once, several share them
        torch.testing.assert_close(on_threads(threads, lambda: step.run(impl)).double(), step.oracle(), atol=4e-6, rtol=0)


def test_more_heads_share_a_kv_head_than_a_tile_has_rows(impl):
    step = Step(Case(((2, 300), (1, 10)), heads=(70, 1), head_dim=16, seed=4))
    torch.testing.assert_close(step.run(impl).double(), step.oracle(), atol=4e-6, rtol=0)


def test_large_scores_do_not_overflow(impl):
    step = Step(Case(((20, 400),), seed=5))
    step.q = step.q * 100
    torch.testing.assert_close(step.run(impl).double(), step.oracle(), atol=2e-4, rtol=0)


def test_a_single_key_gives_its_value(impl):
    step = Step(Case(((1, 1),), heads=(3, 3), seed=6))
    assert torch.equal(step.run(impl)[0], step.v[step.tables[step.rows[0], 0].long(), 0])


def test_a_step_without_tokens(impl):
    assert Step(Case(((0, 5), (0, 0)))).run(impl).shape == (0, 9, 64)


# Bits


VARIANTS = {
    "float32": Case(MIXED),
    "bfloat16": Case(MIXED, dtype=torch.bfloat16),
    "float16, odd head_dim": Case(MIXED, dtype=torch.float16, head_dim=40, heads=(8, 2)),
    "bfloat16, a head_dim without pairs": Case(MIXED, dtype=torch.bfloat16, head_dim=65, heads=(14, 2)),
    "bfloat16, half a vector of pairs": Case(MIXED, dtype=torch.bfloat16, head_dim=80, heads=(4, 2)),
    "more kv heads than a unit takes": Case(MIXED, head_dim=16, heads=(70, 70)),
    "window": Case(MIXED, window=100),
    "window over partitions": Case(MIXED, window=300, block_size=8),
    "everything": Case(MIXED, window=200, softcap=20.0, alibi=True, heads=(4, 4), head_dim=72),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_alone_and_in_a_batch_are_the_same_bits(kernels, name):
    step = Step(VARIANTS[name])
    whole = step.run(kernels)
    for s, (new, _) in enumerate(step.case.sequences):
        alone = step.run_part(kernels, s, 0, new)
        assert torch.equal(alone, whole[step.starts[s] : step.starts[s + 1]]), f"sequence {s}"


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 300])
@pytest.mark.parametrize("name", VARIANTS)
def test_chunks_and_the_whole_are_the_same_bits(kernels, name, chunk):
    step = Step(replace(VARIANTS[name], sequences=((330, 530),), seed=7))
    whole = step.run(kernels)
    parts = [step.run_part(kernels, 0, begin, min(begin + chunk, 330)) for begin in range(0, 330, chunk)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("sequences", [MIXED, ((1, 3000),), ((1, 2000), (1, 900)), ((1, 700),) * 7, ((40, 1500),), ((330, 330),)])
@pytest.mark.parametrize("window", [0, 700])
def test_threads_do_not_change_bits(kernels, on_threads, sequences, window):
    step = Step(Case(sequences, window=window, dtype=torch.bfloat16, seed=8))
    first, *others = (on_threads(count, lambda: step.run(kernels)) for count in (1, 2, 3))
    for other in others:
        assert torch.equal(other, first)


def test_what_comes_later_cannot_be_felt(kernels):
    step = Step(Case(((100, 300),), seed=9))
    before = step.run(kernels)
    last = step.tables[step.rows[0], 299 // 16].long(), 299 % 16
    step.k[last], step.v[last] = float("nan"), float("inf")
    after = step.run(kernels)
    assert torch.equal(after[:-1], before[:-1]) and not after[-1].isfinite().any()


def test_what_left_the_window_is_not_read(kernels):
    step = Step(Case(((3, 1000),), window=50, seed=10))
    before = step.run(kernels)
    row = step.rows[0]
    first = 1000 - 3 - 50 + 1  # the oldest key that a query sees
    for block in step.tables[row, : first // 16].long():
        step.k[block], step.v[block] = float("nan"), float("nan")
    step.tables[row, : first // 16] = NO_BLOCK
    assert torch.equal(step.run(kernels), before)


def test_a_block_outside_the_cache_is_an_error(kernels):
    step = Step(Case(((1, 40),)))
    step.tables[step.rows[0], 1] = 99
    with pytest.raises(RuntimeError, match=r"paged_attention: block_tables names block 99, but the cache has 5"):
        step.run(kernels)
