"""Prefill attention on tensor cores, and the plain kernel, against float64; and what both promise by the bit.

Tolerances: the scores and the softmax are float32, within 1e-5 of the sum of the weighted |values| here. On tensor cores the
weights are rounded to the type of q (half a unit: 2^-8 for bfloat16, 2^-11 for float16, whose smallest weights are also cut at
2^-25 each), and the output once more.

ALiBi slopes, be they zero, keep a step from the kernel for Hopper: so the portable one is tested there too.
"""

import math
from dataclasses import dataclass, replace

import pytest
import steps
import torch
from steps import BF16, E4M3, F16, F32, NO_BLOCK

import octavo.ops as ops
from octavo.errors import ConfigError
from octavo.ops.attention import partial_floats, work_ints

try:
    ops.load_cuda()
except ConfigError as error:
    pytest.skip(str(error), allow_module_level=True)

PARTIALS = 512  # room for so many
SHORT = 8  # sequences with up to so many new tokens are the decode kernel's
ROUNDING = {BF16: 2.0**-8, F16: 2.0**-11, F32: 2.0**-24}
# (new tokens, keys); a context of 0 is padding
MIXED = ((9, 9), (1, 300), (70, 600), (1, 0), (33, 33), (128, 128), (8, 100), (129, 640), (16, 16), (300, 300), (17, 513))


@dataclass(frozen=True)
class Case(steps.Case):
    """With the sequences that are taken where nothing else is said."""

    sequences: tuple[tuple[int, int], ...] = MIXED


class Step(steps.Step):
    """A step that plans and calls the operator on a poisoned output."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, whole_blocks=True, gap=2, random_slopes=True)

    def call(self, q, rows, starts, contexts, max_query):
        """The operator on poisoned memory."""
        out = torch.full(q.shape, math.nan, dtype=self.case.act, device="cuda")
        work, partials = scratch(self, len(rows), len(q))
        plan_and_run(self, out, q, rows, starts, contexts, max_query, work, partials)
        return out

    def run(self):
        return self.call(self.q, self.rows, self.starts, self.contexts, max(new for new, _ in self.case.sequences))

    def run_part(self, sequence, begin, end):
        """Queries [begin, end) of one sequence's new tokens, alone, as if the later ones did not exist yet."""
        start, new = int(self.starts[sequence]), self.case.sequences[sequence][0]
        contexts = self.contexts[sequence : sequence + 1] - (new - end)
        starts = torch.tensor([0, end - begin], dtype=torch.int32, device="cuda")
        return self.call(self.q[start + begin : start + end], self.rows[sequence : sequence + 1], starts, contexts, end - begin)

    def check(self, out, tensor_cores=True):
        """Every output that belongs to the kernels of this file is near the oracle; rows of padding are as they were."""
        bad = []
        for s, (new, keys) in enumerate(self.case.sequences):
            got = out[self.tokens(s)]
            if keys == 0:
                if not got.isnan().all():
                    bad.append(f"sequence {s}: padding was written")
                continue
            if new == 0 or (tensor_cores and new <= SHORT):
                continue
            want, weighted = self.oracle(s)
            unit = ROUNDING[self.case.act]
            floor = 5e-5 if self.case.act == F16 else 1e-6
            bound = 1.1 * unit * want.abs() + (1.1 * unit * tensor_cores + 1e-5) * weighted + floor
            wrong = ~((got.double() - want).abs() <= bound)
            if wrong.any():
                at = wrong.nonzero()[0].tolist()
                bad.append(f"sequence {s} {new, keys}: {int(wrong.sum())} of {wrong.numel()} wrong, first at {at}: "
                           f"{float(got[tuple(at)])} instead of {float(want[tuple(at)])}")
        assert not bad, f"{self.case}\n" + "\n".join(bad)


def scratch(step, num_seqs, num_tokens):
    """A work list and partial results as the worker makes them, full of rubbish."""
    work = torch.full((work_ints(num_seqs, num_tokens),), 0x7F7F7F7F, dtype=torch.int32, device="cuda")
    floats = partial_floats(PARTIALS, *step.case.heads, min(step.case.head_dim, 256))
    return work, torch.full((floats,), math.nan, device="cuda")


def plan_and_run(step, out, q, rows, starts, contexts, max_query, work, partials):
    case, (heads, kv_heads) = step.case, step.case.heads
    ops.attention_plan(work, starts, contexts, heads, kv_heads, case.head_dim, case.window, max_query, PARTIALS)
    ops.paged_attention(
        out, q, step.k, step.v, step.tables, rows, starts, contexts, case.head_dim**-0.5, case.window, case.softcap, step.slopes,
        *step.scales, work, partials, max_query,
    )


def both(x, y):
    """Equal to the bit."""
    return torch.equal(x.view(torch.uint8), y.view(torch.uint8))


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 192, 256, 16, 48, 176])
@pytest.mark.parametrize("act, kv", [(BF16, None), (F16, None), (BF16, E4M3), (F16, E4M3)])
def test_every_type_and_head_dim(act, kv, head_dim, portable):
    step = Step(Case(act=act, kv=kv, head_dim=head_dim, portable=portable))
    step.check(step.run())


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("heads", [(32, 8), (8, 8), (9, 3), (28, 4), (16, 1), (70, 1), (3, 3), (130, 1)])
def test_every_group(heads, portable):
    step = Step(Case(heads=heads, head_dim=64, portable=portable, seed=1))
    step.check(step.run())


@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("portable, kv", [(False, None), (True, None), (False, E4M3)])
def test_every_block_size(block_size, kv, portable):
    step = Step(Case(block_size=block_size, kv=kv, portable=portable, seed=2))
    step.check(step.run())


@pytest.mark.parametrize("head_dim, portable", [(64, True), (96, False), (128, True), (128, False), (256, True)])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("window", [0, 1, 2, 17, 63, 64, 65, 128, 257, 400])
def test_windows_soft_caps_and_slopes(window, alibi, softcap, head_dim, portable):
    step = Step(Case(((200, 700), (40, 600), (100, 100)), (4, 2), head_dim, window=window, alibi=alibi, portable=portable,
                     softcap=softcap, seed=3))
    step.check(step.run())


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("act, kv", [(BF16, None), (F16, E4M3)])
def test_tiles_of_128_rows_and_long_prompts(act, kv, head_dim, portable):
    sequences = ((1500, 1500), (600, 2000), (31, 3000), (277, 277))
    step = Step(Case(sequences, (32, 8), head_dim, act, kv, portable=portable, seed=4))
    step.check(step.run())


@pytest.mark.parametrize("portable", [False, True])
def test_large_scores(portable):
    step = Step(Case(size=30.0, portable=portable, seed=5))
    step.check(step.run())


def test_a_few_tokens_over_a_long_context():
    step = Step(Case(((9, 9000), (65, 20000)), portable=True, seed=6))
    step.check(step.run())


def test_a_thousand_decodes_and_three_chunks():
    sequences = ((1, 20),) * 700 + ((40, 90),) + ((1, 7),) * 500 + ((11, 300), (1, 0), (200, 200))
    step = Step(Case(sequences, (4, 2), 64, portable=True, seed=7))
    step.check(step.run())


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("kv, window, alibi", [(None, 0, False), (None, 100, False), (E4M3, 0, True)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_bits_do_not_depend_on_the_batch_or_on_chunks(head_dim, kv, window, alibi, portable):
    """On an H100 the whole step has tiles of 128 rows, unless head_dim is 256, and its parts have tiles of 64."""
    longest = 8000 if head_dim == 64 else 1349
    step = Step(Case(((700, 700), (150, 400), (1, 50), (longest, longest)), (32, 8), head_dim, kv=kv, window=window, alibi=alibi,
                     portable=portable, seed=8))
    whole = step.run()
    assert both(whole, step.run())
    for s, begin, end in ((0, 0, 700), (1, 0, 150), (1, 13, 141), (0, 300, 309), (0, 511, 700), (3, 1000, 1349)):
        part = whole[step.tokens(s)][begin:end]
        assert both(part, step.run_part(s, begin, end)), f"sequence {s}, tokens {begin} to {end}"


@pytest.mark.parametrize("portable", [False, True])
def test_a_graph_is_replayed_with_other_lengths(portable):
    tokens, seqs = 512, 12
    steps = [
        Step(Case(((200, 500), (1, 40), (3, 90), (9, 9), (128, 128), (60, 1000)), portable=portable, seed=9)),
        Step(Case(((500, 900), (12, 13)), portable=portable, seed=10)),
        Step(Case(((1, 30),) * 12, portable=portable, seed=11)),
        Step(Case(tuple((30 + i, 200 + 9 * i) for i in range(12)), portable=portable, seed=12)),
    ]
    blocks, width = max(len(step.k) for step in steps), max(step.tables.shape[1] for step in steps)
    static = Step(Case(((400, 400),), portable=portable, seed=13))
    static.k, static.v = (torch.full((blocks, *static.k.shape[1:]), math.nan, dtype=BF16, device="cuda") for _ in range(2))
    static.tables = torch.full((seqs + 2, width), NO_BLOCK, dtype=torch.int32, device="cuda")
    q = torch.zeros(tokens, *static.q.shape[1:], dtype=BF16, device="cuda")
    rows, contexts = (torch.zeros(seqs, dtype=torch.int32, device="cuda") for _ in range(2))
    starts = torch.zeros(seqs + 1, dtype=torch.int32, device="cuda")
    out = torch.full(q.shape, math.nan, dtype=BF16, device="cuda")
    work, partials = scratch(static, seqs, tokens)

    def call():
        plan_and_run(static, out, q, rows, starts, contexts, tokens, work, partials)

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for step in (*steps, steps[0]):
        count, used = len(step.case.sequences), len(step.q)
        static.k[: len(step.k)], static.v[: len(step.v)] = step.k, step.v
        static.tables[: len(step.tables), : step.tables.shape[1]] = step.tables
        q[:used] = step.q
        rows.zero_()[:count] = step.rows
        contexts.zero_()[:count] = step.contexts
        starts.fill_(used)[: count + 1] = step.starts
        out.fill_(math.nan)
        graph.replay()
        step.check(out[:used])
        assert out[used:].isnan().all(), "rows of no sequence were written"
        want = step.run()
        for s, (new, _) in enumerate(step.case.sequences):
            if new > SHORT:
                assert both(out[step.tokens(s)], want[step.tokens(s)])


# The plain kernel: float32, and head_dims that are no multiple of 16


@pytest.mark.parametrize("act, kv", [(F32, None), (F32, E4M3)])
@pytest.mark.parametrize("head_dim", [64, 128, 80, 20, 7, 1, 256, 192])
def test_plain_float32(act, kv, head_dim):
    step = Step(Case(((1, 1), (7, 7), (3, 300), (0, 0), *MIXED), (6, 2), head_dim, act, kv, seed=14))
    step.check(step.run(), tensor_cores=False)


@pytest.mark.parametrize("act, kv", [(F16, None), (BF16, None), (F16, E4M3), (BF16, E4M3)])
@pytest.mark.parametrize("head_dim, heads", [(72, (8, 8)), (65, (9, 3)), (20, (16, 1)), (250, (5, 1))])
def test_plain_half_types(act, kv, head_dim, heads):
    step = Step(Case(((1, 1), (5, 700), *MIXED), heads, head_dim, act, kv, seed=15))
    step.check(step.run(), tensor_cores=False)


@pytest.mark.parametrize("block_size", [8, 16, 5])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("alibi", [False, True])
@pytest.mark.parametrize("window", [0, 1, 17, 256, 257, 400])
def test_plain_windows_soft_caps_and_slopes(window, alibi, softcap, block_size):
    step = Step(Case(((1, 700), (40, 600), (3, 3)), (4, 2), 64, F32, block_size=block_size, window=window, alibi=alibi,
                     softcap=softcap, seed=16))
    step.check(step.run(), tensor_cores=False)


def test_plain_bits_do_not_depend_on_the_batch_or_on_chunks():
    step = Step(replace(Case(((70, 700), (1, 400), (30, 30)), (6, 2), 64, F32), seed=17))
    whole = step.run()
    for s, begin, end in ((0, 0, 70), (0, 13, 14), (1, 0, 1), (2, 5, 30)):
        assert both(whole[step.tokens(s)][begin:end], step.run_part(s, begin, end))


def test_a_head_dim_beyond_256_is_refused():
    step = Step(Case(((9, 9),), (1, 1), 264, F32))
    with pytest.raises(RuntimeError, match="256"):
        step.run()
