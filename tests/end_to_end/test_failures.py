"""Exceptions in the middle of a step of the real worker: they cost the requests of that step and nobody else."""

from pathlib import Path
from typing import Any

import pytest

from octavo import EngineArgs, LLMEngine, RequestOutput, SamplingParams
from octavo.errors import EngineDead


def engine_of(tiny: Path, ahead: bool) -> LLMEngine:
    return LLMEngine.from_engine_args(EngineArgs(
        model=str(tiny), skip_tokenizer_init=True, dtype="float32", async_scheduling=ahead, disable_log_stats=True,
        max_num_seqs=8, max_num_batched_tokens=24))


def fail_at(engine: LLMEngine, *calls: int) -> None:
    """The decoder raises in its n-th calls from now on, counted from 1."""
    decoder = engine.group.runner._decoder
    forward, count = decoder.forward, 0

    def failing(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count in calls:
            raise MemoryError("planted")
        return forward(*args)

    decoder.forward = failing


def run(engine: LLMEngine, count: int) -> dict[str, RequestOutput]:
    for i in range(count):
        engine.add_request(str(i), None, SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True),
                           prompt_token_ids=[3 + i, *range(20, 38)], stream=False)
    done: dict[str, RequestOutput] = {}
    while engine.has_unfinished_requests():
        done |= {o.request_id: o for o in engine.step() if o.finished}
    engine.engine.check()
    return done


@pytest.mark.parametrize("ahead", [False, True])
def test_a_failed_step_costs_its_own_requests(tiny: Path, ahead: bool) -> None:
    engine = engine_of(tiny, ahead)
    wanted = {name: o.outputs[0].token_ids for name, o in run(engine, 12).items()}
    fail_at(engine, 3)
    done = run(engine, 12)
    failed = {name for name, o in done.items() if o.outputs[0].finish_reason == "error"}
    assert 0 < len(failed) < 12 and engine.engine.stats.failed_steps == 1
    assert all(done[name].outputs[0].token_ids == wanted[name] for name in done.keys() - failed)
    assert all("MemoryError" in (done[name].error or "") for name in failed)
    assert {n: o.outputs[0].token_ids for n, o in run(engine, 12).items()} == wanted  # nothing spoilt was cached


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("part", ["moves", "edits"])
def test_a_step_that_fails_before_it_computes_costs_its_own_requests_too(tiny: Path, ahead: bool, part: str) -> None:
    """A step that was planned meanwhile still fits, so the engine goes on."""
    engine = engine_of(tiny, ahead)
    wanted = {name: o.outputs[0].token_ids for name, o in run(engine, 12).items()}
    runner: Any = engine.group.runner
    owner, name = (runner, "_move") if part == "moves" else (runner._edits, "begin")
    method, count = getattr(owner, name), 0

    def failing(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == 3:
            raise MemoryError("planted")
        return method(*args)

    setattr(owner, name, failing)
    done = run(engine, 12)
    failed = {name for name, o in done.items() if o.outputs[0].finish_reason == "error"}
    assert 0 < len(failed) < 12 and engine.engine.stats.failed_steps == 1
    assert all(done[name].outputs[0].token_ids == wanted[name] for name in done.keys() - failed)
    assert {n: o.outputs[0].token_ids for n, o in run(engine, 12).items()} == wanted


@pytest.mark.parametrize("ahead", [False, True])
def test_two_failures_in_a_row_are_survived_and_three_are_not(tiny: Path, ahead: bool) -> None:
    engine = engine_of(tiny, ahead)
    fail_at(engine, 2, 3)
    assert len(run(engine, 12)) == 12
    fail_at(engine, 1, 2, 3)
    with pytest.raises(EngineDead, match="MemoryError"):
        run(engine, 12)
    with pytest.raises(EngineDead):
        engine.step()
