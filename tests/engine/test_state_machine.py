"""Any sequence of add, step, abort and failures keeps the engine's promises (hypothesis).

I1 free + cached + used == total; I2 references equal block tables; I3 nobody writes what another holds; I4 a cached block's
name is the hash of its prefix and its KV is what that prefix makes; I5 every accepted continuation ends exactly once; I6 a
step moves on when there is work; I7 nothing is held when nothing is left; I8 the budget holds and positions have no gaps;
I9 tokens equal the plain loop's, and prompt logprobs come once and whole. I1 to I3 are ``Engine.check`` and the FakeGroup,
which looks at every plan.

A run is a function of hypothesis's choices alone: time is counted, not measured.
"""

import itertools

import hypothesis.strategies as st
import msgspec
import pytest
from fakes import ROOT, Bench, Violation, after, kv_of
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from octavo.engine.admission import pool_tokens
from octavo.engine.cache import root_digest
from octavo.errors import EngineDead, RequestError

STEPS_WITHOUT_PROGRESS = 4


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        blocks=st.sampled_from([10, 12, 16, 40]), host_blocks=st.sampled_from([0, 3, 20]), rows=st.sampled_from([1, 3, 6]),
        budget=st.sampled_from([6, 9, 32, 200]), overlap=st.booleans(), chunked=st.booleans(),
        threshold=st.sampled_from([0, 1, 7, 16]), caching=st.booleans(),
        mode=st.sampled_from(["auto", "recompute", "swap"]), policy=st.sampled_from(["fcfs", "priority", "sjf"]))
    def start(self, blocks, host_blocks, rows, budget, overlap, chunked, threshold, caching, mode, policy):
        self.bench = Bench(
            blocks=blocks, host_blocks=host_blocks, block_size=8, rows=rows, budget=budget, max_model_len=72,
            overlap=overlap, enable_chunked_prefill=chunked, long_prefill_token_threshold=threshold if chunked else 0,
            enable_prefix_caching=caching, preemption_mode=mode, scheduling_policy=policy,
            clock=(i / 64 for i in itertools.count(1)).__next__)  # under sjf the time of arrival is part of the order
        self.bench.faults = True
        self.policy = policy
        self.names = 0
        self.fail_at: dict[int, str] = {}
        self.bad_at: set[int] = set()
        self.bench.group.fail = lambda step: self.fail_at.get(step)
        self.bench.group.bad = self._bad
        self.accepted: dict[str, int] = {}
        self.silent = 0
        self.errors_allowed = False
        self.dead = False

    def _bad(self, tokens):
        hit = self.bad_at and (sum(tokens) * 31 + len(tokens)) % 512 in self.bad_at
        self.errors_allowed |= bool(hit)
        return hit

    alive = precondition(lambda self: not self.dead)

    @alive
    @rule(length=st.integers(1, 40), family=st.integers(0, 2), tail=st.integers(0, 3), n=st.sampled_from([1, 1, 1, 2, 4]),
          best_of=st.booleans(), max_tokens=st.sampled_from([1, 2, 9, 20, None]), salt=st.sampled_from(["", "", "x"]),
          stream=st.booleans(), seed=st.integers(0, 3), temperature=st.sampled_from([0.0, 1.0]), ignore_eos=st.booleans(),
          stops=st.integers(0, 6), min_tokens=st.sampled_from([0, 0, 1, 5]), logprobs=st.sampled_from([None, None, 0, 3]),
          prompt_logprobs=st.sampled_from([None, None, None, 1]), beam=st.sampled_from([False] * 5 + [True]),
          priority=st.integers(-1, 1), processor=st.sampled_from([False] * 4 + [True]))
    def add(self, length, family, tail, n, best_of, max_tokens, salt, stream, seed, temperature, ignore_eos, stops, min_tokens,
            logprobs, prompt_logprobs, beam, priority, processor):
        name = f"r{self.names}"
        prompt = [(family * 5 + i) % 40 + 6 for i in range(length - 1)] + [tail + 2]
        params = dict(n=n, max_tokens=max_tokens, ignore_eos=ignore_eos, prompt_logprobs=prompt_logprobs)
        if beam:
            params |= dict(n=max(n, 2), use_beam_search=True, temperature=0.0)
        else:
            params |= dict(temperature=temperature, seed=seed, logprobs=logprobs,
                           stop_token_ids=tuple(range(30, 30 + stops)), min_tokens=min(min_tokens, max_tokens or 5))
            if best_of and temperature:
                params["best_of"] = n + 1
            if processor:
                params["logits_processors"] = (lambda output, scores: scores * (1.0 + 0.01 * len(output)),)
        try:
            self.bench.add(name, prompt, salt=salt, stream=stream,
                           priority=priority if self.policy == "priority" else 0, **params)
        except RequestError:
            return
        self.names += 1
        self.accepted[name] = params["n"] if beam else params.get("best_of", n)

    @alive
    @precondition(lambda self: self.names)
    @rule(which=st.integers(0, 100))
    def add_twice(self, which):
        name = f"r{which % self.names}"
        if name in self.bench.state.requests:
            with pytest.raises(RequestError, match="already in use"):
                self.bench.add(name, [5], max_tokens=1)

    @alive
    @rule(count=st.integers(1, 12))
    def step(self, count):
        for _ in range(count):
            if self.dead:
                return
            self._step()

    @alive
    @rule(first=st.integers(0, 39), count=st.integers(2, 6), length=st.integers(1, 24), more=st.sampled_from([12, 30, 40]),
          n=st.sampled_from([1, 1, 3]), temperature=st.sampled_from([0.0, 1.0]), stream=st.booleans())
    def add_load(self, first, count, length, more, n, temperature, stream):
        """Long answers for several at once: more than a small pool holds."""
        for i in range(count):
            name = f"r{self.names}"
            try:
                self.bench.add(name, [(first + i * j) % 40 + 6 for j in range(length)], max_tokens=more - 3 * i, n=n, seed=i,
                               temperature=temperature, ignore_eos=True, stream=stream)
            except RequestError:
                return
            self.names += 1
            self.accepted[name] = n

    @alive
    @rule(where=st.sampled_from(["submit", "result"]), ahead=st.integers(0, 200))
    def plan_failure(self, where, ahead):
        self.fail_at[self.bench.group.step + ahead] = where
        self.errors_allowed = True

    @alive
    @rule(residue=st.integers(0, 511))
    def plan_bad_logits(self, residue):
        self.bad_at = {residue} if len(self.bad_at) == 0 else set()

    @alive
    @rule(which=st.integers(0, 100))
    def abort(self, which):
        name = f"r{which % (self.names + 1)}"  # one of them is unknown
        was_there = name in self.bench.state.requests
        assert self.bench.engine.abort(name) is was_there
        assert not self.bench.engine.abort(name)

    @alive
    @rule(which=st.integers(0, 100), index=st.integers(0, 4))
    def abort_one(self, which, index):
        self.bench.engine.abort(f"r{which % (self.names + 1)}", index)

    @alive
    @rule()
    def drain(self):
        while not self.dead and self.bench.engine.has_work():  # ``_step`` sees to it that this ends
            self._step()
        if not self.dead:
            self.bench.idle()

    @precondition(lambda self: self.dead)
    @rule()
    def stay_dead(self):
        with pytest.raises(EngineDead):
            self.bench.engine.step()

    def _step(self):
        bench = self.bench
        tokens = bench.engine.stats.generated_tokens
        before = (tokens, bench.engine.stats.prompt_tokens, len(bench.ends), bench.group.step)
        work = bench.engine.has_work()
        try:
            bench.step()
        except EngineDead:
            self.dead = True
            last = bench.group.faults[-3:]
            assert len(last) == 3 and last[0] + 2 == last[-1], f"dead without three failures in a row: {last}"
            return
        except BaseException as error:
            self.dead = True  # so that teardown does not go on with it: this error is the one to report
            if isinstance(error, Violation):  # no Exception, so hypothesis would let it pass without the steps that led to it
                raise AssertionError(str(error)) from error
            raise
        stats = bench.engine.stats
        moved = before != (stats.generated_tokens, stats.prompt_tokens, len(bench.ends), bench.group.step)
        self.silent = 0 if moved or not work else self.silent + 1
        assert self.silent < STEPS_WITHOUT_PROGRESS, "work, and nothing moves"

    @invariant()
    def holds(self):
        if not hasattr(self, "bench") or self.dead:
            return
        try:
            self._check_promises()
        except BaseException:
            self.dead = True  # as in ``_step``
            raise

    def _check_promises(self):
        bench = self.bench
        bench.engine.check()
        assert bench.group.most_tokens <= bench.group.info.max_num_batched_tokens
        for (name, index), end in bench.ends.items():
            assert 0 <= index < self.accepted[name]
            if end.reason == "error":
                assert self.errors_allowed, end
        for name in bench.finished:
            ended = sorted(index for other, index in bench.ends if other == name)
            assert ended == list(range(self.accepted[name])), (name, ended)
        self._check_names()

    def _check_names(self):
        """I4: walk every prefix that a request of ours could have made, by the names that are cached."""
        state, kv, host = self.bench.state, self.bench.group.kv, self.bench.group.host
        for row, owner in enumerate(state.sequences):
            if owner is None:
                continue
            value, tokens = ROOT, state.table.tokens[row, : state.table.written[row]].tolist()
            digest = root_digest(owner.request.source.cache_salt)
            chain: list[bytes] = []
            state.cache.extend(chain, digest, state.table.tokens[row, : state.table.written[row]])
            places = []
            for place, token in enumerate(tokens):
                number = kv_of(value, token, place)
                places.append(number)
                value = after(value, number, place)
            for index, name in enumerate(chain):
                block = state.pool.find(name)
                if block is not None:
                    assert kv[block].tolist() == places[index * 8 : index * 8 + 8], f"block {block} holds something else"
                block = state.host_pool.find(name)
                if block is not None:
                    assert host[block].tolist() == places[index * 8 : index * 8 + 8], f"host block {block}: something else"

    def teardown(self):
        if not hasattr(self, "bench") or self.dead:
            return
        self.fail_at.clear()
        self.drain()
        if not self.dead:
            assert sorted(self.bench.finished) == sorted(self.accepted)
            self.bench.assert_reference()
            for (name, index), end in self.bench.ends.items():
                if self.bench.requests[name].params.use_beam_search and end.reason in ("stop", "length"):
                    assert alone(self.bench, name)[index] == (end.token_ids, end.reason, end.cumulative_logprob)


def alone(bench, name):
    """The beams of a request when it has a big engine for itself, by rank."""
    request, quiet = bench.requests[name], Bench(max_model_len=72, check=False)
    limit = pool_tokens(request, bench.group.info) if request.params.max_tokens is None else 10**6
    most = request.params.max_tokens or min(72, limit) - len(request.prompt_token_ids)
    quiet.engine.add(msgspec.structs.replace(request, params=request.params.clone(max_tokens=most), priority=0))
    quiet.run()
    return {end.index: (end.token_ids, end.reason, end.cumulative_logprob) for end in quiet.ends.values()}


# A failure is shrunk for up to 300 seconds. Were the test timed out within them, hypothesis would take the timeout for a second
# failure, which does not come again in the replay, and report a flaky test in place of the first.
TestEngineMachine = pytest.mark.timeout(1200)(EngineMachine.TestCase)
TestEngineMachine.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, print_blob=True, suppress_health_check=[
        HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large, HealthCheck.large_base_example])
