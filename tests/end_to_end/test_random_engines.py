"""Engines with random options, random requests and random trouble, on a CPU and on a pretended GPU.

Whatever the options and whatever happens to others (aborts between a step and its result, steps that fail, host memory that is
never ready), a request that comes to its end has the tokens that it has when nothing of the kind happens; nothing is said
twice or lost, and nothing is held in the end. A seed is one run.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pretend import PretendGpu, PretendHostPool, use_references

from octavo import EngineArgs, LLMEngine, RequestOutput, SamplingParams, ops
from octavo.errors import ConfigError, EngineDead, RequestError
from octavo.messages import Grammar
from octavo.worker.cuda_runner import CudaRunner
from octavo.worker.group import GpuGroup

SEEDS = (*range(22), 152, 272)
OPERATORS = ("paged_attention", "sample", "token_logprobs", "penalties", "copy_blocks", "swap_blocks")
GPU_OPERATORS = (*OPERATORS, "begin_step", "end_step", "count_tokens")
STEPS_WITHOUT_PROGRESS = 6


class Toy:
    """A matcher whose tokens are a function of the output, and which comes to an end."""

    def __init__(self, key: str) -> None:
        self.key, self.error = key, ""

    def copy(self) -> "Toy":
        return Toy(self.key)

    def __call__(self, output: Any, words: Any) -> bool:
        rng, bits = random.Random(f"{self.key} {output.tolist()}"), np.zeros(len(words) * 32, bool)
        bits[[2] if len(output) > 9 else [rng.randrange(3, 211) for _ in range(40)]] = True
        words[:] = np.packbits(bits, bitorder="little").view(np.int32)
        return True


class ToyGrammars:
    """Compiles with a chance of ``share`` before each step."""

    def __init__(self, rng: random.Random, share: float) -> None:
        self._waiting: dict[str, Any] = {}
        self._rng, self._share = rng, share

    def __contains__(self, name: str) -> bool:
        return name in self._waiting

    def __len__(self) -> int:
        return len(self._waiting)

    def start(self, request: Any) -> None:
        self._waiting[request.id] = request

    def ready(self) -> list[Any]:
        done = [request for request in self._waiting.values() if self._rng.random() < self._share]
        for request in done:
            del self._waiting[request.id]
            request.matcher = Toy(request.source.grammar.text)
        return done

    def take(self, name: str) -> Any:
        return self._waiting.pop(name, None)

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass


def processor(output: list[int], logits: Any) -> Any:
    logits[3 + 7 * len(output) % 200] += 5.0
    return logits


def requests(rng: random.Random, longest: int, policy: str) -> list[dict[str, Any]]:
    """Prompts that often begin alike, with everything that a row can ask for."""
    shared = [[rng.randrange(3, 211) for _ in range(longest)] for _ in range(2)]
    found = []
    for _ in range(rng.randint(6, 24)):
        prompt = rng.choice(shared)[: rng.randint(0, longest - 3)] if rng.random() < 0.6 else []
        prompt = prompt + [rng.randrange(3, 211) for _ in range(rng.randint(1, longest - 2 - len(prompt)))]
        most = rng.randint(1, min(30, longest - len(prompt)))
        asked: dict[str, Any] = {"max_tokens": most, "ignore_eos": rng.random() < 0.5}
        if rng.random() < 0.08:
            width = rng.randint(2, 4)
            asked |= {"use_beam_search": True, "best_of": width, "n": rng.randint(1, width), "temperature": 0.0}
        else:
            extras: list[dict[str, Any]] = [
                {"top_p": 0.8}, {"top_k": rng.randint(1, 20)}, {"min_p": 0.05}, {"logprobs": rng.choice([0, 3])},
                {"repetition_penalty": rng.choice([0.8, 1.3])}, {"frequency_penalty": 0.6, "presence_penalty": 0.3},
                {"logit_bias": {5: 4.0, 7: -3.0}}, {"allowed_token_ids": list(range(2, 60))}, {"n": rng.randint(2, 4)},
                {"min_tokens": min(most, 4), "stop_token_ids": rng.sample(range(3, 211), 7)}, {"logits_processors": [processor]}]
            asked |= {"temperature": rng.choice([0.0, 0.7, 1.0, 1.3]), "seed": rng.randrange(1000)}
            for extra in extras:
                asked |= extra if rng.random() < 0.15 else {}
        if rng.random() < 0.15:
            asked["prompt_logprobs"] = rng.choice([0, 2])
        grammar = "use_beam_search" not in asked and rng.random() < 0.1
        found.append({
            "prompt": prompt, "params": SamplingParams(**asked), "salt": rng.choice(["", "", "x"]), "stream": rng.random() < 0.5,
            "grammar": f"g{rng.randrange(5)}" if grammar else None,
            "priority": rng.randint(-1, 1) if policy == "priority" else 0})
    return found


def options(rng: random.Random) -> tuple[int, dict[str, Any]]:
    """The longest request, and options for an engine that can just hold it, or many of them."""
    size, longest, rows = rng.choice([8, 8, 16]), rng.choice([24, 40, 80, 120]), rng.choice([1, 2, 4, 8, 24])
    need = -(-longest // size)
    found: dict[str, Any] = {
        "block_size": size, "max_num_seqs": rows, "num_gpu_blocks_override": rng.choice([need, need + 1, 2 * need, 12 * need]),
        "max_model_len": longest, "preemption_mode": rng.choice(["auto", "recompute", "swap"]),
        "enable_prefix_caching": rng.random() < 0.8, "async_scheduling": rng.choice([None, True, False]),
        "scheduling_policy": rng.choice(["fcfs", "fcfs", "priority", "sjf"]), "swap_space": rng.choice([0.0, 0.0001, 0.01]),
        "debug_checksums": rng.random() < 0.7, "enforce_eager": rng.random() < 0.3}
    if rng.random() < 0.25:
        return longest, found | {"enable_chunked_prefill": False, "max_num_batched_tokens": max(longest, rows)}
    budget = max(rows, rng.choice([1, 7, 16, 40, 200, 600]))
    return longest, found | {"max_num_batched_tokens": budget, "long_prefill_token_threshold": rng.choice([0, 0, 1, 5, 16])}


def make(tiny: Path, rng: random.Random, share: float, **more: Any) -> LLMEngine:
    engine = LLMEngine.from_engine_args(EngineArgs(
        model=str(tiny), skip_tokenizer_init=True, dtype="float32", seed=7, disable_log_stats=True, **more))
    engine.engine._grammars = ToyGrammars(rng, share)  # type: ignore[assignment]
    return engine


def add(engine: LLMEngine, name: str, asked: dict[str, Any]) -> None:
    """Queue a request with its toy grammar."""
    ready = engine.intake.prepare(name, asked["prompt"], asked["params"], stream=asked["stream"], priority=asked["priority"],
                                  cache_salt=asked["salt"])
    ready.request.grammar = asked["grammar"] and Grammar("toy", asked["grammar"])
    engine.engine.add(ready.request)
    engine.collector.add(name, None, asked["prompt"], asked["params"], None, "snapshots" if asked["stream"] else "final")


@pytest.fixture(scope="module")
def calm(tiny: Path) -> Iterator[LLMEngine]:
    """An engine with room for all, in which nothing happens."""
    engine = make(tiny, random.Random(0), 1.0, max_model_len=128, max_num_seqs=32)
    yield engine
    engine.close()


def answers(engine: LLMEngine, asked: list[dict[str, Any]]) -> dict[str, RequestOutput]:
    for i, one in enumerate(asked):
        add(engine, str(i), one | {"priority": 0})
    done: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output for output in engine.step() if output.finished}
    return done


def pretend(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """A GPU whose host memory is ready at once, ready once somebody has waited for it, or cannot be pinned."""

    class Host(PretendHostPool):
        ready = host == "ready"

        def wait(self) -> Any:
            if host == "refused":
                raise ConfigError("planted", "swap_space")
            self.ready = True
            return self.tensor

    class OtherGpu(PretendGpu):
        def host_pool(self, shape: Any, dtype: Any) -> Host:
            return Host(shape, dtype)

    use_references(monkeypatch)
    monkeypatch.setattr("octavo.llm.check_supported", lambda config: None)
    monkeypatch.setattr("octavo.llm.make_group", lambda config, source: GpuGroup(
        config, source, runner=CudaRunner(config, source, gpu=OtherGpu())))


class Faults:
    """Operators that fail now and then, once ``share`` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...], seed: int) -> None:
        self.rng, self.share, self.hits = random.Random(seed), 0.0, 0
        for name in names:
            monkeypatch.setattr(ops, name, self._failing(getattr(ops, name)))

    def _failing(self, operator: Any) -> Any:
        def call(*args: Any) -> Any:
            if self.rng.random() < self.share:
                self.hits += 1
                raise MemoryError("planted")
            return operator(*args)

        return call


def same(got: RequestOutput, want: RequestOutput, cut: set[int]) -> bool:
    """The same tokens, and logprobs as near as two orders of summation leave them; continuations in ``cut`` do not count."""
    def values(position: Any) -> list[float]:
        return sorted(entry.logprob for entry in (position or {}).values())

    def near(one: Any, other: Any) -> bool:
        return all(values(a) == pytest.approx(values(b), abs=0.02) for a, b in zip(one or [], other or [], strict=True))

    pairs = [(a, b) for a, b in zip(got.outputs, want.outputs, strict=True) if a.index not in cut]
    return near(got.prompt_logprobs, want.prompt_logprobs) and all(
        (a.token_ids, a.finish_reason, a.stop_reason) == (b.token_ids, b.finish_reason, b.stop_reason)
        and near(a.logprobs, b.logprobs) for a, b in pairs)


@pytest.mark.parametrize("seed", SEEDS)
def test_any_engine(tiny: Path, calm: LLMEngine, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)
    longest, chosen = options(rng)
    asked = requests(rng, longest, chosen["scheduling_policy"])
    wanted = answers(calm, asked)
    gpu, host = rng.random() < 0.7, rng.choice(["ready", "late", "refused"])
    if gpu:
        pretend(monkeypatch, host)
    faults = Faults(monkeypatch, GPU_OPERATORS if gpu else OPERATORS, seed)
    engine = make(tiny, rng, 0.3, **chosen)
    faults.share = rng.choice([0.0, 0.0, 0.002, 0.01])
    try:
        run(engine, asked, wanted, rng, faults)
    except EngineDead:
        assert faults.hits >= 3
    engine.close()


def run(engine: LLMEngine, asked: list[dict[str, Any]], wanted: dict[str, RequestOutput], rng: random.Random,
        faults: Faults) -> None:
    inner, stats = engine.engine, engine.engine.stats
    done: dict[str, RequestOutput] = {}
    gone: set[str] = set()  # refused or aborted
    cut: dict[str, set[int]] = {}
    sent = idle = 0
    at_once = rng.randint(1, len(asked))
    while sent < len(asked) or engine.has_unfinished_requests():
        while sent < len(asked) and engine.get_num_unfinished_requests() < at_once:
            try:
                add(engine, str(sent), asked[sent])
            except RequestError:  # beams for which there is no room
                gone.add(str(sent))
            sent += 1
        before = (stats.generated_tokens, stats.prompt_tokens, stats.steps, stats.failed_steps, len(done))
        for output in engine.step():
            if output.finished:
                assert output.request_id not in done and output.request_id not in gone
                done[output.request_id] = output
        inner.check()
        moved = before != (stats.generated_tokens, stats.prompt_tokens, stats.steps, stats.failed_steps, len(done))
        idle = 0 if moved or len(inner._grammars) else idle + 1
        assert idle < STEPS_WITHOUT_PROGRESS, "work, and nothing moves"
        victim = str(rng.randrange(sent))
        if rng.random() < 0.07 and victim not in done and victim not in gone:
            abort(engine, victim, asked[int(victim)], rng, gone, cut)
    for _ in range(2):  # with overlap, the last step's result is still to be collected; then nothing is held back for a plan
        engine.engine.step()
    inner.check()
    state = inner._state
    assert inner.stats.kv_used == inner.stats.host_used == 0 and not state.requests and not state.departed
    assert set(done) | gone == {str(i) for i in range(len(asked))}
    assert faults.hits or not stats.failed_steps
    for name, output in done.items():
        params, mine = asked[int(name)]["params"], cut.get(name, set())
        if any(c.finish_reason == "error" for c in output.outputs):
            assert faults.hits
        elif len(mine) < params.n and not (mine and params.use_beam_search):
            assert same(output, wanted[name], mine), (name, params, output, wanted[name])


def abort(engine: LLMEngine, name: str, asked: dict[str, Any], rng: random.Random, gone: set[str],
          cut: dict[str, set[int]]) -> None:
    """Abort a request, perhaps to send it again under the same name, or one continuation of it."""
    if rng.random() < 0.5:
        index = rng.randrange(asked["params"].n)
        if engine.engine.abort(name, index):
            cut.setdefault(name, set()).add(index)
        return
    engine.abort_request(name)
    cut.pop(name, None)
    if rng.random() < 0.5:
        add(engine, name, asked)
    else:
        gone.add(name)
