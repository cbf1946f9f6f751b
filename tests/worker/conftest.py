"""Two hosts for the worker's tests, and a tiny network.

PlainWorld makes random plans, and models in lists what a device must hold after them. Host makes plans to order.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from octavo.models.decoder import Decoder
from octavo.models.spec import DecoderSpec, LayerSpec, RopeSpec
from octavo.plan import NewRow, RowSampling, StepPlan


def ints(values):
    return np.array(values, np.int32)


@dataclass
class PlainRow:
    generation: int
    tokens: list
    num_prompt: int
    computed: int
    blocks: list
    sampling: RowSampling

    def facts(self):
        return {
            "generation": self.generation,
            "tokens": list(self.tokens),
            "computed": self.computed,
            "num_prompt": self.num_prompt,
            "blocks": list(self.blocks),
        }


@dataclass
class PlainWorld:
    """Rows, block size and vocabulary of a device, its live rows, and the numbers of the next plan."""

    num_rows: int = 6
    max_model_len: int = 40
    block_size: int = 4
    num_blocks: int = 64
    vocab_size: int = 50
    epoch: int = 7
    step: int = 0
    generation: int = 0
    rows: dict = field(default_factory=dict)

    @property
    def max_blocks(self):
        return -(-self.max_model_len // self.block_size)

    def tokens(self, rng, n):
        return [rng.randrange(self.vocab_size) for _ in range(n)]

    def blocks(self, rng, tokens):
        return [rng.randrange(self.num_blocks) for _ in range(-(-tokens // self.block_size))]

    def sampling(self, rng):
        return RowSampling(
            temperature=rng.choice([0.0, 0.7]),
            top_k=rng.choice([0, 5]),
            top_p=rng.choice([1.0, 0.9]),
            min_p=rng.choice([0.0, 0.1]),
            seed=rng.randrange(2**64),
            index=rng.randrange(4),
            logprobs=rng.choice([-1, 0, 3]),
            prompt_logprobs=rng.choice([-1, 0, 2]),
            presence=rng.choice([0.0, 0.5]),
            frequency=rng.choice([0.0, 0.25]),
            repetition=rng.choice([1.0, 1.5]),
            min_tokens=rng.choice([0, 3]),
            stop_ids=rng.choice([(), (1, 2)]),
            beam=rng.random() < 0.2,
        )

    def start(self, row, tokens, num_prompt, start, blocks, sampling):
        self.generation += 1
        new = NewRow(
            row=row,
            generation=self.generation,
            tokens=ints(tokens),
            num_prompt=num_prompt,
            start=start,
            blocks=ints(blocks),
            sampling=sampling,
        )
        self.rows[row] = PlainRow(self.generation, list(tokens), num_prompt, start, list(blocks), sampling)
        return new

    def next_plan(self, rng, *, decode_only=False):
        """A legal random plan; the model's rows are changed as far as ``Tables.apply`` has to change the device's."""
        ended = [row for row in list(self.rows) if rng.random() < 0.1]
        for row in ended:
            del self.rows[row]
        free = [row for row in range(self.num_rows) if row not in self.rows]
        rng.shuffle(free)
        new, append, forced = [], [], []
        while free and rng.random() < 0.5:
            prompt = rng.randint(1, self.max_model_len - 8)
            known = prompt + (rng.randint(0, 7) if rng.random() < 0.3 else 0)
            start = rng.randint(0, known - 1)
            blocks = self.blocks(rng, rng.randint(start, known))
            new.append(self.start(free.pop(), self.tokens(rng, known), prompt, start, blocks, self.sampling(rng)))
        for number, row in list(self.rows.items()):
            if free and rng.random() < 0.15 and len(row.tokens) <= self.max_model_len:  # a fork, with the KV it has
                args = (list(row.tokens), row.num_prompt, row.computed, list(row.blocks), row.sampling)
                new.append(self.start(free.pop(), *args))
            if row.sampling.beam:
                for token in self.tokens(rng, rng.choice([0, 0, 1, 2])):
                    if len(row.tokens) < self.max_model_len:
                        row.tokens.append(token)
                        forced.append((number, token))
        rng.shuffle(forced)
        order = {}
        for number, token in forced:  # shuffled above, so what a row gets follows the order of the plan
            order.setdefault(number, []).append(token)
        for number, tokens in order.items():
            self.rows[number].tokens[-len(tokens) :] = tokens
        work = []
        for number, row in self.rows.items():
            left = min(len(row.tokens), self.max_model_len) - row.computed
            if left > 0 and rng.random() < 0.8 and (left == 1 or not decode_only):
                work.append((number, rng.choice([1, left, rng.randint(1, left)])))
        rng.shuffle(work)
        for number, count in work:
            blocks = self.rows[number].blocks
            while len(blocks) * self.block_size < self.rows[number].computed + count:
                block = rng.randrange(self.num_blocks)
                append.append((number, len(blocks), block))
                blocks.append(block)
        for number, row in self.rows.items():
            if row.blocks and rng.random() < 0.1:  # copy on write: another block in a place that is taken
                place, block = rng.randrange(len(row.blocks)), rng.randrange(self.num_blocks)
                append.append((number, place, block))
                row.blocks[place] = block
        sample = [(n, i) for i, (n, c) in enumerate(work) if self.rows[n].computed + c == len(self.rows[n].tokens)]
        for number, i in list(sample):
            if free and rng.random() < 0.4:  # a sibling that reads the same logits
                row = self.rows[number]
                blocks = list(row.blocks)
                new.append(
                    self.start(free.pop(), row.tokens, row.num_prompt, len(row.tokens), blocks, self.sampling(rng))
                )
                sample.append((new[-1].row, i))
        rng.shuffle(sample)
        rng.shuffle(new)
        plan = StepPlan(
            epoch=self.epoch,
            step=self.step,
            rows=ints([n for n, _ in work]),
            starts=ints([self.rows[n].computed for n, _ in work]),
            counts=ints([c for _, c in work]),
            sample_rows=ints([n for n, _ in sample]),
            sample_from=ints([i for _, i in sample]),
            sample_pos=ints([len(self.rows[n].tokens) for n, _ in sample]),
            sample_generations=ints([self.rows[n].generation for n, _ in sample]),
            new=new,
            ended=ints(ended),
            append_rows=ints([a for a, _, _ in append]),
            append_index=ints([a for _, a, _ in append]),
            append_blocks=ints([a for _, _, a in append]),
            forced_rows=ints([a for a, _ in forced]),
            forced_tokens=ints([a for _, a in forced]),
        )
        self.step += 1
        return plan

    def finish(self, plan, tokens):
        """The step is over: ``tokens`` were sampled for the plan's sampling rows that are no beams."""
        for number, count in zip(plan.rows.tolist(), plan.counts.tolist(), strict=True):
            self.rows[number].computed += count
        for number, token in tokens.items():
            self.rows[number].tokens.append(token)


@pytest.fixture(scope="session")
def plain_world():
    return PlainWorld


def tiny_spec(**changes):
    values = {
        "family": "tiny", "vocab_size": 61, "embedding_rows": 64, "hidden": 32, "num_heads": 4, "num_kv_heads": 2,
        "head_dim": 8, "intermediate": 48, "max_len": 64, "layers": (LayerSpec(), LayerSpec(window=9)),
        "ropes": (RopeSpec(rotary_dim=8),), "attn_scale": 8**-0.5,
    }  # fmt: skip
    return DecoderSpec(**{**values, **changes})


def tiny_decoder(spec, dtype=torch.float32, max_model_len=64, device="cpu"):
    """A decoder with random weights whose logits are far from flat."""
    decoder = Decoder(spec, dtype=dtype, max_model_len=max_model_len, device=device)
    rng = torch.Generator().manual_seed(1)
    for name, shape in decoder.expected().items():
        scale = 1.0 if len(shape) == 1 else 2.0 / shape[-1] ** 0.5
        decoder.load(name, torch.randn(shape, generator=rng) * scale)
    decoder.finish()
    return decoder


class Host:
    """Numbers plans and remembers what the rows of a runner hold.

    ``step(rows={row: count}, ...)`` computes so many tokens of each row, samples those that reach their end, and
    appends what comes back.
    """

    def __init__(self, runner):
        self.runner, self.number, self.generation = runner, 0, 0
        self.tokens, self.computed, self.owner, self.beams = {}, {}, {}, set()

    def new(self, row, tokens, blocks, *, start=0, num_prompt=None, **sampling):
        self.generation += 1
        self.tokens[row], self.computed[row], self.owner[row] = list(tokens), start, self.generation
        (self.beams.add if sampling.get("beam") else self.beams.discard)(row)
        return NewRow(
            row=row,
            generation=self.generation,
            tokens=ints(tokens),
            num_prompt=num_prompt or len(tokens),
            start=start,
            blocks=ints(blocks),
            sampling=RowSampling(**sampling),
        )

    def plan(self, rows=None, *, siblings=(), forced=(), **changes):
        for row, token in forced:
            self.tokens[row].append(token)
        work = list((rows or {}).items())
        sample = [(r, i) for i, (r, n) in enumerate(work) if self.computed[r] + n == len(self.tokens[r])]
        sample += [(r, [row for row, _ in work].index(of)) for r, of in siblings]
        pairs = {k: np.array(v, np.int32) for k, v in changes.items() if k in ("copies", "swap_out", "swap_in")}
        rest = {k: v if k == "new" else ints(v) for k, v in changes.items() if k not in pairs}
        plan = StepPlan(
            epoch=0,
            step=self.number,
            rows=ints([r for r, _ in work]),
            starts=ints([self.computed[r] for r, _ in work]),
            counts=ints([n for _, n in work]),
            sample_rows=ints([r for r, _ in sample]),
            sample_from=ints([i for _, i in sample]),
            sample_pos=ints([len(self.tokens[r]) for r, _ in sample]),
            sample_generations=ints([self.owner[r] for r, _ in sample]),
            forced_rows=ints([r for r, _ in forced]),
            forced_tokens=ints([t for _, t in forced]),
            **pairs,
            **rest,
        )
        self.number += 1
        return plan

    def take(self, plan, result):
        for row, count in zip(plan.rows.tolist(), plan.counts.tolist(), strict=True):
            self.computed[row] += count
        for row, token in zip(plan.sample_rows.tolist(), result.tokens.tolist(), strict=True):
            if row not in self.beams:
                self.tokens[row].append(max(token, 0))
        return result

    def step(self, rows=None, **changes):
        plan = self.plan(rows, **changes)
        return self.take(plan, self.runner.run(plan))


@pytest.fixture(scope="session")
def tiny():
    """spec and decoder builders, and the host that drives a runner."""
    return SimpleNamespace(spec=tiny_spec, decoder=tiny_decoder, Host=Host, ints=ints)
