"""Penalties and sampling: against float64, against the exact distribution, and bit for bit in any batch."""

import math

import pytest
import torch
from scipy import stats

from octavo.ops import reference

NAN, INF = float("nan"), float("inf")


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def draw(impl, logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0, index=0, positions=0):
    """Tokens of all rows; a parameter is one number for all or a tensor."""
    rows = logits.shape[0]

    def column(value, dtype):
        return value.to(dtype) if isinstance(value, torch.Tensor) else torch.full((rows,), value, dtype=dtype)

    tokens = torch.full((rows,), -77, dtype=torch.int32)
    before = logits.clone()
    impl.sample(tokens, logits, column(temperature, torch.float32), column(top_k, torch.int32),
                column(top_p, torch.float32), column(min_p, torch.float32), column(seed, torch.int64),
                column(index, torch.int32), column(positions, torch.int32))
    assert torch.equal(logits.nan_to_num(1e30), before.nan_to_num(1e30))  # the logits are not changed
    return tokens


def exact(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Probabilities of one row by the book: plain Python, float64, one token at a time."""
    values = logits.double().tolist()
    top_p, min_p = float(torch.tensor(top_p)), float(torch.tensor(min_p))  # what a float32 holds
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    best = values[order[0]]
    weight = {i: math.exp((values[i] - best) / temperature) for i in order}
    order = [i for i in order if weight[i] >= min_p]
    if top_k > 0:
        order = order[:top_k]
    if top_p < 1:
        total, mass, kept = math.fsum(weight[i] for i in order), 0.0, []
        for i in order:
            kept.append(i)
            mass += weight[i]
            if mass >= top_p * total:
                break
        order = kept
    total = math.fsum(weight[i] for i in order)
    probabilities = [0.0] * len(values)
    for i in order:
        probabilities[i] = weight[i] / total
    return probabilities


def p_value(tokens, probabilities):
    """Of the chi-square test; bins that expect fewer than 5 are put together. No token of probability 0 may occur."""
    draws = len(tokens)
    counts = torch.bincount(tokens.long(), minlength=len(probabilities)).tolist()
    observed, expected, rare = [], [], [0.0, 0.0]
    for count, probability in zip(counts, probabilities, strict=True):
        assert probability > 0 or count == 0
        if probability * draws >= 5:
            observed.append(count)
            expected.append(probability * draws)
        else:
            rare = [rare[0] + count, rare[1] + probability * draws]
    if rare[1] > 0:
        observed.append(rare[0])
        expected.append(rare[1])
    if len(observed) == 1:
        return 1.0
    statistic = sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))
    return stats.chi2.sf(statistic, len(observed) - 1)


# Random numbers


def test_philox_gives_the_published_words():
    """The known answers that Random123 ships for philox4x32-10."""
    def words(counter, key):
        return [int(w) for w in reference._philox_rounds(*(torch.tensor([v]) for v in (*counter, *key)))]

    ones = 0xFFFFFFFF
    assert words((0, 0, 0, 0), (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert words((ones, ones, ones, ones), (ones, ones)) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    assert words((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)) == [
        0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


def test_flat_logits_show_the_random_number(impl):
    """4096 equal logits: the token is the first 12 bits of the first word, exactly."""
    flat = torch.full((1, 4096), -3.5)
    assert draw(impl, flat).tolist() == [0x6627E8D5 >> 20]
    generator = torch.Generator().manual_seed(1)
    seeds = torch.randint(-(2**63), 2**63 - 1, (200,), generator=generator)
    index, positions = torch.arange(200) % 7, torch.randint(0, 2**31 - 1, (200,), generator=generator)
    wanted = reference.philox(seeds, index, positions)[0] >> 20
    found = draw(impl, flat.expand(200, -1), seed=seeds, index=index, positions=positions)
    assert found.tolist() == wanted.tolist()
    assert len(set(found.tolist())) > 150


def test_every_bit_of_the_random_number_counts(kernels):
    """2^24 equal logits: u * total is a whole number, and the first sum above it is the token of that number."""
    flat = torch.zeros(1, 2**24)
    positions = torch.arange(1000)
    zeros = torch.zeros_like(positions)
    numbers = reference.philox(zeros, zeros, positions)[0] >> 8
    border = (numbers % 64 == 0).nonzero()[0].item()  # a whole number of the blocks that the kernel sums by
    odd = (numbers % 2 == 1).nonzero()[0].item()
    for position in (border, odd):
        assert draw(kernels, flat, positions=position).item() == numbers[position]


def test_seed_index_and_position_each_give_another_draw(impl):
    flat = torch.zeros(64, 50000)
    base = draw(impl, flat, positions=torch.arange(64))
    assert not torch.equal(base, draw(impl, flat, positions=torch.arange(64), seed=1))
    assert not torch.equal(base, draw(impl, flat, positions=torch.arange(64), seed=2**32))
    assert not torch.equal(base, draw(impl, flat, positions=torch.arange(64), index=1))
    assert torch.equal(base, draw(impl, flat, positions=torch.arange(64)))
    assert len(set(base.tolist())) > 60


# Greedy and broken rows


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 1000])
def test_greedy_takes_the_best_and_the_lowest_of_equals(impl, vocab):
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(vocab))
    logits[0] = 1.0
    logits[1, vocab // 2 :] = 9.0
    logits[2, -1] = 9.0
    logits[3] = -INF
    logits[3, vocab // 3] = -1e38
    logits[4, 0], logits[4, 1:] = -0.0, 0.0
    assert draw(impl, logits, temperature=0.0).tolist() == [0, vocab // 2, vocab - 1, vocab // 3, 0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [5, 64, 200])
def test_a_row_without_an_answer_gives_minus_one(impl, temperature, vocab):
    logits = torch.zeros(8, vocab)
    logits[0, 0] = NAN
    logits[1, -1] = NAN
    logits[2] = -INF
    logits[3] = INF
    logits[4, ::2], logits[4, 1::2] = -INF, INF
    logits[5] = NAN
    logits[6, 1:] = -INF
    logits[7, vocab // 2], logits[7, 0] = INF, -INF
    found = draw(impl, logits, temperature, positions=torch.arange(8)).tolist()
    assert found == [-1, -1, -1, -1, -1, -1, 0, vocab // 2]


def test_a_tiny_temperature_is_greedy_and_a_huge_one_is_flat(impl):
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0)) * 3
    best = draw(impl, logits, 0.0)
    for temperature in (1e-4, 1e-30, 1e-45):
        assert torch.equal(draw(impl, logits, temperature, positions=torch.arange(50)), best)
    flat = draw(impl, logits[:1].expand(4000, -1), 1e30, positions=torch.arange(4000))
    assert p_value(flat, [1 / 300] * 300) > 1e-4


# Cuts


def test_top_k_keeps_exactly_k_and_the_lower_of_equals(impl):
    flat = torch.zeros(400, 130)
    assert set(draw(impl, flat, top_k=3, positions=torch.arange(400)).tolist()) == {0, 1, 2}
    flat[:, 100:110] = 1.0
    assert set(draw(impl, flat, top_k=4, positions=torch.arange(400)).tolist()) == {100, 101, 102, 103}
    found = draw(impl, flat, top_k=12, temperature=5.0, positions=torch.arange(400))
    assert set(found.tolist()) == {0, 1, *range(100, 110)}
    assert set(draw(impl, flat[:, :5].contiguous(), top_k=50, positions=torch.arange(400)).tolist()) == set(range(5))


def test_top_p_keeps_the_smallest_prefix_and_at_least_one(impl):
    flat = torch.zeros(400, 130)
    for top_p, wanted in ((0.5, 65), (1e-6, 1), (65.5 / 130, 66)):
        found = set(draw(impl, flat, top_p=top_p, positions=torch.arange(400)).tolist())
        assert found <= set(range(wanted)) and len(found) > wanted * 0.9 - 1
    assert set(draw(impl, flat, top_k=10, top_p=0.5, positions=torch.arange(400)).tolist()) == set(range(5))


def test_min_p_is_relative_to_the_best(impl):
    logits = torch.full((400, 70), -20.0)
    logits[:, 7], logits[:, 50], logits[:, 69] = 0.0, math.log(0.5), math.log(0.2)
    for min_p, wanted in ((0.1, {7, 50, 69}), (0.3, {7, 50}), (1.0, {7})):
        assert set(draw(impl, logits, min_p=min_p, positions=torch.arange(400)).tolist()) == wanted


CASES = {
    "temperature": {"temperature": 0.7},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 7},
    "top_k_wide": {"top_k": 60, "temperature": 1.5},
    "top_p": {"top_p": 0.8},
    "top_p_low": {"top_p": 0.3, "temperature": 1.3},
    "top_p_high": {"top_p": 0.9999},
    "min_p": {"min_p": 0.05},
    "all": {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.01},
    "k_cuts_before_p": {"top_k": 5, "top_p": 0.7, "temperature": 1.6},
    "min_p_cuts_before_p": {"min_p": 0.2, "top_p": 0.7, "temperature": 1.6},
}


@pytest.mark.parametrize("case", CASES)
def test_draws_follow_the_exact_distribution(impl, case):
    logits = torch.randn(150, generator=torch.Generator().manual_seed(5)) * 2
    logits[40:50] = logits[40]  # ties, at the border of some of the cuts
    draws = 20000
    rows = logits.expand(draws, -1)
    tokens = draw(impl, rows, **CASES[case], seed=1234567890123456789, positions=torch.arange(draws))
    assert p_value(tokens, exact(logits, **CASES[case])) > 1e-4


def test_another_distribution_would_be_noticed():
    """The statistic itself can fail: draws at one temperature against the probabilities of one close by."""
    logits = torch.randn(150, generator=torch.Generator().manual_seed(5)) * 2
    tokens = draw(reference, logits.expand(20000, -1), 1.0, positions=torch.arange(20000))
    assert p_value(tokens, exact(logits, 1.1)) < 1e-4


def test_penalised_draws_follow_the_exact_distribution(impl):
    vocab, draws = 90, 20000
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(vocab, generator=generator) * 2
    counts = torch.randint(0, 4, (2, vocab), generator=generator, dtype=torch.int32)
    prompt = torch.rand(2, vocab, generator=generator) < 0.3
    row = logits.unsqueeze(0).clone()
    impl.penalties(row, counts, prompt, ints([1]), torch.tensor([1.3]), torch.tensor([0.2]), torch.tensor([0.5]))
    penalised = []
    for i, x in enumerate(logits.tolist()):
        n = int(counts[1, i])
        if n > 0 or prompt[1, i]:
            x = x / 1.3 if x > 0 else x * 1.3
        penalised.append(x - 0.2 * n - 0.5 * (n > 0))
    tokens = draw(impl, row.expand(draws, -1), top_p=0.95, seed=-5, positions=torch.arange(draws))
    assert p_value(tokens, exact(torch.tensor(penalised, dtype=torch.float64), top_p=0.95)) > 1e-4


# The kernels against the reference


def near_border(logits, temperature, top_k, top_p, min_p, seed, index, position):
    """Whether in float64 a comparison of this row is so close that float32 weights may turn it (2e-6, relative)."""
    close = 2e-6

    def one(x, dtype):
        return torch.tensor([x], dtype=dtype)

    columns = (one(temperature, torch.float32), one(top_k, torch.int32))
    everything = reference.kept_weights(logits[None], *columns, one(1.0, torch.float32), one(0.0, torch.float32))
    if bool(((everything - min_p).abs() < close * min_p).any()):
        return True
    allowed = reference.kept_weights(logits[None], *columns, one(1.0, torch.float32), one(min_p, torch.float32))[0]
    ranked = allowed[torch.sort(logits, descending=True, stable=True).indices].cumsum(0)
    if top_p < 1 and bool(((ranked / ranked[-1] - top_p).abs() < close).any()):
        return True
    kept = reference.kept_weights(logits[None], *columns, one(top_p, torch.float32), one(min_p, torch.float32))[0]
    running = kept.cumsum(0) / kept.sum()
    word = reference.philox(one(seed, torch.int64), one(index, torch.int32), one(position, torch.int32))[0]
    u = int(word >> 8) * 2.0**-24
    return bool(((running - u).abs() < close).any())


@pytest.mark.parametrize(("rows", "vocab", "scale"),
                         [(3000, 61, 3.0), (1500, 1000, 2.5), (300, 5003, 1.0), (64, 49152, 3.0)])
def test_the_kernel_draws_what_the_reference_draws(kernels, rows, vocab, scale):
    generator = torch.Generator().manual_seed(vocab)

    def pick(*choices):
        return torch.tensor(choices)[torch.randint(0, len(choices), (rows,), generator=generator)]

    logits = torch.randn(rows, vocab, generator=generator) * scale
    logits[::5] = logits[::5].bfloat16().float()  # ties
    logits[::7, : vocab // 2] = -INF  # a mask
    temperature, top_k = pick(0.0, 0.3, 0.7, 1.0, 1.7), pick(0, 0, 1, 2, 20, 50, vocab // 2, vocab, 10**6)
    top_p, min_p = pick(1.0, 1.0, 0.999, 0.95, 0.5, 0.01), pick(0.0, 0.0, 0.001, 0.1)
    seed, index = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator), pick(0, 1, 5)
    position = torch.randint(0, 100000, (rows,), generator=generator)
    columns = (temperature, top_k, top_p, min_p, seed, index, position)
    wanted, found = draw(reference, logits, *columns), draw(kernels, logits, *columns)
    differ = (wanted != found).nonzero().squeeze(1).tolist()
    for row in differ:
        assert near_border(logits[row], *(column[row].item() for column in columns)), f"row {row}"
    assert len(differ) <= 2 + rows // 1000


def test_a_row_draws_the_same_alone_in_a_batch_and_on_any_number_of_threads(kernels, on_threads):
    rows, vocab = 120, 3001
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(0)) * 2
    columns = (torch.tensor([0.0, 0.8, 1.0, 1.3]).repeat(30), ints([0, 0, 0, 30, 700]).repeat(24),
               torch.tensor([1.0, 0.9, 0.99]).repeat(40), torch.zeros(rows), torch.arange(rows), 0, torch.arange(rows))
    together = draw(kernels, logits, *columns)
    for i in range(rows):
        one = slice(i, i + 1)
        alone = draw(kernels, logits[one], *(c if c is columns[5] else c[one] for c in columns))
        assert torch.equal(alone, together[one])
    for count in (1, 2, 3):
        assert torch.equal(on_threads(count, lambda: draw(kernels, logits, *columns)), together)


def test_a_view_of_a_padded_vocabulary(impl):
    padded = torch.full((6, 128), 50.0)
    padded[:, :100] = torch.randn(6, 100, generator=torch.Generator().manual_seed(0))
    view = padded[:, :100]
    for temperature in (0.0, 1.0):
        assert torch.equal(draw(impl, view, temperature, seed=9), draw(impl, view.contiguous(), temperature, seed=9))


def test_contract_errors_of_sample(kernels):
    logits = torch.zeros(2, 8)
    with pytest.raises(RuntimeError, match=r"sample: temperature .*row 1"):
        draw(kernels, logits, torch.tensor([1.0, NAN]))
    with pytest.raises(RuntimeError, match=r"sample: temperature"):
        draw(kernels, logits, -1.0)
    with pytest.raises(RuntimeError, match=r"sample: top_p"):
        draw(kernels, logits, top_p=NAN)
    with pytest.raises(RuntimeError, match=r"sample: .*min_p"):
        draw(kernels, logits, min_p=1.5)
    with pytest.raises(RuntimeError, match=r"sample: logits .*float32"):
        draw(kernels, logits.double())
    with pytest.raises(RuntimeError, match=r"sample: seeds"):
        kernels.sample(ints([0, 0]), logits, torch.ones(2), ints([0, 0]), torch.ones(2), torch.zeros(2), ints([0, 0]),
                       ints([0, 0]), ints([0, 0]))


# Penalties


@pytest.mark.parametrize("vocab", [1, 17, 1000])
def test_penalties(impl, vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(5, vocab, generator=generator) * 4
    counts = torch.randint(0, 3, (3, vocab), generator=generator, dtype=torch.int32)
    prompt = torch.rand(3, vocab, generator=generator) < 0.5
    slots = ints([2, -1, 0, -1, 1])
    repetition, frequency, presence = (torch.rand(5, generator=generator) + 0.5 for _ in range(3))
    wanted = logits.double()
    for s, slot in enumerate(slots.tolist()):
        for i in range(vocab):
            if slot < 0:
                continue
            n, x = int(counts[slot, i]), wanted[s, i].item()
            if n > 0 or prompt[slot, i]:
                x = x / repetition[s].item() if x > 0 else x * repetition[s].item()
            wanted[s, i] = x - frequency[s].item() * n - (presence[s].item() if n > 0 else 0.0)
    before = logits.clone()
    impl.penalties(logits, counts, prompt, slots, repetition, frequency, presence)
    torch.testing.assert_close(logits.double(), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits[[1, 3]], before[[1, 3]])


def test_penalties_leave_masked_tokens_masked(impl):
    logits = torch.tensor([[-INF, 1.0, -INF]])
    one = torch.ones(1)
    impl.penalties(logits, ints([[2, 0, 0]]), torch.tensor([[True, False, True]]), ints([0]), 2 * one, one, one)
    assert logits.tolist() == [[-INF, 1.0, -INF]]


def test_contract_errors_of_penalties(kernels):
    one = torch.ones(1)
    for slot in (3, -2):
        with pytest.raises(RuntimeError, match=rf"penalties: slot {slot} of row 0"):
            kernels.penalties(torch.zeros(1, 4), torch.zeros(3, 4, dtype=torch.int32),
                              torch.zeros(3, 4, dtype=torch.bool), ints([slot]), one, one, one)
    with pytest.raises(RuntimeError, match=r"penalties: prompt_mask"):
        kernels.penalties(torch.zeros(1, 4), torch.zeros(3, 4, dtype=torch.int32),
                          torch.zeros(3, 5, dtype=torch.bool), ints([0]), one, one, one)
