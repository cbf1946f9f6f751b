"""Sampling on the GPU: against float64, the CPU kernels and the exact distribution, alone and in batches, captured and not.

Tokens may differ from the float64 reference only where a sum falls within BORDER of what it is compared with: a weight is a
float32 power of two whose exponent was rounded three times, so for exponents up to 20 it is right to about 2e-6.
"""

import math

import pytest
import torch

import octavo.ops as ops
from octavo.ops import fused_reference, reference

NAN, INF = float("nan"), float("inf")
BORDER = 2e-6
TEAMS = [61, 1000, 5003, 16640, 32770, 49152, 65540, 128256, 151936, 262144]  # one to eight blocks a row, odd ends


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def columns_of(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, index=0, positions=0):
    """The parameters on the CPU; each is one number for all rows or a tensor."""
    def column(value, dtype):
        return value.to(dtype) if isinstance(value, torch.Tensor) else torch.full((rows,), value, dtype=dtype)

    return (column(temperature, torch.float32), column(top_k, torch.int32), column(top_p, torch.float32),
            column(min_p, torch.float32), column(seed, torch.int64), column(index, torch.int32), column(positions, torch.int32))


def draw(logits, *args, **kwargs):
    """Tokens that the GPU gives for logits on the GPU."""
    tokens = torch.full((logits.shape[0],), -77, dtype=torch.int32, device="cuda")
    ops.sample(tokens, logits, *(c.cuda() for c in columns_of(logits.shape[0], *args, **kwargs)))
    return tokens.cpu()


def draw_on_cpu(op, logits, columns):
    tokens = torch.full((logits.shape[0],), -77, dtype=torch.int32)
    op(tokens, logits, *columns)
    return tokens


def normal(rows, vocab, seed, scale=3.0, peaks=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator) * scale
    for _ in range(peaks):
        at = torch.randint(0, vocab, (rows, 1), generator=generator)
        logits.scatter_(1, at, scale * 4 + torch.rand(rows, 1, generator=generator) * 8)
    return logits


def p_value(tokens, probabilities):
    """Of the chi-square test; bins that expect fewer than 5 are put together. No token of probability 0 may occur."""
    observed = torch.bincount(tokens.long(), minlength=len(probabilities)).double()
    assert len(observed) == len(probabilities) and not bool(observed[probabilities == 0].any())
    expected = probabilities.double() * len(tokens)
    rare = expected < 5
    observed, expected = (torch.cat([t[~rare], t[rare].sum(0, keepdim=True)]) for t in (observed, expected))
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2 or 0.5).double(), statistic / 2))


@pytest.mark.parametrize("vocab", [1, 2, 63, 127, 128, 129, *TEAMS])
def test_greedy_takes_the_best_and_the_lowest_of_equals(vocab):
    logits = normal(6, vocab, vocab)
    logits[0] = 1.0
    logits[1, vocab // 2 :] = 90.0
    logits[2, -1] = 90.0
    logits[3] = -INF
    logits[3, vocab // 3] = -1e38
    logits[4, 0], logits[4, 1:] = -0.0, 0.0
    wanted = [0, vocab // 2, vocab - 1, vocab // 3, 0, int(logits[5].argmax())]
    assert draw(logits.cuda(), 0.0).tolist() == wanted
    assert draw(logits.cuda(), 1e-45)[[2, 3, 5]].tolist() == [wanted[i] for i in (2, 3, 5)]


@pytest.mark.parametrize("columns", [{"temperature": 0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 1e-30, "temperature": 3e38}])
@pytest.mark.parametrize("vocab", [5, 200, 128256])
def test_a_row_without_an_answer_gives_minus_one(columns, vocab):
    logits = torch.zeros(9, vocab)
    logits[0, 0] = NAN
    logits[1, -1] = -NAN
    logits[2] = -INF
    logits[3] = INF
    logits[4, ::2], logits[4, 1::2] = -INF, INF
    logits[5] = NAN
    logits[6, 1:] = -INF
    logits[7, vocab // 2], logits[7, 0] = INF, -INF
    logits[8, 3:5] = INF
    found = draw(logits.cuda(), **columns, positions=torch.arange(9)).tolist()
    assert found[:8] == [-1, -1, -1, -1, -1, -1, 0, vocab // 2] and found[8] in (3, 4)


def test_parameters_that_the_cpu_refuses_give_minus_one():
    logits = normal(8, 300, 0).cuda()
    temperature, top_p, min_p = torch.ones(8), torch.ones(8), torch.zeros(8)
    temperature[:3], top_p[3:5], min_p[5:7] = torch.tensor([NAN, -1, INF]), torch.tensor([NAN, -0.5]), torch.tensor([NAN, 1.5])
    found = draw(logits, temperature, top_p=top_p, min_p=min_p)
    assert found[:7].tolist() == [-1] * 7 and found[7] >= 0


def test_flat_logits_show_the_random_number():
    seeds, positions = torch.arange(200) * 0x9E3779B97F4A7C15 % 2**63 - 2**62, torch.arange(200) * 10737418
    index = torch.arange(200) % 7
    found = draw(torch.full((200, 4096), -3.5).cuda(), seed=seeds, index=index, positions=positions)
    assert torch.equal(found.long(), reference.philox(seeds, index, positions)[0] >> 20)


def test_every_bit_of_the_random_number_counts():
    """2^18 and 2^24 equal logits, the latter too long for shared memory: u * total is whole, the next token is drawn."""
    positions = torch.arange(24)
    numbers = reference.philox(0 * positions, 0 * positions, positions)[0] >> 8
    assert torch.equal(draw(torch.zeros(24, 2**18).cuda(), positions=positions).long(), numbers >> 6)
    assert torch.equal(draw(torch.zeros(1, 2**24).cuda().expand(24, -1), positions=positions).long(), numbers)


@pytest.mark.parametrize("vocab", [130, 5000, 70000, 151936])
def test_cuts_among_equals_go_by_the_lower_id(vocab):
    """Equal logits in large numbers do not fit into the list that is sorted: the border is found among ids."""
    rows = 64 if vocab < 1000 else 10
    flat = torch.zeros(rows, vocab).cuda()
    cases = [{"top_k": 3}, {"top_k": vocab - 3}, {"top_p": 0.5}, {"top_p": 1e-9}, {"top_p": 0.0}, {"top_p": 0.999},
             {"min_p": 1.0}, {"top_k": vocab // 2 + 1, "top_p": 0.7}, {"top_k": 10, "top_p": 0.5},
             {"top_k": 10**9, "top_p": 0.25}]
    for case in cases:
        columns = columns_of(rows, **case, positions=torch.arange(rows), seed=5)
        assert torch.equal(draw(flat, *columns), draw_on_cpu(reference.sample, flat.cpu(), columns)), case
    flat[:, vocab - 20 : vocab - 10] = 1.0
    found = draw(flat[:1].expand(64, -1), top_k=12, temperature=5.0, positions=torch.arange(64))
    assert set(found.tolist()) <= {0, 1, *range(vocab - 20, vocab - 10)} and len(set(found.tolist())) > 8


CASES = {
    "temperature": {"temperature": 0.7}, "hot": {"temperature": 2.5},
    "top_k": {"top_k": 7}, "top_k_wide": {"top_k": 60, "temperature": 1.5},
    "top_p": {"top_p": 0.8}, "top_p_low": {"top_p": 0.3, "temperature": 1.3}, "top_p_high": {"top_p": 0.9999},
    "min_p": {"min_p": 0.05}, "min_p_then_p": {"min_p": 0.2, "top_p": 0.7, "temperature": 1.6},
    "k_then_p": {"top_k": 5, "top_p": 0.7, "temperature": 1.6},
    "all": {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
}


@pytest.mark.parametrize("vocab", [150, 40000])
@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_exact_distribution(case, vocab):
    """20,000 draws; of the larger vocabulary all but 150 tokens, far apart, are masked."""
    few, ids = normal(1, 150, 5, 2.0), torch.arange(150) * (vocab // 150)
    few[0, 40:50] = few[0, 40]  # ties, at the border of some of the cuts
    logits = torch.full((1, vocab), -INF)
    logits[0, ids] = few
    tokens = draw(logits.cuda().expand(20000, -1), **CASES[case], seed=1234567890123456789, positions=torch.arange(20000))
    weights = reference.kept_weights(few, *(c[:1] for c in columns_of(1, **CASES[case])[:4]))[0]
    spread = torch.zeros(vocab, dtype=torch.float64)
    spread[ids] = weights / weights.sum()
    assert p_value(tokens, spread) > 1e-4
    if vocab == 150:
        columns = columns_of(20000, **CASES[case], seed=1234567890123456789, positions=torch.arange(20000))
        on_cpu = draw_on_cpu(ops.sample, logits.expand(20000, -1), columns)
        assert int((tokens != on_cpu).sum()) <= 10  # 150 borders of 4e-6 at most, 20,000 draws


def near_border(row, columns):
    """Whether in float64 a comparison of this row ([1, vocab], columns of one row) is within BORDER, relative."""
    (temperature, top_k, top_p, min_p, *rest), one, none = columns, torch.ones(1), torch.zeros(1)
    if min_p > 0:
        everything = reference.kept_weights(row, temperature, torch.zeros_like(top_k), one, none)
        if bool(((everything - min_p).abs() < BORDER * min_p).any()):
            return True
    allowed = reference.kept_weights(row, temperature, top_k, one, min_p)[0]
    ranked = allowed[torch.sort(row[0], descending=True, stable=True).indices].cumsum(0)
    if top_p < 1 and bool(((ranked / ranked[-1] - top_p).abs() < BORDER).any()):
        return True
    running = reference.kept_weights(row, temperature, top_k, top_p, min_p)[0].cumsum(0)
    u = int(reference.philox(*rest)[0] >> 8) * 2.0**-24
    return bool(((running / running[-1] - u).abs() < BORDER).any())


@pytest.mark.parametrize(("rows", "vocab", "scale", "peaks"), [
    (3000, 61, 3.0, 0), (1500, 1000, 2.5, 0), (300, 5003, 1.0, 0), (64, 49152, 3.0, 0), (48, 128256, 3.0, 4),
    (32, 151936, 3.0, 0), (24, 151936, 1.0, 0), (12, 262144, 2.0, 2), (4, 700001, 3.0, 0)])
def test_the_gpu_draws_what_the_reference_draws(rows, vocab, scale, peaks):
    logits = normal(rows, vocab, vocab, scale, peaks)
    generator = torch.Generator().manual_seed(rows)

    def pick(*choices):
        return torch.tensor(choices)[torch.randint(0, len(choices), (rows,), generator=generator)]

    logits[::5] = logits[::5].bfloat16().float()  # ties
    logits[::7, : vocab // 2] = -INF  # a mask
    columns = columns_of(rows, pick(0.0, 0.3, 0.7, 1.0, 1.7), pick(0, 0, 1, 2, 20, 50, 3000, vocab // 2, vocab, 10**6),
                         pick(1.0, 1.0, 0.999, 0.95, 0.5, 0.01), pick(0.0, 0.0, 0.001, 0.1),
                         torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator), pick(0, 1, 5),
                         torch.randint(0, 100000, (rows,), generator=generator))
    wanted = draw_on_cpu(reference.sample, logits, columns)
    found = draw(logits.cuda(), *columns)
    differ = (wanted != found).nonzero().squeeze(1).tolist()
    bad = [(r, int(wanted[r]), int(found[r]), [c[r].item() for c in columns]) for r in differ
           if not near_border(logits[r : r + 1], [c[r : r + 1] for c in columns])]
    assert not bad, bad[:5]
    assert len(differ) <= 2 + rows // 300


def test_every_wide_cut_agrees_with_the_reference():
    """Cuts that keep thousands of tokens, so that borders are searched for over the whole row."""
    logits = normal(10, 151936, 3)
    logits[5:] = logits[5:].bfloat16().float()
    cases = [{"top_p": 0.9}, {"top_p": 0.9999, "temperature": 2.0}, {"top_p": 0.5, "temperature": 5.0}, {"top_k": 10000},
             {"top_k": 100000, "temperature": 1e30}, {"top_k": 20000, "top_p": 0.9, "temperature": 1.5},
             {"top_k": 4000, "top_p": 0.3}, {"min_p": 1e-4, "top_p": 0.95, "temperature": 1.2}, {"top_p": 0.999999},
             {"top_k": 2100, "temperature": 0.5}]
    for case in cases:
        columns = columns_of(10, **case, seed=torch.arange(10), positions=77)
        wanted = draw_on_cpu(reference.sample, logits, columns)
        differ = (wanted != draw(logits.cuda(), *columns)).nonzero().squeeze(1).tolist()
        assert len(differ) <= 1, (case, differ)
        assert all(near_border(logits[r : r + 1], [c[r : r + 1] for c in columns]) for r in differ), (case, differ)


def test_weights_that_mislead_the_guess_of_the_border():
    """The border is first looked for where it would be if weights lay alike in all bins: here the better ones do not."""
    edges = torch.cat([torch.arange(100, 120).repeat(300) + 0.01, torch.arange(200, 220).repeat(10000) + 0.99])
    row = torch.cat([torch.zeros(1, dtype=torch.float64), edges.double() / -25 * math.log(2)]).float()
    row = row[torch.randperm(len(row), generator=torch.Generator().manual_seed(0))]
    rows = 24
    columns = columns_of(rows, top_p=torch.linspace(0.05, 0.95, rows), seed=torch.arange(rows))
    wanted = draw_on_cpu(reference.sample, row.expand(rows, -1), columns)
    differ = (wanted != draw(row.cuda().expand(rows, -1), *columns)).nonzero().squeeze(1).tolist()
    assert all(near_border(row[None], [c[r : r + 1] for c in columns]) for r in differ) and len(differ) <= 1, differ


def mixed_columns(rows):
    def cycle(*values):
        return torch.tensor(values).repeat(rows)[:rows]

    return columns_of(rows, cycle(0.0, 0.8, 1.0, 1.3), cycle(0, 0, 0, 30, 7000), cycle(1.0, 0.9, 0.99), cycle(*[0.0] * 6, 0.01),
                      torch.arange(rows), 0, torch.arange(rows) * 3)


@pytest.mark.parametrize("vocab", [3001, 32000, 151936])
def test_a_row_draws_the_same_alone_and_in_any_batch(vocab):
    rows, columns = 60, mixed_columns(60)
    logits = normal(rows, vocab, 0, peaks=2).cuda()
    together = draw(logits, *columns)
    alone = torch.cat([draw(logits[i : i + 1], *(c[i : i + 1] for c in columns)) for i in range(rows)])
    assert torch.equal(alone, together)
    order = torch.arange(rows).flip(0)
    assert torch.equal(draw(logits.flip(0), *(c[order] for c in columns)), together[order])


@pytest.mark.parametrize("vocab", [101, 40001, 151936])
def test_views_and_odd_addresses(vocab):
    """Rows of a padded vocabulary; an odd stride or start takes the path without wide loads, to the same tokens."""
    plain = normal(9, vocab, 1)
    for start, width in ((0, vocab + 27 - vocab % 4), (1, vocab + 30), (3, vocab + 3)):
        padded = torch.full((9, width), 99.0).cuda()
        view = padded[:, start : start + vocab]
        view.copy_(plain)
        assert torch.equal(draw(view, *mixed_columns(9)), draw(plain.cuda(), *mixed_columns(9)))


def test_capture_and_replay_with_other_inputs():
    rows, vocab = 12, 32000
    logits = torch.zeros(rows, vocab, device="cuda")
    columns = [torch.zeros_like(c, device="cuda") for c in mixed_columns(rows)]
    tokens = torch.full((rows,), -77, dtype=torch.int32, device="cuda")
    counts = torch.zeros(rows, vocab, dtype=torch.int32, device="cuda")
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    prompt, one = torch.zeros(rows, vocab, dtype=torch.bool, device="cuda"), torch.ones(rows, device="cuda")
    logprob, rank = torch.zeros(rows, device="cuda"), torch.zeros(rows, dtype=torch.int32, device="cuda")
    ids, top = torch.zeros(rows, 5, dtype=torch.int32, device="cuda"), torch.zeros(rows, 5, device="cuda")

    def step():
        ops.penalties(logits, counts, prompt, slots, 1.2 * one, 0.1 * one, 0.3 * one)
        ops.sample(tokens, logits, *columns)
        ops.token_logprobs(logprob, rank, ids, top, logits, tokens)
        ops.count_tokens(counts, slots, tokens)

    step()
    torch.cuda.synchronize()
    counts.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    on_cpu = torch.zeros(rows, vocab, dtype=torch.int32)
    for round_ in range(3):
        fresh = normal(rows, vocab, 40 + round_, peaks=3)
        logits.copy_(fresh)
        for column, new in zip(columns, mixed_columns(rows), strict=True):
            column.copy_(new + round_ if new.dtype == torch.int64 else new)
        graph.replay()
        reference.penalties(fresh, on_cpu, prompt.cpu(), slots.cpu(), 1.2 * one.cpu(), 0.1 * one.cpu(), 0.3 * one.cpu())
        assert torch.equal(logits.cpu(), fresh)
        assert torch.equal(tokens.cpu(), draw(fresh.cuda(), *(c.cpu() for c in columns)))
        fused_reference.count_tokens(on_cpu, slots.cpu(), tokens.cpu())
        assert torch.equal(counts.cpu(), on_cpu)
        assert torch.equal(ids[:, 0].cpu().long(), fresh.argmax(1)) and bool((rank > 0).all())


@pytest.mark.parametrize("vocab", [7, 1000, 1003, 128256])
def test_penalties_are_the_reference_to_the_bit(vocab):
    generator = torch.Generator().manual_seed(vocab)
    times = 12 if vocab > 100000 else 1  # many tokens are read in larger portions
    logits = normal(6 * times, vocab + 5, 2)[:, :vocab]
    counts = torch.randint(-2, 4, (5, vocab), generator=generator, dtype=torch.int32).clamp(min=0)
    prompt = torch.rand(5, vocab, generator=generator) < 0.2
    slots, factor, each, once = (torch.tensor(t).repeat(times) for t in (
        [4, -1, 0, 2, 2, 3], [1.3, 2.0, 0.7, 1.0, 1.1, 1.0], [0.2, 9.0, 0.0, -0.3, 0.5, 0.0], [0.5, 9.0, 1.5, 0.0, -0.4, 0.0]))
    slots = slots.int()
    logits[0, 0] = -INF
    for view in (logits, logits.contiguous()):
        wanted, found = view.clone(), torch.full((6 * times, view.stride(0)), 99.0, device="cuda")[:, :vocab]
        found.copy_(view)
        reference.penalties(wanted, counts, prompt, slots, factor, each, once)
        ops.penalties(found, *(t.cuda() for t in (counts, prompt, slots, factor, each, once)))
        assert torch.equal(found.cpu(), wanted)
    beyond = found.clone()
    ops.penalties(beyond, *(t.cuda() for t in (counts, prompt, slots.clamp(min=0) + 5, factor, each, once)))
    assert torch.equal(beyond, found)  # a slot outside the pool leaves the row alone


def test_count_tokens():
    generator = torch.Generator().manual_seed(0)
    slots, tokens = (torch.randint(-1, n, (1000,), generator=generator, dtype=torch.int32) for n in (20, 30))
    wanted = torch.randint(0, 9, (20, 30), dtype=torch.int32)
    found = wanted.cuda()
    fused_reference.count_tokens(wanted, slots, tokens)
    ops.count_tokens(found, slots.cuda(), tokens.cuda())
    assert torch.equal(found.cpu(), wanted)
    ops.count_tokens(found, slots.cuda() + 20, tokens.cuda().clamp(min=0) + 30)  # slots from 19 on, tokens from 30 on
    assert torch.equal(found.cpu(), wanted)


def logprobs_of(logits, tokens, k, on="cuda"):
    rows = logits.shape[0]
    logprob, top = torch.full((rows,), 77.0, device=on), torch.full((rows, k), 77.0, device=on)
    rank, ids = torch.full((rows,), 77, dtype=torch.int32, device=on), torch.full((rows, k), 77, dtype=torch.int32, device=on)
    op = ops.token_logprobs if on == "cuda" else reference.token_logprobs
    op(logprob, rank, ids, top, logits.to(on) if logits.device.type != on else logits, ints(tokens).to(on))
    return tuple(t.cpu() for t in (logprob, rank, ids, top))


@pytest.mark.parametrize(("vocab", "ks"), [
    (1, (0, 1)), (2, (1, 2)), (63, (5, 63)), (65, (3, 65)), (1000, (0, 20, 1000)), (5003, (5003, 7)),
    (49000, (0, 1, 20, 2000, 9000)), (151936, (0, 1, 20, 2048, 2049)), (262143, (5,))])
def test_token_logprobs(vocab, ks):
    logits = normal(8, vocab, vocab, 4.0, 1)
    logits[1] = logits[1].round()  # ties
    logits[2] = 3.0
    logits[3, : vocab // 2] = -INF
    logits[4, vocab // 2] = 80.0  # nearly all other weights are too small to count
    logits[5] *= 0.01
    tokens = [vocab - 1, vocab // 2, vocab // 3, vocab // 2, 0, vocab - 1, -1, 0]
    for k in ks:
        for name, x, y in zip(("logprobs", "ranks", "ids", "top"), logprobs_of(logits, tokens, k),
                              logprobs_of(logits, tokens, k, "cpu"), strict=True):
            # float64 sums of float32 weights, and what is below 2^-39 of the best left out
            torch.testing.assert_close(x, y, rtol=1e-6, atol=2e-6, equal_nan=True, msg=lambda m, at=(k, name): f"{at}: {m}")


def test_logprobs_of_broken_rows_and_of_no_token():
    logits = torch.zeros(6, 70)
    logits[0, 3], logits[1] = NAN, -INF
    logits[2, 5], logits[2, 9], logits[2, 0] = INF, INF, -INF
    logprob, rank, ids, top = logprobs_of(logits, [0, 0, 9, -1, 70, -5], 3)
    assert logprob.isnan().tolist() == [True, True, False, True, True, True] and rank.tolist() == [0, 0, 2, 0, 0, 0]
    assert ids[0].tolist() == ids[1].tolist() == [-1] * 3 and bool(top[:2].isnan().all())
    assert logprob[2].item() == pytest.approx(math.log(0.5))
    assert ids[2].tolist() == [5, 9, 1] and top[2].tolist() == pytest.approx([math.log(0.5), math.log(0.5), -INF])
    assert ids[3].tolist() == [0, 1, 2] and top[3].tolist() == pytest.approx([-math.log(70)] * 3)


@pytest.mark.parametrize("k", [0, 5, 3000])
def test_logprobs_are_the_same_bits_in_any_batch(k):
    logits = normal(40, 70001, 0, peaks=2).cuda()
    tokens = list(range(40))
    together = logprobs_of(logits, tokens, k)
    for row in (0, 17, 39):
        alone = logprobs_of(logits[row : row + 1], [row], k)
        assert all(torch.equal(one[0], many[row]) for one, many in zip(alone, together, strict=True))


def test_contract_errors():
    logits = torch.zeros(2, 8, device="cuda")
    columns = [c.cuda() for c in columns_of(2)]
    tokens, counts = (torch.zeros(n, dtype=torch.int32, device="cuda") for n in (2, (3, 8)))
    with pytest.raises(RuntimeError, match=r"sample: logits .*float32"):
        ops.sample(tokens, logits.double(), *columns)
    with pytest.raises(RuntimeError, match=r"sample: top_k .*S = 2"):
        ops.sample(tokens, logits, columns[0], columns[1][:1], *columns[2:])
    with pytest.raises(RuntimeError, match=r"token_logprobs: top_ids has 9 columns"):
        logprobs_of(logits, [0, 0], 9)
    with pytest.raises(RuntimeError, match=r"penalties: prompt_mask"):
        ops.penalties(logits, counts, torch.zeros(3, 7, dtype=torch.bool, device="cuda"), tokens, *columns[2:4], columns[0])
    with pytest.raises(RuntimeError, match=r"count_tokens: tokens"):
        ops.count_tokens(counts, tokens, tokens.long())
    assert draw(logits[:0]).shape == (0,)
