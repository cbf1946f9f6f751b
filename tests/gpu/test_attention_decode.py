"""Decode attention: the values against float64, and the promise that bits depend on nothing but a token's own query and keys.

Every case is computed with room for partial results, without room, and without a plan: the bits must be the same.

Tolerance: scores and softmax are float32; the weights are rounded to the type of the products (half a unit: 2^-8 of bfloat16,
2^-11 of float16, whose weights below 2^-14 lose more, but add less), and the output once more: both bound by the sum of weighted
|values|.
"""

import math
from dataclasses import replace

import pytest
import steps
import torch
from steps import BF16, E4M3, F16, ONES, Case

import octavo.ops as ops
from octavo.ops.attention import partial_floats, work_ints

ROUNDING = {BF16: 2.0**-8, F16: 2.0**-11}
ROOM = 4096  # partial results
ROOMS = (0, 40, None)  # give the same bits
# (new tokens, keys)
SHORT = ((3, 3), (1, 300), (8, 8), (2, 0), (8, 600), (5, 17), (1, 1), (4, 1030), (7, 263))
LONG = ((1, 9000), (1, 4100))


class Step(steps.Step):
    """A step that the decode kernel takes."""

    def run(self, room: int | None = ROOM, max_query: int = 0, only: int | None = None) -> torch.Tensor:
        """The output on poison; room None: without a plan. only: one sequence of the step, as a step of its own."""
        case, starts, contexts, rows, q = self.case, self.starts, self.contexts, self.rows, self.q
        if only is not None:
            a, b = starts[only : only + 2].tolist()
            starts, contexts, rows, q = starts[only : only + 2] - a, contexts[only : only + 1], rows[only : only + 1], q[a:b]
            max_query = max_query or b - a
        heads, kv_heads = case.heads
        max_query = max_query or self.max_query
        out = torch.full((len(q), heads, case.head_dim), math.nan, dtype=case.act, device="cuda")
        work = partials = None
        if room is not None:
            work = torch.full((work_ints(len(rows), len(q)),), -1, dtype=torch.int32, device="cuda")
            partials = torch.full((partial_floats(room, heads, kv_heads, case.head_dim),), math.nan, device="cuda")
            ops.attention_plan(work, starts, contexts, heads, kv_heads, case.head_dim, case.window, max_query, room)
        for _ in range(2 if room else 1):  # twice: the first run leaves the counters as it found them
            out.fill_(math.nan)
            ops.paged_attention(
                out, q, self.k, self.v, self.tables, rows, starts, contexts, case.head_dim**-0.5, case.window, case.softcap,
                self.slopes, *self.scales, work, partials, max_query,
            )
        return out

    def expected(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Float64 results, the sums of weighted |values|, and which rows belong to a sequence."""
        out = torch.zeros(self.q.shape, dtype=torch.float64, device="cuda")
        bound, used = torch.zeros_like(out), torch.zeros(len(out), dtype=torch.bool, device="cuda")
        for s, (_, keys) in enumerate(self.case.sequences):
            if keys:
                span = self.tokens(s)
                out[span], bound[span] = self.oracle(s)
                used[span] = True
        return out, bound, used


def check(case: Case) -> None:
    step = Step(case)
    out = step.run()
    exact, bound, used = step.expected()
    products = F16 if step.kv_dtype == E4M3 else case.act
    limit = bound * (ROUNDING[products] + 4e-5) + exact.abs() * ROUNDING[case.act] + 1e-6
    wrong = ~((out.double() - exact).abs() <= limit) & used[:, None, None]
    places = wrong.nonzero()
    assert not len(places), (
        f"{case}: {len(places)} of {out.numel()} wrong, first {places[0].tolist()}, last {places[-1].tolist()}: "
        f"{out[wrong][:4].tolist()} for {exact[wrong][:4].tolist()}, worst {(out.double() - exact).abs()[wrong].max():.3g}"
    )
    assert out[~used].isnan().all(), f"{case}: a row of no sequence was written"
    for room in ROOMS:
        other = step.run(room)
        differ = int((other[used] != out[used]).sum())
        assert torch.equal(other[used], out[used]), f"{case}: {differ} elements differ with room for {room}"


@pytest.mark.parametrize("act", (BF16, F16), ids=str)
@pytest.mark.parametrize("head_dim", (16, 64, 80, 96, 112, 128, 192, 256))
def test_head_dims(head_dim, act):
    check(Case(head_dim=head_dim, act=act))


@pytest.mark.parametrize("act", (BF16, F16), ids=str)
@pytest.mark.parametrize("head_dim", (64, 80, 128, 256))
def test_e4m3_cache(head_dim, act):
    check(Case(head_dim=head_dim, act=act, kv=E4M3))
    check(Case(SHORT, head_dim=head_dim, act=act, kv=E4M3, window=200))


@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("heads", ((1, 1), (3, 3), (16, 1), (7, 1), (14, 2), (9, 3), (12, 1), (40, 40), (48, 1)), ids=str)
def test_groups(heads, head_dim):
    check(Case(heads=heads, head_dim=head_dim))


@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("heads", ((2, 2), (8, 2), (6, 3), (16, 2), (7, 1), (32, 1)), ids=str)
def test_several_new_tokens(heads, head_dim):
    check(Case(SHORT, heads=heads, head_dim=head_dim))


@pytest.mark.parametrize("block_size", (8, 16, 24, 32, 48, 64, 128, 256))
def test_block_sizes(block_size):
    check(Case(block_size=block_size))
    check(Case(SHORT, block_size=block_size, window=100, head_dim=64))


@pytest.mark.parametrize("window", (1, 7, 16, 64, 255, 256, 257, 1000, 5000))
def test_windows(window):
    check(Case((*ONES, *LONG), window=window, head_dim=64))
    check(Case(SHORT, window=window))
    check(Case(SHORT, window=window, block_size=8, head_dim=64))


@pytest.mark.parametrize(
    "more", ({"softcap": 30.0, "size": 20.0}, {"alibi": True}, {"softcap": 50.0, "alibi": True, "window": 333}),
    ids=("softcap", "alibi", "all"),
)
@pytest.mark.parametrize("sequences", (ONES, SHORT), ids=("ones", "short"))
def test_features(sequences, more):
    for head_dim in (64, 128, 256):
        check(Case(sequences, head_dim=head_dim, **more))


def test_large_scores():
    check(Case(size=30.0))
    check(Case(size=0.0))


@pytest.mark.parametrize(
    "sequences", (LONG, ((1, 32768),), ((1, 131072),), ((1, 20000), (1, 1), (1, 700)) * 2), ids=("two", "32k", "128k", "mixed")
)
def test_long_contexts(sequences):
    check(Case(sequences, block_size=32))
    check(Case(sequences, head_dim=64, heads=(3, 1)))


def test_many_sequences():
    random = torch.Generator().manual_seed(5)
    for count, longest in ((256, 300), (600, 40), (2048, 20), (77, 1500)):
        keys = torch.randint(0, longest, (count,), generator=random).tolist()
        check(Case(tuple((1, n) for n in keys), heads=(4, 2), head_dim=64))


def test_a_sequence_alone_gives_the_same_bits():
    for case in (
        Case((*ONES, *LONG)), Case(SHORT, heads=(16, 2)), Case(SHORT, head_dim=64, heads=(9, 3), window=300),
        Case(SHORT, head_dim=256),
    ):
        step = Step(case)
        out = step.run()
        starts = step.starts.tolist()
        for s, (_, keys) in enumerate(case.sequences):
            for max_query in (0, 8):
                alone = step.run(only=s, max_query=max_query)
                assert not keys or torch.equal(alone, out[starts[s] : starts[s + 1]]), (case, s, max_query)


def test_mixed_with_prompts():
    """Prompts of more than 8 tokens are another kernel's; the short ones get the bits that they get without them."""
    mixed = ((1, 700), (40, 300), (8, 8), (9, 9), (1, 0), (300, 300), (3, 2000))
    for more in ({}, {"head_dim": 64}, {"heads": (16, 2)}, {"kv": E4M3}):
        step = Step(Case(mixed, **more))
        out = step.run()
        exact, bound, used = step.expected()
        assert ((out.double() - exact).abs() <= bound * 2.0**-8 + exact.abs() * 2.0**-8 + 1e-5)[used].all(), more
        starts = step.starts.tolist()
        for s in (0, 2, 6):
            assert torch.equal(step.run(only=s), out[starts[s] : starts[s + 1]]), (more, s)


@pytest.mark.parametrize("head_dim", (64, 128))
def test_one_graph_serves_every_length(head_dim):
    longest = 1500
    step = Step(Case(((1, longest),) * 9, head_dim=head_dim))
    case = step.case
    heads, kv_heads = case.heads
    out = torch.empty(9, heads, head_dim, dtype=case.act, device="cuda")
    work = torch.empty(work_ints(9, 9), dtype=torch.int32, device="cuda")
    partials = torch.empty(partial_floats(ROOM, heads, kv_heads, head_dim), device="cuda")

    def run():
        ops.attention_plan(work, step.starts, step.contexts, heads, kv_heads, head_dim, 0, 1, ROOM)
        for _ in range(3):  # layers: each waits for the one before
            ops.paged_attention(
                out, step.q, step.k, step.v, step.tables, step.rows, step.starts, step.contexts, head_dim**-0.5, 0, 0.0, None,
                1.0, 1.0, work, partials, 1,
            )

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for lengths in ([longest] * 9, [1, 2, 300, 0, 1499, 256, 257, 16, 0], [0] * 9, [700] * 9, [17] * 8 + [1500]):
        step.contexts.copy_(torch.tensor(lengths, dtype=torch.int32))
        step.case = replace(case, sequences=tuple((1, n) for n in lengths))
        for _ in range(3):
            out.fill_(math.nan)
            graph.replay()
        torch.cuda.synchronize()
        for s, n in enumerate(lengths):
            assert torch.equal(out[s : s + 1], step.run(None, only=s)) if n else out[s].isnan().all(), (lengths, s)


def test_contract():
    step = Step(Case(((1, 20), (1, 30))))
    heads, kv_heads = step.case.heads
    out = torch.empty(2, heads, 128, dtype=BF16, device="cuda")
    good = (out, step.q, step.k, step.v, step.tables, step.rows, step.starts, step.contexts, 0.1, 0, 0.0, None)

    def refused(words, **changed):
        names = (
            "out", "q", "k_cache", "v_cache", "block_tables", "rows", "query_start", "context_len", "scale", "window", "softcap",
            "alibi_slopes",
        )
        with pytest.raises(RuntimeError, match=words):
            ops.paged_attention(*(changed.get(name, value) for name, value in zip(names, good, strict=True)))

    refused("out", out=out.float())
    refused("out", out=out[:1])
    refused("v_cache", v_cache=step.v[:, :, :1])
    refused("rows", rows=step.rows.long())
    refused("query_start", query_start=step.starts[:2])
    refused("alibi_slopes", alibi_slopes=torch.zeros(3, device="cuda"))
    refused("window", window=-1)
    refused("softcap", softcap=-1.0)
    refused("scale", scale=0.0)
    for scales in ((0.5, 1.0), (1.0, 2.0)):
        with pytest.raises(RuntimeError, match="no scales"):
            ops.paged_attention(*good, *scales)
    e4m3 = Step(Case(((1, 20), (1, 30)), kv=E4M3))
    for scales in ((0.0, 1.0), (1.0, -1.0), (math.nan, 1.0)):
        with pytest.raises(RuntimeError, match="positive"):
            ops.paged_attention(out, e4m3.q, e4m3.k, e4m3.v, *good[4:], *scales)
    work = torch.zeros(work_ints(2, 2), dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match="work needs"):
        ops.attention_plan(work[:100], step.starts, step.contexts, heads, kv_heads, 128, 0, 1, 0)
    with pytest.raises(RuntimeError, match="work needs"):
        ops.paged_attention(*good, 1.0, 1.0, work[:100], None, 1)
    with pytest.raises(RuntimeError, match="kv_heads"):
        ops.attention_plan(work, step.starts, step.contexts, 8, 3, 128, 0, 1, 0)
    with pytest.raises(RuntimeError, match="2048 sequences"):
        many = torch.zeros(2050, dtype=torch.int32, device="cuda")
        enough = torch.zeros(work_ints(2049, 1), dtype=torch.int32, device="cuda")
        ops.attention_plan(enough, many, many[:2049], heads, kv_heads, 128, 0, 1, 0)


@pytest.mark.parametrize("sequences", (ONES, ((40, 300), (1, 20), (9, 9))), ids=("ones", "prompts"))
def test_caches_that_begin_at_odd_addresses(sequences):
    """Copies of 16 bytes would be faults that end the process: the last test of this file."""
    step = Step(Case(sequences))

    def moved(x):
        return torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].copy_(x.flatten()).view(x.shape)

    step.k, step.v = moved(step.k), moved(step.v)
    assert step.k.data_ptr() % 16 == 2 == step.v.data_ptr() % 16
    out = step.run()
    exact, bound, used = step.expected()
    assert ((out.double() - exact).abs() <= bound * 2.0**-8 + exact.abs() * 2.0**-8 + 1e-5)[used].all()
    assert out[~used].isnan().all()
