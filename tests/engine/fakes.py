"""FakeGroup: a group of workers without a model that obeys plans to the letter and proves that they can be obeyed.

KV is one 64-bit number per slot. The number of a token mixes its id, its place and *all numbers before it, read through the
row's block table*, as attention does; logits are made from the same mix. So a wrong block, a missing copy, a block that two
rows write or a swap that lost its race changes what is generated, and is caught at once by comparing what a row reads with
what its tokens say it should read. ``reference`` is the same model as a plain loop, without rows or blocks.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.messages import EngineRequest, SequenceEnd, StepOutput
from octavo.params import SamplingParams
from octavo.plan import GroupInfo, NewRow, RowLogprobs, RowSampling, StepPlan, StepResult, checksum

MASK = 2**64 - 1
ROOT = 0x243F6A8885A308D3
SPOILT = 0x5DEECE66D  # what a failed step leaves in the KV is not what it should be
VOCAB = 48
POISON = 0xDEAD


def mix(x: int) -> int:
    """splitmix64."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def kv_of(state: int, token: int, place: int) -> int:
    return mix(state ^ (token + 1) * 0xD1342543DE82EF95 & MASK ^ (place + 1) * 0xA0761D6478BD642F & MASK) or 1


def after(state: int, kv: int, place: int) -> int:
    return (state + kv * (2 * place + 1)) & MASK


def state_of(tokens: Sequence[int], state: int = ROOT, start: int = 0) -> int:
    for place, token in enumerate(tokens, start):
        state = after(state, kv_of(state, int(token), place), place)
    return state


def _mix_all(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = x + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def _uniform(key: int, vocab: int) -> np.ndarray:
    ids = np.arange(vocab, dtype=np.uint64) * np.uint64(0xE7037ED1A0B428DB)
    return ((_mix_all(ids ^ np.uint64(key & MASK)) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def logprobs_of(state: int, vocab: int) -> np.ndarray:
    logits = (6.0 * _uniform(mix(state), vocab)).astype(np.float32)
    return logits - np.log(np.exp(logits).sum(dtype=np.float32), dtype=np.float32)


def choose(state: int, s: RowSampling, position: int, num_prompt: int, output: list[int], vocab: int,
           processors: Sequence[Callable] = ()) -> int:
    """The next token, a function of nothing but these arguments."""
    scores = logprobs_of(state, vocab).astype(np.float64)
    for token, bias in zip(s.bias_ids, s.bias_values, strict=True):
        scores[token] += bias
    for processor in processors:
        scores = processor(output, scores)
    if s.allowed is not None:
        keep = np.full(vocab, -np.inf)
        keep[list(s.allowed)] = 0.0
        scores = scores + keep
    if position - num_prompt < s.min_tokens:
        scores[list(s.stop_ids)] = -np.inf
    if s.temperature > 0.0:
        u = _uniform(mix(s.seed ^ mix(s.index * 2**32 + position)), vocab)
        scores = scores / s.temperature - np.log(-np.log(u))
    return int(np.argmax(scores))


def reference(request: EngineRequest, index: int, seed: int, max_total: int, vocab: int = VOCAB) -> tuple[list[int], str]:
    """What continuation ``index`` of a request generates, and why it ends: the model as a plain loop."""
    p = request.params
    stops = set(p.stop_token_ids) | (set() if p.ignore_eos else set(request.eos_token_ids))
    sampling = RowSampling(
        temperature=p.temperature, seed=seed, index=index, min_tokens=p.min_tokens, stop_ids=tuple(stops),
        bias_ids=tuple(p.logit_bias), bias_values=tuple(p.logit_bias.values()),
        allowed=None if p.allowed_token_ids is None else tuple(p.allowed_token_ids))
    tokens, num_prompt = list(request.prompt_token_ids), len(request.prompt_token_ids)
    state = state_of(tokens)
    while True:
        token = choose(state, sampling, len(tokens), num_prompt, tokens[num_prompt:], vocab, p.logits_processors)
        state = after(state, kv_of(state, token, len(tokens)), len(tokens))
        tokens.append(token)
        if token in stops:
            return tokens[num_prompt:], "stop"
        if len(tokens) >= max_total:
            return tokens[num_prompt:], "length"


@dataclass
class Row:
    generation: int
    tokens: list[int]
    num_prompt: int
    computed: int
    blocks: list[int]
    sampling: RowSampling
    state: int  # after ``computed`` tokens, from the tokens alone
    processors: Sequence[Callable] = ()


class Pending:
    def __init__(self, found: StepResult | Exception) -> None:
        self._found = found

    def done(self) -> bool:
        return True

    def result(self) -> StepResult:
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


class Fault(RuntimeError):
    """An injected failure."""


class Violation(BaseException):
    """A plan that cannot be obeyed. Not an Exception: the engine must not take it for a failed step and go on."""


@dataclass
class FakeGroup:
    """Workers of one device, see the file's docstring. ``plans`` counts what happened in them.

    Attributes:
        fail: (step) -> None | "submit" | "result": where a step fails. bad: (tokens of a row) -> True: no finite logits.
        model: (tokens of a row) -> logprobs [vocab], in place of the mix of numbers.
    """

    info: GroupInfo
    asynchronous: bool = False
    fail: Callable[[int], str | None] = lambda step: None
    bad: Callable[[list[int]], bool] = lambda tokens: False
    model: Callable[[list[int]], np.ndarray] | None = None
    rows: dict[int, Row] = field(default_factory=dict)
    plans: Counter[str] = field(default_factory=Counter)
    step: int = 0
    closed: bool = False
    most_tokens: int = 0
    faults: list[int] = field(default_factory=list)
    registered: dict[tuple[int, int], Sequence[Callable]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.kv = np.zeros((self.info.num_blocks, self.info.block_size), np.uint64)
        self.host = np.zeros((self.info.num_host_blocks, self.info.block_size), np.uint64)

    def host_ready(self):
        return True

    def expect_host(self):
        pass

    def set_processors(
        self, row: int, generation: int, processors: Sequence[Callable], constraint: Callable | None = None
    ) -> None:
        self.registered[row, generation] = processors

    def close(self) -> None:
        self.closed = True

    def submit(self, plan: StepPlan) -> Pending:
        try:
            return self._submit(plan)
        except Fault:
            raise
        except Exception as error:
            raise Violation(f"step {plan.step}: {type(error).__name__} {error}") from error

    def _submit(self, plan: StepPlan) -> Pending:
        assert plan.step == self.step, f"step {plan.step} where {self.step} is due"
        assert plan.epoch == 0
        self.step += 1
        self._apply(plan)
        where = self.fail(plan.step)
        if where:  # worse than most workers: what it should have moved is lost, so whoever trusts it reads something else
            self.faults.append(plan.step)
            self.host[plan.swap_out[:, 1]] = POISON
            self.kv[plan.copies[:, 1]] = self.kv[plan.swap_in[:, 1]] = POISON
        result = self._run(plan, spoil=SPOILT if where else 0)
        if where == "submit":
            raise Fault("injected")
        return Pending(Fault("injected") if where else result)

    # -- changes -------------------------------------------------------------------------------------------------------

    def _apply(self, plan: StepPlan) -> None:
        for name in ("ended", "new", "copies", "swap_out", "swap_in", "append_rows", "forced_rows"):
            self.plans[name] += len(getattr(plan, name))
        for array in (plan.rows, plan.starts, plan.counts, plan.sample_rows, plan.sample_from, plan.sample_pos,
                      plan.sample_generations, plan.ended, plan.append_rows, plan.append_index, plan.append_blocks,
                      plan.forced_rows, plan.forced_tokens, plan.copies, plan.swap_out, plan.swap_in):
            assert array.dtype == np.int32 and array.flags.c_contiguous
        for row in plan.ended.tolist():
            del self.rows[row]  # a KeyError is a row that nobody owned
        self._move(plan.swap_out, self.kv, self.host)
        self._move(plan.copies, self.kv, self.kv)
        self._move(plan.swap_in, self.host, self.kv)
        for new in plan.new:
            self._start(new)
        for row, index, block in zip(plan.append_rows.tolist(), plan.append_index.tolist(), plan.append_blocks.tolist(),
                                     strict=True):
            blocks = self.rows[row].blocks
            assert 0 <= index <= len(blocks) and 0 <= block < self.info.num_blocks
            blocks[index:] = [block, *blocks[index + 1 :]]
        for row, token in zip(plan.forced_rows.tolist(), plan.forced_tokens.tolist(), strict=True):
            assert self.rows[row].sampling.beam
            self.rows[row].tokens.append(token)

    def _move(self, pairs: np.ndarray, source: np.ndarray, target: np.ndarray) -> None:
        if not len(pairs):
            return
        src, dst = pairs[:, 0], pairs[:, 1]
        assert len(set(dst.tolist())) == len(dst), f"two moves into one block: {pairs.tolist()}"
        if source is target:
            assert not set(src.tolist()) & set(dst.tolist()), f"a copy reads what another writes: {pairs.tolist()}"
        target[dst] = source[src]

    def _start(self, new: NewRow) -> None:
        assert new.row not in self.rows, f"row {new.row} has an owner"
        assert 0 <= new.row < self.info.max_num_seqs and 0 <= new.start <= len(new.tokens) and new.num_prompt > 0
        blocks = new.blocks.tolist()
        assert new.start <= len(blocks) * self.info.block_size and len(set(blocks)) == len(blocks)
        tokens = new.tokens.tolist()
        processors = self.registered.pop((new.row, new.generation), ())
        assert bool(processors) == new.sampling.processors
        self.rows[new.row] = Row(new.generation, tokens, new.num_prompt, new.start, blocks, new.sampling,
                                 state_of(tokens[: new.start]), processors)

    # -- computation ---------------------------------------------------------------------------------------------------

    def _run(self, plan: StepPlan, spoil: int) -> StepResult:
        rows, size = plan.rows.tolist(), self.info.block_size
        assert len(set(rows)) == len(rows) and len(set(plan.sample_rows.tolist())) == len(plan.sample_rows)
        total = int(plan.counts.sum())
        assert 0 < total <= self.info.max_num_batched_tokens
        self.most_tokens = max(self.most_tokens, total)
        self._check_writes(plan)
        work = []
        prompt_logprobs = []
        for row, start, count in zip(rows, plan.starts.tolist(), plan.counts.tolist(), strict=True):
            r = self.rows[row]
            end = start + count
            assert start == r.computed and count >= 1 and end <= len(r.tokens), (
                f"row {row} computes [{start}, {end}) with {r.computed} of {len(r.tokens)} computed")
            assert end <= len(r.blocks) * size, f"row {row} has {len(r.blocks)} blocks for {end} tokens"
            state = self._read(r, start)
            assert spoil or state == r.state, f"row {row} reads KV that is not its own before {start}"
            r.state = state
            work.append((row, r, start, end))
        # Everything that the step reads was there before it (or is the row's own); now everything is written.
        for row, r, start, end in work:
            scored = []
            for place in range(start, end):
                value = kv_of(r.state, r.tokens[place], place) ^ spoil
                self.kv[r.blocks[place // size], place % size] = value
                r.state = after(r.state, value, place)
                if r.sampling.prompt_logprobs >= 0 and place + 1 < r.num_prompt:
                    scored.append((place + 1, r.tokens[place + 1], logprobs_of(r.state, self.info.vocab_size)))
            r.computed = end
            if scored:
                prompt_logprobs.append(self._entry(row, scored[0][0], [(t, lp) for _, t, lp in scored],
                                                   r.sampling.prompt_logprobs))
        if spoil:
            return self._pass_over(plan)
        return self._sample(plan, prompt_logprobs)

    def _pass_over(self, plan: StepPlan) -> StepResult:
        """As a worker does: a failed step counts as computed and sampled, so that the next one fits; it is worth nothing."""
        for row in plan.sample_rows.tolist():
            r = self.rows[row]
            r.state = self._read(r, r.computed)  # a sibling shares the blocks that were spoilt
            if not r.sampling.beam:
                r.tokens.append(0)
        return StepResult(epoch=plan.epoch, step=plan.step)

    def _read(self, r: Row, end: int) -> int:
        """The state that the KV of a row's first ``end`` tokens stands for."""
        places, size = np.arange(end), self.info.block_size
        table = np.array(r.blocks, np.int64)
        with np.errstate(over="ignore"):
            read = self.kv[table[places // size], places % size] * (2 * places + 1).astype(np.uint64)
            return (ROOT + int(read.sum(dtype=np.uint64))) & MASK

    def _check_writes(self, plan: StepPlan) -> None:
        """No row writes into a block that another one holds, except a prompt for the siblings that start with it."""
        holders = defaultdict(set)
        for row, r in self.rows.items():
            for block in r.blocks:
                holders[block].add(row)
        rows = plan.rows.tolist()
        source = {r: rows[f] for r, f in zip(plan.sample_rows.tolist(), plan.sample_from.tolist(), strict=True)}
        fresh = {new.row for new in plan.new}
        size = self.info.block_size
        for row, start, count in zip(rows, plan.starts.tolist(), plan.counts.tolist(), strict=True):
            for index in range(start // size, (start + count - 1) // size + 1):
                block = self.rows[row].blocks[index]
                for other in holders[block] - {row}:
                    sibling = other in fresh and source.get(other) == row and self.rows[other].computed >= start + count
                    assert sibling, f"row {row} writes block {block}, which row {other} holds"

    def _sample(self, plan: StepPlan, prompt_logprobs: list[RowLogprobs]) -> StepResult:
        tokens, bad, logprobs = [], [], []
        rows = plan.rows.tolist()
        states = [self.rows[row].state for row in rows]
        ends = (plan.starts + plan.counts).tolist()
        for i, (row, source, position, generation) in enumerate(zip(
                plan.sample_rows.tolist(), plan.sample_from.tolist(), plan.sample_pos.tolist(),
                plan.sample_generations.tolist(), strict=True)):
            r = self.rows[row]
            assert r.generation == generation and position == len(r.tokens) == ends[source] == r.computed
            state, s = states[source], r.sampling
            if state != r.state and self.faults[-1:] == [plan.step - 1]:
                # Planned before the failure of the last step was known: a leader goes on with a chunk on top of what was
                # spoilt, and siblings fork from it. The result is thrown away; they must read the very blocks it has read.
                r.state = self._read(r, r.computed)
            assert state == r.state, f"row {row} samples from logits that are not its own"
            if self.bad(r.tokens):
                bad.append(i)
                tokens.append(-1)
                if not s.beam:
                    r.tokens.append(0)
                continue
            values = logprobs_of(state, self.info.vocab_size) if self.model is None else self.model(r.tokens)
            if s.beam:
                tokens.append(-1)
                logprobs.append(self._entry(row, position, [(-1, values)], s.logprobs))
                continue
            token = choose(state, s, position, r.num_prompt, r.tokens[r.num_prompt :], self.info.vocab_size, r.processors)
            if s.logprobs >= 0:
                logprobs.append(self._entry(row, position, [(token, values)], s.logprobs))
            tokens.append(token)
            r.tokens.append(token)
        live = sorted(self.rows)
        return StepResult(
            epoch=plan.epoch, step=plan.step, tokens=np.array(tokens, np.int32), bad=np.array(bad, np.int32),
            logprobs=logprobs, prompt_logprobs=prompt_logprobs, seconds=1e-3 * int(plan.counts.sum()),
            swap_seconds=1e-4 * (len(plan.swap_out) + len(plan.swap_in)),
            checksum=checksum(np.array(live, np.int32), np.array([len(self.rows[r].tokens) for r in live], np.int32),
                              [np.array(self.rows[r].blocks, np.int32) for r in live]))

    def _entry(self, row: int, start: int, scored: list[tuple[int, np.ndarray]], k: int) -> RowLogprobs:
        order = [np.argsort(-values, kind="stable")[:k] for _, values in scored]
        own = [values[token] if token >= 0 else np.float32(0) for token, values in scored]
        ranks = [1 + int((values > values[token]).sum()) if token >= 0 else 0 for token, values in scored]
        return RowLogprobs(
            row, start, np.array([t for t, _ in scored], np.int32), np.array(own, np.float32), np.array(ranks, np.int32),
            np.array(order, np.int32).reshape(len(scored), -1),
            np.array([values[o] for (_, values), o in zip(scored, order, strict=True)], np.float32).reshape(len(scored), -1))


class Bench:
    """An engine over a FakeGroup with helpers for tests; ``check`` runs after every step."""

    def __init__(self, *, blocks: int = 256, host_blocks: int = 0, block_size: int = 8, rows: int = 16, budget: int = 256,
                 max_model_len: int = 256, overlap: bool = False, seed: int = 0, check: bool = True,
                 patient: bool = False, clock: Callable[[], float] | None = None, **options: object) -> None:
        info = GroupInfo(
            num_blocks=blocks, num_host_blocks=host_blocks, block_bytes=1024, block_size=block_size,
            max_model_len=max_model_len, max_num_seqs=rows, max_num_batched_tokens=budget, vocab_size=VOCAB, device="cpu")
        config = EngineConfig.from_kwargs(
            **{"model": "fake", "disable_log_stats": True, "debug_checksums": True, "async_scheduling": overlap,
               **options})
        self.group = FakeGroup(info, asynchronous=overlap)
        self.engine = Engine(config, self.group, seed=seed, patient=patient, **({} if clock is None else {"clock": clock}))
        self.checks = check
        self.faults = False
        self.requests: dict[str, EngineRequest] = {}
        self.streamed: dict[tuple[str, int], list[int]] = defaultdict(list)
        self.streamed_logprobs: dict[tuple[str, int], list] = defaultdict(list)
        self.prompt_logprobs: dict[str, list] = defaultdict(list)
        self.started: dict[str, int] = {}
        self.ends: dict[tuple[str, int], SequenceEnd] = {}
        self.finished: list[str] = []
        self.outputs: list[StepOutput] = []

    @property
    def state(self):
        return self.engine._state

    def add(self, name: str, prompt: Sequence[int], *, eos: tuple[int, ...] = (1,), stream: bool = False, priority: int = 0,
            salt: str = "", arrival: float = 0.0, **params: object) -> None:
        request = EngineRequest(
            request_id=name, prompt_token_ids=list(prompt), params=SamplingParams(**{"temperature": 0.0, **params}),
            eos_token_ids=eos, stream=stream, priority=priority, cache_salt=salt, arrival=arrival)
        self.engine.add(request)
        self.requests[name] = request

    def step(self) -> StepOutput:
        out = self.engine.step()
        if self.checks:
            self.engine.check()
        self.outputs.append(out)
        tokens = out.token_list()
        assert len(tokens) == len(out.streamed)
        for key, token in zip(out.streamed, tokens, strict=True):
            self.streamed[key].append(token)
        if out.logprobs:
            assert len(out.logprobs) == len(out.streamed)
            for key, mark in zip(out.streamed, out.logprobs, strict=True):
                self.streamed_logprobs[key].append(mark)
        for name, cached in out.started:
            assert name not in self.started
            self.started[name] = cached
        for name, entries in out.prompt_logprobs:
            self.prompt_logprobs[name] += entries
        for end in out.ended:
            key = (end.request_id, end.index)
            assert key not in self.ends, f"{key} ended twice"
            self.ends[key] = end
        for name in out.finished:
            assert name not in self.finished
            self.finished.append(name)
        return out

    def run(self, limit: int = 20_000) -> None:
        """Step until there is no work; the pool must then be whole again."""
        for _ in range(limit):
            if not self.engine.has_work():
                break
            self.step()
        assert not self.engine.has_work(), f"no end after {limit} steps"
        self.idle()

    def idle(self) -> None:
        """Nothing is held when nothing runs."""
        self.engine.check()
        state = self.state
        state.release_host()
        assert state.pool.num_used == 0 and state.host_pool.num_used == 0 and state.num_running == 0
        assert not state.requests and not state.departed and not len(state.queue) and state.reserved_rows == 0
        assert not state.forked and not state.fresh and not state.prefilling and not state.forced

    def tokens(self, name: str, index: int = 0) -> list[int]:
        """What a continuation generated, streamed or not."""
        return self.streamed[name, index] or self.ends[name, index].token_ids

    def expected(self, name: str, index: int = 0) -> list[int]:
        """What the reference generates for it (the seed must be given in the request unless it is greedy)."""
        request = self.requests[name]
        most = request.params.max_tokens
        limit = min(self.group.info.max_model_len, self.group.info.num_blocks * self.group.info.block_size)
        total = limit if most is None else len(request.prompt_token_ids) + most
        return reference(request, index, request.params.seed or 0, total)[0]

    def assert_reference(self) -> None:
        """Every request that ended by itself equals the reference; errors are only those that were injected.

        Prompt logprobs came once, in order and, where a continuation came to its end, all of them.
        """
        assert self.engine.stats.finished["error"] == 0 or self.faults
        for (name, index), end in self.ends.items():
            if end.reason in ("stop", "length") and not self.requests[name].params.use_beam_search:
                assert self.tokens(name, index) == self.expected(name, index), (name, index)
        for name, request in self.requests.items():
            if request.params.prompt_logprobs is None:
                assert name not in self.prompt_logprobs
                continue
            prompt, marks = request.prompt_token_ids, self.prompt_logprobs.get(name, [])
            if any(key[0] == name and end.reason in ("stop", "length") for key, end in self.ends.items()):
                assert len(marks) == len(prompt) - 1, (name, len(marks))
            state = ROOT
            for place, mark in enumerate(marks):
                state = after(state, kv_of(state, prompt[place], place), place)
                token = prompt[place + 1]
                assert mark.token_ids[0] == token, (name, place)
                assert mark.logprobs[0] == float(logprobs_of(state, VOCAB)[token]), (name, place)
