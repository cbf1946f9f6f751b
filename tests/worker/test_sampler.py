"""Sampling: who gets a token, what is written back, and logprobs against torch.log_softmax."""

import math

import numpy as np
import pytest
import torch

from octavo import ops
from octavo.plan import NewRow, RowSampling, StepPlan
from octavo.worker import sampler as module
from octavo.worker.batch import build
from octavo.worker.logit_edits import LogitEdits
from octavo.worker.sampler import Sampler
from octavo.worker.tables import Tables

VOCAB = 31


def ints(*values):
    return np.array(values, np.int32)


def fresh(*samplings, processed=False, tokens=(4, 5, 6), num_prompt=2):
    """A device with one row per sampling, and the plan in which all of them sample."""
    tables = Tables(len(samplings), 600, 4, 1000)
    edits = LogitEdits(tables, VOCAB)
    n = len(samplings)
    new = [
        NewRow(
            row=i,
            generation=1,
            tokens=ints(*tokens),
            num_prompt=num_prompt,
            start=0,
            blocks=ints(*range(len(tokens))),
            sampling=RowSampling(**s),
        )
        for i, s in enumerate(samplings)
    ]
    plan = StepPlan(
        epoch=0,
        step=0,
        new=new,
        rows=ints(*range(n)),
        starts=ints(*[0] * n),
        counts=ints(*[len(tokens)] * n),
        sample_rows=ints(*range(n)),
        sample_from=ints(*range(n)),
        sample_pos=ints(*[len(tokens)] * n),
        sample_generations=ints(*[1] * n),
    )
    tables.apply(plan)
    edits.apply(plan)
    tables.check(plan)
    return tables, Sampler(tables, edits, processed=processed), plan


def random_logits(n, seed=0):
    return torch.randn(n, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def test_greedy_takes_the_best_and_of_equals_the_lowest_id():
    tables, sampler, plan = fresh({}, {}, {})
    logits = random_logits(3)
    logits[1, [9, 4, 20]] = 50.0
    found = sampler.sample(plan, logits.clone())
    assert found.tokens.tolist() == [int(logits[0].argmax()), 4, int(logits[2].argmax())]
    assert found.tokens.dtype == np.int32 and found.bad.tolist() == [] and found.logprobs == []
    for row, token in enumerate(found.tokens.tolist()):
        assert tables.describe(row)["tokens"] == [4, 5, 6, token]


def test_random_rows_pass_their_own_parameters_and_positions():
    samplings = [
        {"temperature": 0.8, "top_k": 5, "seed": 2**64 - 1, "index": 2},
        {},
        {"temperature": 1.3, "top_p": 0.7, "min_p": 0.05, "seed": 11},
        *({"temperature": 9.0, "seed": seed, "index": seed % 3} for seed in range(8)),
    ]
    _, sampler, plan = fresh(*samplings)
    logits = random_logits(len(samplings))
    found = sampler.sample(plan, logits.clone())
    for i, s in enumerate(RowSampling(**s) for s in samplings):
        token = torch.zeros(1, dtype=torch.int32)
        seed = s.seed - 2**64 if s.seed >= 2**63 else s.seed
        ops.sample(
            token, logits[i : i + 1], torch.tensor([s.temperature]), torch.tensor([s.top_k], dtype=torch.int32),
            torch.tensor([s.top_p]), torch.tensor([s.min_p]), torch.tensor([seed]),
            torch.tensor([s.index], dtype=torch.int32), torch.tensor([3], dtype=torch.int32))  # fmt: skip
        assert found.tokens[i] == token.item()


def test_a_beam_row_gets_no_token_and_stays_as_it_is():
    tables, sampler, plan = fresh({"beam": True, "logprobs": 4}, {})
    logits = random_logits(2)
    found = sampler.sample(plan, logits.clone())
    assert found.tokens.tolist() == [-1, int(logits[1].argmax())] and found.bad.tolist() == []
    assert tables.describe(0)["tokens"] == [4, 5, 6] and len(tables.describe(1)["tokens"]) == 4
    (entry,) = found.logprobs
    best = torch.log_softmax(logits[0], 0).topk(4)
    assert entry.row == 0 and entry.start == 3 and entry.tokens.tolist() == [-1] and entry.ranks.tolist() == [0]
    assert entry.top_tokens.tolist() == [best.indices.tolist()]
    np.testing.assert_allclose(entry.top_logprobs[0], best.values.numpy(), rtol=1e-5)


@pytest.mark.parametrize("broken", ["nan", "all minus infinity", "processor"])
def test_a_bad_row_ends_alone_and_a_step_already_planned_still_fits(broken, caplog):
    def boom(ids, logits):
        raise ValueError

    def check(tables, sampler, plan, index):
        logits = random_logits(3)
        if broken != "processor":
            logits[index] = math.nan if broken == "nan" else -math.inf
        found = sampler.sample(plan, logits.clone())
        assert found.bad.tolist() == [index] and found.bad.dtype == np.int32
        good = [i for i in range(3) if i != index]
        assert [found.tokens[i] for i in good] == [int(logits[i].argmax()) for i in good] and found.tokens[index] == -1
        assert [entry.row for entry in found.logprobs] == good
        for entry, i in zip(found.logprobs, good, strict=True):
            expected = torch.log_softmax(logits[i], 0)[int(found.tokens[i])].item()
            assert entry.logprobs[0] == pytest.approx(expected, rel=1e-5)
        assert tables.describe(index)["tokens"] == [4, 5, 6, 0]  # any legal token: the row ends

    samplings = [{"logprobs": 2, "bias_ids": (1,), "bias_values": (0.0,)}, {"logprobs": 0}, {"logprobs": 1}]
    if broken == "processor":
        samplings[1]["processors"] = True
        tables = Tables(3, 32, 4, 64)
        edits = LogitEdits(tables, VOCAB)
        edits.set_processors(1, 1, [boom])
        _, _, plan = fresh(*[{**s, "processors": False} for s in samplings])
        for new, sampling in zip(plan.new, samplings, strict=True):
            new.sampling = RowSampling(**sampling)
        tables.apply(plan)
        edits.apply(plan)
        check(tables, Sampler(tables, edits, processed=False), plan, 1)
    else:
        for index in range(3):
            check(*fresh(*samplings), index)


def assert_entry(entry, distribution, token, k):
    expected = torch.log_softmax(distribution.double(), 0)
    order = sorted(range(VOCAB), key=lambda i: (-distribution[i].item(), i))
    assert entry.tokens.tolist() == [token] and entry.ranks.tolist() == [order.index(token) + 1]
    assert entry.logprobs[0] == pytest.approx(expected[token].item(), rel=1e-5, abs=1e-6)
    assert entry.top_tokens.tolist() == [order[:k]] and entry.top_logprobs.shape == (1, k)
    np.testing.assert_allclose(entry.top_logprobs[0], expected[order[:k]].numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("edited", [False, True])
def test_logprobs_of_the_raw_or_the_processed_distribution(processed, edited):
    asks = {"bias_ids": (3, 5), "bias_values": (2.0, -2.0), "presence": 0.5} if edited else {}
    samplings = [
        {"logprobs": 3, "temperature": 0.5, "seed": 1, **asks},
        {},
        {"logprobs": 0, **asks},
        {"logprobs": VOCAB, "temperature": 2.0, "seed": 2},
    ]
    _, sampler, plan = fresh(*samplings, processed=processed)
    logits = random_logits(4)
    found = sampler.sample(plan, logits.clone())
    assert [entry.row for entry in found.logprobs] == [0, 2, 3] and {entry.start for entry in found.logprobs} == {3}
    for entry in found.logprobs:
        s = RowSampling(**samplings[entry.row])
        own = logits[entry.row].clone()
        if processed:
            own[list(s.bias_ids)] += torch.tensor(s.bias_values)
            own[6] -= s.presence  # the row's only output token
            own /= s.temperature or 1.0
        assert_entry(entry, own, int(found.tokens[entry.row]), min(s.logprobs, VOCAB))


def test_sampling_does_not_change_logits_that_nobody_edits():
    _, sampler, plan = fresh({"temperature": 0.7, "logprobs": 1}, {}, processed=True)
    logits = random_logits(2)
    given = logits.clone()
    sampler.sample(plan, given)
    assert torch.equal(given, logits)


@pytest.mark.parametrize("tile", [1, 3, 128])
def test_prompt_logprobs_score_the_next_prompt_token_in_tiles(tile, monkeypatch):
    monkeypatch.setattr(module, "PROMPT_TILE", tile)
    head_calls = []
    weight = torch.randn(VOCAB, 8, generator=torch.Generator().manual_seed(1))

    def head(hidden):
        head_calls.append(len(hidden))
        return hidden @ weight.T

    tokens = [(3 * i) % VOCAB for i in range(12)]
    samplings = [{"prompt_logprobs": 2}, {}, {"prompt_logprobs": 0}]
    tables, sampler, plan = fresh(*samplings, tokens=tokens, num_prompt=10)
    # row 0 computes 2 .. 6, row 1 everything, row 2 from 5 to the end, beyond its prompt
    plan.starts, plan.counts = ints(2, 0, 5), ints(4, 12, 7)
    tables.computed[:] = plan.starts
    batch = build(plan, tables)
    hidden = torch.randn(23, 8, generator=torch.Generator().manual_seed(2))
    found = sampler.score_prompts(plan, batch, hidden, head)
    assert max(head_calls) <= tile and sum(head_calls) == 8
    assert [(e.row, e.start, len(e.tokens)) for e in found] == [(0, 3, 4), (2, 6, 4)]
    logits = hidden @ weight.T
    for entry, first, k in zip(found, (0, 16), (2, 0), strict=True):
        assert entry.top_tokens.shape == (4, k)
        assert entry.tokens.tolist() == tokens[entry.start : entry.start + 4]
        for i, token in enumerate(entry.tokens.tolist()):
            expected = torch.log_softmax(logits[first + i].double(), 0)
            assert entry.logprobs[i] == pytest.approx(expected[token].item(), rel=1e-5)
            assert entry.ranks[i] == 1 + int((expected > expected[token]).sum())
            assert entry.top_tokens[i].tolist() == expected.topk(k).indices.tolist()


def test_a_decode_step_has_no_prompt_logprobs():
    tables, sampler, plan = fresh({"prompt_logprobs": 2}, tokens=(1, 2, 3), num_prompt=2)
    plan.starts, plan.counts = ints(2), ints(1)
    tables.computed[:] = 2
    assert sampler.score_prompts(plan, build(plan, tables), torch.zeros(1, 4), None) == []
