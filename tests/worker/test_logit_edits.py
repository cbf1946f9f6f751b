"""Each edit of logits against a plain oracle in lists; penalties against their definition; processors fail alone."""

import math
import random

import numpy as np
import pytest
import torch

from octavo.plan import NewRow, RowSampling, StepPlan
from octavo.worker.logit_edits import LogitEdits
from octavo.worker.tables import Tables

VOCAB = 23


def ints(*values):
    return np.array(values, np.int32)


class Device:
    """Tables and edits that follow the same plans."""

    def __init__(self, num_rows=4):
        self.tables = Tables(num_rows, 32, 4, 64)
        self.edits = LogitEdits(self.tables, VOCAB)
        self.step = 0

    def apply(self, **changes):
        plan = StepPlan(epoch=0, step=self.step, **changes)
        self.step += 1
        self.tables.apply(plan)
        self.edits.apply(plan)

    def start(self, *rows, ended=()):
        self.apply(new=list(rows), ended=ints(*ended))

    def edit(self, rows, logits):
        """Edited copies of ``logits`` and the indices that failed."""
        logits = logits.clone()
        rows = np.array(rows, np.intp)
        assert self.edits.needed(rows)
        spoiled = self.edits.edit(rows, logits)
        return logits, spoiled.nonzero().flatten().tolist()


def new(row=0, prompt=(1, 2, 3), output=(), generation=1, **sampling):
    tokens = [*prompt, *output]
    return NewRow(
        row=row,
        generation=generation,
        tokens=ints(*tokens),
        num_prompt=len(prompt),
        start=0,
        blocks=ints(),
        sampling=RowSampling(**sampling),
    )


def oracle(logits, sampling, prompt, output):
    """The edits in plain Python, in their order."""
    x = [float(v) for v in logits]
    for token, value in zip(sampling.bias_ids, sampling.bias_values, strict=True):
        x[token] = float(np.float32(x[token]) + np.float32(value))
    if sampling.allowed is not None:
        x = [v if i in sampling.allowed else -math.inf for i, v in enumerate(x)]
    for *prefix, last in sampling.bad_words:
        if not prefix or list(output[-len(prefix) :]) == prefix:
            x[last] = -math.inf
    if len(output) < sampling.min_tokens:
        for token in sampling.stop_ids:
            x[token] = -math.inf
    for token in range(len(x)):
        count = list(output).count(token)
        if count or token in prompt:
            x[token] = x[token] / sampling.repetition if x[token] > 0 else x[token] * sampling.repetition
        x[token] -= sampling.frequency * count + sampling.presence * (count > 0)
    return x


CASES = {
    "bias": {"bias_ids": (3, 7), "bias_values": (1.5, -100.0)},
    "allowed": {"allowed": (0, 4, 22)},
    "bias and allowed": {"bias_ids": (4, 5), "bias_values": (2.0, 50.0), "allowed": (4, 22)},
    "one-token bad word": {"bad_words": ((6,),)},
    "bad word whose prefix is there": {"bad_words": ((8, 9, 10), (9, 11), (12, 13))},
    "bad word longer than the output": {"bad_words": ((7, 8, 9, 10),)},
    "bad word that spans the prompt": {"bad_words": ((3, 8, 9, 14),)},
    "min_tokens": {"min_tokens": 3, "stop_ids": (1, 5)},
    "min_tokens reached": {"min_tokens": 2, "stop_ids": (1, 5)},
    "repetition": {"repetition": 1.7},
    "presence and frequency": {"presence": 0.4, "frequency": -0.3},
    "all": {
        "bias_ids": (2,), "bias_values": (3.0,), "allowed": (1, 2, 8, 9, 10), "bad_words": ((9, 10),), "min_tokens": 9,
        "stop_ids": (1,), "repetition": 0.6, "presence": 0.5, "frequency": 0.1,
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("output", [(), (8, 9), (9, 8, 8, 9)])
def test_an_edit_is_what_the_oracle_says(case, output):
    device = Device()
    asks = new(prompt=(1, 2, 3), output=output, **CASES[case])
    device.start(asks, new(row=2))
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(3))
    edited, failed = device.edit([2, 0], logits)
    assert failed == []
    assert torch.equal(edited[0], logits[0])  # a row that did not ask
    expected = oracle(logits[1].tolist(), asks.sampling, (1, 2, 3), output)
    torch.testing.assert_close(edited[1], torch.tensor(expected), rtol=1e-6, atol=1e-6)


def test_rows_that_ask_for_nothing_need_nothing():
    device = Device()
    device.start(new(temperature=0.5, min_tokens=4), new(row=1, bias_ids=(1,), bias_values=(1.0,)))
    assert not device.edits.needed(np.array([0]))  # min_tokens without stop ids masks nothing
    assert device.edits.needed(np.array([0, 1]))
    device.start(ended=(1,))
    assert not device.edits.needed(np.array([0, 1]))


def test_counters_follow_sampled_and_forced_tokens_and_slots_come_back():
    rng = random.Random(5)
    device = Device(num_rows=3)
    known = {}
    for step in range(200):
        ended = [row for row in known if rng.random() < 0.15]
        for row in ended:
            del known[row]
        rows = []
        for row in set(range(3)) - set(known):
            if rng.random() < 0.6:
                prompt = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 4))]
                output = [rng.randrange(VOCAB) for _ in range(rng.randint(0, 3))]
                asks = rng.random() < 0.7
                rows.append(new(row, prompt, output, step, repetition=1.3 if asks else 1.0, frequency=0.5 * asks))
                known[row] = (rows[-1].sampling, prompt, output)
        forced = [(row, rng.randrange(VOCAB)) for row in known if rng.random() < 0.2 for _ in range(2)]
        forced = [(row, token) for row, token in forced if len(known[row][2]) < 20]
        device.apply(
            ended=ints(*ended),
            new=rows,
            forced_rows=ints(*(r for r, _ in forced)),
            forced_tokens=ints(*(t for _, t in forced)),
        )
        for row, token in forced:
            known[row][2].append(token)
        draws = {row: rng.randrange(VOCAB) for row in known if rng.random() < 0.7 and len(known[row][2]) < 25}
        index = np.array(list(draws), np.intp)
        device.edits.advance(index, ints(*draws.values()))
        device.tables.write(index, ints(*draws.values()))
        for row, token in draws.items():
            known[row][2].append(token)
        live = sorted(known)
        asking = [row for row in live if known[row][0].repetition != 1.0]
        assert device.edits.pool.used == len(asking)
        if asking:
            logits = torch.randn(len(live), VOCAB)
            edited, _ = device.edit(live, logits)
            for i, row in enumerate(live):
                expected = oracle(logits[i].tolist(), *known[row])
                torch.testing.assert_close(edited[i], torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_processors_run_in_order_between_the_masks_and_the_penalties():
    seen = []

    def first(ids, logits):
        seen.append((list(ids), logits[0].item()))
        return logits + 1.0  # a new tensor

    def second(ids, logits):
        logits[2] = 10.0  # in place
        return logits

    device = Device()
    device.edits.set_processors(0, 1, [first, second])
    device.start(
        new(output=(2, 4), processors=True, bias_ids=(0,), bias_values=(5.0,), presence=1.0, repetition=2.0)
    )
    edited, failed = device.edit([0], torch.zeros(1, VOCAB))
    assert failed == [] and seen == [([2, 4], 5.0)]
    expected = torch.ones(VOCAB)
    expected[[1, 3]] = 0.5  # in the prompt
    expected[0], expected[2], expected[4] = 6.0, 10.0 / 2 - 1.0, 1.0 / 2 - 1.0
    assert torch.equal(edited[0], expected)


def boom(ids, logits):
    raise ValueError("no")


@pytest.mark.parametrize(
    "broken", [boom, lambda ids, logits: None, lambda ids, logits: logits[:-1], lambda ids, logits: logits.tolist()]
)
def test_a_broken_processor_spoils_its_own_row_only(broken, caplog):
    device = Device()
    device.edits.set_processors(1, 1, [broken])
    device.start(new(row=1, processors=True), new(row=0, bias_ids=(2,), bias_values=(1.0,)))
    logits = torch.zeros(2, VOCAB)
    edited, failed = device.edit([1, 0], logits)
    assert failed == [0] and edited[1, 2] == 1.0
    assert "A logits processor failed" in caplog.text


def test_processors_belong_to_a_generation():
    device = Device()
    device.edits.set_processors(0, 1, [lambda ids, logits: logits + 1.0])
    device.start(new(processors=True))
    device.edits.set_processors(0, 2, [lambda ids, logits: logits + 2.0])  # before row 0 has ended
    assert device.edit([0], torch.zeros(1, VOCAB))[0][0, 0] == 1.0
    device.start(new(generation=2, processors=True), ended=(0,))
    assert device.edit([0], torch.zeros(1, VOCAB))[0][0, 0] == 2.0
    device.start(ended=(0,))
    assert device.edits._given == {}


def test_registrations_of_rows_that_never_start_do_not_pile_up():
    device = Device()
    for generation in range(10):
        device.edits.set_processors(0, generation, [boom])
    assert len(device.edits._given[0]) == 1


def test_a_row_with_processors_that_nobody_registered_is_refused():
    with pytest.raises(RuntimeError, match="row 0 starts with generation 1 and processors, none registered"):
        Device().start(new(processors=True))


def test_an_edit_cannot_hide_a_nan():
    device = Device()
    device.start(new(allowed=(3,)))
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = math.nan
    assert device.edit([0], logits)[1] == [0]
