"""The GPU's path without a GPU: the whole engine on a pretended device gives the answers of the CPU.

The device is CPU tensors with the reference functions behind the operators (pretend.py), so everything but the kernels runs:
staging, device rows, padded graphs, tokens that arrive a step late, the sampling of rows that ask for more than a token.
"""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend import (
    PretendEvent,
    PretendGpu,
    PretendGraphs,
    PretendHostPool,
    PretendStream,
    count_calls,
    fail_at,
    use_references,
)

from octavo import LLM, LLMEngine, RequestOutput, SamplingParams
from octavo.errors import ConfigError, EngineDead
from octavo.worker.cuda_runner import CudaRunner
from octavo.worker.group import GpuGroup, LocalGroup

OPTIONS: dict[str, Any] = {"dtype": "float32", "seed": 7, "max_model_len": 256, "max_num_seqs": 24, "swap_space": 0.01}


def requests(seed: int, count: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 90 tokens with everything that a row can ask for."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, 211) for _ in range(60)]
    found = []
    for i in range(count):
        prompt = [rng.randrange(3, 211) for _ in range(rng.randint(1, 40))]
        if i % 2:
            prompt = shared[: rng.randint(1, 60)] + prompt
        extras: dict[str, Any] = [
            {"temperature": 0.0},
            {"temperature": 1.0, "logprobs": 3},
            {"temperature": 0.7, "top_p": 0.8, "prompt_logprobs": 2},
            {"temperature": 1.3, "top_k": 12, "logit_bias": {5: 4.0, 7: -3.0}},
            {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2, "logprobs": 0},
            {"temperature": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.3},
            {"temperature": 1.0, "n": 3},
            {"temperature": 0.0, "min_tokens": 6, "stop_token_ids": [9, 10, 11]},
            {"temperature": 0.8, "allowed_token_ids": list(range(20, 60))},
        ][i % 9]
        params = SamplingParams(max_tokens=rng.randint(6, 30), seed=1000 + i, ignore_eos=i % 3 == 0, **extras)
        found.append((prompt, params))
    return found


def answers(llm: LLM, asked: list[tuple[list[int], SamplingParams]]) -> list[Any]:
    """Tokens, ends, and logprobs rounded to what two orders of summation leave equal."""
    outputs = llm.generate([{"prompt_token_ids": p} for p, _ in asked], [s for _, s in asked], use_tqdm=False)
    found = []
    for output in outputs:
        prompt = [{i: round(p.logprob, 2) for i, p in step.items()} for step in output.prompt_logprobs or [] if step]
        for c in output.outputs:
            steps = [{i: (round(p.logprob, 2), p.rank) for i, p in step.items()} for step in c.logprobs or []]
            found.append((c.token_ids, c.finish_reason, c.stop_reason, steps, prompt))
    llm.llm_engine.engine.check()
    return found


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """on_gpu(model, **options): an LLM on a pretended GPU."""
    monkeypatch.setattr("octavo.llm.check_supported", lambda config: None)

    def make(model: Path, **options: Any) -> LLM:
        use_references(monkeypatch)
        monkeypatch.setattr(
            "octavo.llm.make_group",
            lambda config, source: GpuGroup(config, source, runner=CudaRunner(config, source, gpu=PretendGpu())),
        )
        return LLM(str(model), skip_tokenizer_init=True, **{**OPTIONS, "debug_checksums": True, **options})

    return make


@pytest.fixture(scope="module")
def asked() -> list[tuple[list[int], SamplingParams]]:
    return requests(3, 36)


@pytest.fixture(scope="module")
def expected(tiny: Path, asked: Any) -> list[Any]:
    llm = LLM(str(tiny), skip_tokenizer_init=True, **OPTIONS)
    assert isinstance(llm.llm_engine.group, LocalGroup)
    found = answers(llm, asked)
    llm.close()
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True},
        {"async_scheduling": False},
        {"max_num_batched_tokens": 40},
        {"num_gpu_blocks_override": 24, "preemption_mode": "recompute"},
        {"num_gpu_blocks_override": 24, "preemption_mode": "swap"},
        {"enable_prefix_caching": False, "block_size": 8},
    ],
    ids=lambda options: ",".join(options) or "default",
)
def test_the_answers_of_the_cpu(tiny: Path, on_gpu: Any, asked: Any, expected: list[Any], options: dict[str, Any]) -> None:
    llm = on_gpu(tiny, **options)
    assert answers(llm, asked) == expected
    runner = llm.llm_engine.group.runner
    assert (runner.graph_steps == 0) == bool(options.get("enforce_eager"))
    llm.close()


@pytest.mark.parametrize("ahead", [True, False])
def test_a_decode_step_is_two_graphs_and_one_wait(
    tiny: Path, on_gpu: Any, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    """200 steps of eight rows, sampled and greedy, that get new blocks: nothing is waited for, made or allocated beside that."""
    engine = on_gpu(tiny, async_scheduling=ahead, debug_checksums=False, max_num_seqs=8, disable_log_stats=True).llm_engine
    for i in range(8):
        params = SamplingParams(temperature=float(i % 2), seed=i, max_tokens=230, ignore_eos=True)
        engine.add_request(str(i), None, params, prompt_token_ids=[*range(3, 10 + i)], stream=False)
    for _ in range(4):  # the prompts, and what was submitted ahead
        engine.step()
    calls = count_calls(monkeypatch, PretendEvent, PretendStream, PretendGraphs, PretendGpu)
    runner = engine.group.runner
    steps, graph_steps = runner.steps, runner.graph_steps
    for _ in range(200):
        engine.step()
    assert (runner.steps - steps, runner.graph_steps - graph_steps) == (200, 200)
    for name in ("PretendGpu.use", "PretendEvent.query"):  # these neither wait nor make anything
        calls.pop(name, None)
    assert calls == {"PretendEvent.synchronize": 200, "PretendEvent.record": 200, "PretendGraphs.replay": 400}
    engine.close()


def test_edits_that_read_the_output_see_every_token(tiny: Path, on_gpu: Any) -> None:
    seen: list[list[int]] = []

    def processor(output: list[int], logits: Any) -> Any:
        seen.append(list(output))
        logits[3] -= 1.0
        return logits

    llm = on_gpu(tiny)
    params = [
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logits_processors=[processor]),
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
    ]
    out = llm.generate([{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": [9, 8]}], params, use_tqdm=False)
    tokens = out[0].outputs[0].token_ids
    assert seen == [tokens[:i] for i in range(12)]
    llm.close()


def test_beams(tiny: Path, on_gpu: Any) -> None:
    params = SamplingParams(use_beam_search=True, best_of=3, n=2, temperature=0.0, max_tokens=10)
    asked = [([4, 5, 6, 7], params), ([9] * 20, SamplingParams(temperature=0.0, max_tokens=10))]
    cpu = LLM(str(tiny), skip_tokenizer_init=True, **OPTIONS)
    expected = answers(cpu, asked)
    cpu.close()
    llm = on_gpu(tiny)
    assert answers(llm, asked) == expected
    llm.close()


def test_continuations_with_penalties(tiny: Path, on_gpu: Any) -> None:
    """Siblings start from the same logits, each with counters of its own; most of them wait for a row."""
    extras: list[dict[str, Any]] = [
        {"n": 4, "temperature": 1.0, "repetition_penalty": 1.4},
        {"n": 3, "temperature": 0.9, "frequency_penalty": 0.7, "presence_penalty": -0.4, "logprobs": 2},
        {"n": 5, "temperature": 1.2, "repetition_penalty": 0.8, "min_tokens": 5, "stop_token_ids": [9, 10, 11, 12]},
        {"temperature": 0.0, "frequency_penalty": 1.5},
    ]
    rng = random.Random(5)
    asked = [
        ([rng.randrange(3, 211) for _ in range(5 + 11 * i)], SamplingParams(max_tokens=20, seed=i, **extras[i % 4]))
        for i in range(8)
    ]
    cpu = LLM(str(tiny), skip_tokenizer_init=True, **OPTIONS)
    expected = answers(cpu, asked)
    cpu.close()
    for options in ({"max_num_seqs": 3}, {"num_gpu_blocks_override": 20}):
        llm = on_gpu(tiny, **options)
        assert answers(llm, asked) == expected, options
        llm.close()


# What goes wrong on the way


def run(engine: LLMEngine, count: int) -> dict[str, RequestOutput]:
    """Greedy requests that begin alike; each by its name when all have ended."""
    for i in range(count):
        engine.add_request(str(i), None, SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True),
                           prompt_token_ids=[*range(20, 38), 3 + i, 4], stream=False)
    done: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        done |= {o.request_id: o for o in engine.step() if o.finished}
    engine.engine.check()
    return done


def tokens(done: dict[str, RequestOutput]) -> dict[str, list[int]]:
    return {name: o.outputs[0].token_ids for name, o in done.items()}


SMALL: dict[str, Any] = {"max_num_seqs": 8, "max_num_batched_tokens": 24, "disable_log_stats": True}


@pytest.mark.parametrize(
    ("operator", "call", "eager", "ahead"),
    [("begin_step", 2, False, True), ("begin_step", 2, True, False), ("paged_attention", 8, False, True),
     ("paged_attention", 8, False, False), ("sample", 4, True, True), ("end_step", 2, False, True)],
)  # fmt: skip
def test_a_failed_step_costs_its_own_requests(
    tiny: Path, on_gpu: Any, monkeypatch: pytest.MonkeyPatch, operator: str, call: int, eager: bool, ahead: bool
) -> None:
    engine = on_gpu(tiny, async_scheduling=ahead, enforce_eager=eager, **SMALL).llm_engine
    wanted = tokens(run(engine, 12))
    fail_at(monkeypatch, operator, call)
    done = run(engine, 12)
    failed = {name for name, o in done.items() if o.outputs[0].finish_reason == "error"}
    assert 0 < len(failed) < 12 and engine.engine.stats.failed_steps == 1
    assert all("MemoryError" in (done[name].error or "") for name in failed)
    assert {n: t for n, t in tokens(done).items() if n not in failed} == {n: t for n, t in wanted.items() if n not in failed}
    assert tokens(run(engine, 12)) == wanted  # nothing spoilt was cached
    engine.close()


@pytest.mark.parametrize("ahead", [True, False])
def test_two_failures_in_a_row_are_survived_and_three_are_not(
    tiny: Path, on_gpu: Any, monkeypatch: pytest.MonkeyPatch, ahead: bool
) -> None:
    engine = on_gpu(tiny, async_scheduling=ahead, **SMALL).llm_engine
    wanted = tokens(run(engine, 12))
    fail_at(monkeypatch, "end_step", 2, 3)
    assert len(run(engine, 12)) == 12 and engine.engine.stats.failed_steps == 2
    assert tokens(run(engine, 12)) == wanted
    fail_at(monkeypatch, "end_step", 2, 3, 4)
    with pytest.raises(EngineDead, match="MemoryError"):
        run(engine, 40)  # each failure costs up to as many as there are rows
    with pytest.raises(EngineDead):
        engine.step()
    engine.close()


def test_a_failure_of_a_step_that_asks_for_more(tiny: Path, on_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counters of penalties and logprobs on their way are dropped with the step; the rows' next owners begin afresh."""
    engine = on_gpu(tiny, **SMALL).llm_engine

    def ask() -> list[Any]:
        for i in range(5):
            params = SamplingParams(
                temperature=1.0, seed=i, n=1 + i % 2, repetition_penalty=1.3, logprobs=2, prompt_logprobs=1, max_tokens=12)
            engine.add_request(str(i), None, params, prompt_token_ids=[30 + i, *range(9)], stream=False)
        done = {}
        while engine.has_unfinished_requests():
            done |= {o.request_id: [(c.token_ids, c.finish_reason) for c in o.outputs] for o in engine.step() if o.finished}
        engine.engine.check()
        return sorted(done.items())

    wanted = ask()
    for operator in ("penalties", "token_logprobs", "count_tokens"):
        fail_at(monkeypatch, operator, 6)
        found = ask()
        assert any(end == "error" for _, ends in found for _, end in ends), operator
        assert ask() == wanted, operator
    engine.close()


@pytest.mark.parametrize("options", [{}, {"num_gpu_blocks_override": 16}], ids=["roomy", "tight"])
def test_aborts_in_flight(tiny: Path, on_gpu: Any, options: dict[str, Any]) -> None:
    """Rows of requests that are gone are given away while the step that computes them is under way."""
    engine = on_gpu(tiny, **SMALL, **options).llm_engine
    wanted = tokens(run(engine, 12))

    def again(name: str) -> None:
        engine.add_request(name, None, SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True),
                           prompt_token_ids=[*range(20, 38), 3 + int(name), 4], stream=False)

    rng, done = random.Random(3), dict[str, RequestOutput]()
    for name in wanted:
        again(name)
    engine.add_request("many", None, SamplingParams(temperature=1.0, seed=1, n=6, presence_penalty=0.5, max_tokens=40,
                                                    ignore_eos=True), prompt_token_ids=[50] * 20, stream=False)
    aborted = ended = 0
    while engine.has_unfinished_requests():
        done |= {o.request_id: o for o in engine.step() if o.finished}
        victim = str(rng.randrange(12))
        if victim not in done and aborted < 25:
            engine.abort_request(victim)  # its step is under way
            again(victim)  # the same name and prompt, perhaps in another row
            aborted += 1
        if aborted % 5 == 4 and ended < 4:
            ended += engine.engine.abort("many", ended)  # one continuation of several
    engine.engine.check()
    many = [c.finish_reason for c in done.pop("many").outputs]
    assert tokens(done) == wanted and aborted > 15
    assert many == ["abort"] * ended + ["length"] * (6 - ended) and ended > 1
    engine.step()  # the last result is still to be collected
    assert engine.engine.stats.kv_used == 0
    assert tokens(run(engine, 12)) == wanted
    engine.close()


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_a_long_run_with_aborts_and_preemption(tiny: Path, on_gpu: Any, mode: str) -> None:
    """Nothing leaks, and who is left alone gets the answer of the CPU (but for two at most, where two tokens are as likely)."""
    rng = random.Random(17)
    asked = requests(17, 100)
    for i in range(0, 100, 20):
        asked[i] = asked[i][0], SamplingParams(use_beam_search=True, best_of=3, n=2, temperature=0.0, max_tokens=8)
    engine = on_gpu(tiny, num_gpu_blocks_override=26, max_num_batched_tokens=96, preemption_mode=mode,
                    disable_log_stats=True).llm_engine
    done: dict[str, RequestOutput] = {}
    aborted: set[str] = set()
    sent = 0
    while sent < len(asked) or engine.has_unfinished_requests():
        while sent < len(asked) and engine.get_num_unfinished_requests() < 40:
            prompt, params = asked[sent]
            engine.add_request(str(sent), None, params, prompt_token_ids=prompt, stream=bool(sent % 2))
            sent += 1
        for output in engine.step():
            if output.finished:
                assert output.request_id not in done
                done[output.request_id] = output
        if rng.random() < 0.1:
            victim = str(rng.randrange(sent))
            if victim not in done:
                engine.abort_request(victim)
                aborted.add(victim)
    engine.step()  # the last result is still to be collected
    engine.engine.check()
    stats = engine.engine.stats
    assert stats.kv_used == 0 and stats.host_used == 0 and stats.failed_steps == 0
    assert (stats.preempted_swap if mode == "swap" else stats.preempted_recompute) > 10
    assert set(done) | aborted == {str(i) for i in range(len(asked))} and len(aborted) > 5
    engine.close()
    cpu = LLM(str(tiny), skip_tokenizer_init=True, **OPTIONS)
    expected = cpu.generate([{"prompt_token_ids": p} for p, _ in asked], [s for _, s in asked], use_tqdm=False)
    cpu.close()
    wrong = [i for i, output in enumerate(expected) if str(i) not in aborted
             and [(c.token_ids, c.finish_reason) for c in output.outputs]
             != [(c.token_ids, c.finish_reason) for c in done[str(i)].outputs]]
    assert len(wrong) <= 2, wrong


def test_a_lost_device_ends_the_engine_at_once(tiny: Path, on_gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = on_gpu(tiny, **SMALL).llm_engine
    wanted = tokens(run(engine, 3))
    assert len(wanted) == 3

    def lost(event: PretendEvent) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(PretendEvent, "synchronize", lost)
    with pytest.raises(EngineDead, match="context is lost: CUDA error: an illegal memory access"):
        run(engine, 3)
    with pytest.raises(EngineDead):
        engine.step()


def test_host_memory_that_could_not_be_pinned_is_slow_and_not_wrong(
    tiny: Path, on_gpu: Any, asked: Any, expected: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(pool: PretendHostPool) -> None:
        raise ConfigError("swap_space: 1 bytes of host memory could not be pinned: planted.", "swap_space")

    monkeypatch.setattr(PretendHostPool, "wait", refused)
    llm = on_gpu(tiny, num_gpu_blocks_override=24, preemption_mode="swap")
    assert answers(llm, asked) == expected
    assert llm.llm_engine.engine.stats.preempted_swap > 0 and llm.llm_engine.engine.stats.failed_steps == 0
    llm.close()


def test_an_fp8_cache_gives_the_same_answer_with_and_without_graphs_and_near_the_plain_one(tiny: Path, on_gpu: Any) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, logprobs=0)
    asked = [([3 + (7 * i + j) % 200 for j in range(5 + 9 * i)], params) for i in range(6)]

    def first_logprobs(**options: Any) -> list[float]:
        llm = on_gpu(tiny, **options)
        assert llm.llm_engine.group.runner.kv.dtype == (torch.float8_e4m3fn if "kv_cache_dtype" in options else torch.float32)
        found = answers(llm, asked)
        llm.close()
        return [next(iter(steps[0].values()))[0] for _, _, _, steps, _ in found]

    narrow, eager = first_logprobs(kv_cache_dtype="fp8"), first_logprobs(kv_cache_dtype="fp8", enforce_eager=True)
    plain = first_logprobs()
    assert narrow == eager != plain  # three bits of fraction are felt
    assert max(abs(a - b) for a, b in zip(narrow, plain, strict=True)) < 1.0
