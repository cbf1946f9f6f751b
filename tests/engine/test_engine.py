"""The engine as a whole: whatever the scheduler does, the tokens are those of the plain loop."""

import pytest
from fakes import Bench

from octavo.errors import EngineDead


def prompt(seed: int, length: int) -> list[int]:
    return [(seed * 7919 + i * i * 31 + i * seed) % 44 + 4 for i in range(length)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 40])
def test_one_request_equals_the_plain_loop(overlap, length):
    bench = Bench(overlap=overlap)
    bench.add("a", prompt(1, length), max_tokens=30)
    bench.run()
    assert bench.tokens("a") == bench.expected("a")
    assert bench.ends["a", 0].reason in ("stop", "length")
    assert bench.finished == ["a"]


OPTIONS = {
    "plain": {},
    "no cache": {"enable_prefix_caching": False},
    "chunks of 1": {"long_prefill_token_threshold": 1},
    "chunks of 7": {"long_prefill_token_threshold": 7},
    "chunks of 16": {"long_prefill_token_threshold": 16},
    "whole prompts": {"enable_chunked_prefill": False},
    "small budget": {"budget": 17},
    "one row": {"rows": 1},
    "recompute": {"blocks": 24, "max_model_len": 128, "preemption_mode": "recompute"},
    "swap": {"blocks": 24, "host_blocks": 64, "max_model_len": 128, "preemption_mode": "swap"},
    "little swap": {"blocks": 24, "host_blocks": 5, "max_model_len": 128, "preemption_mode": "swap"},
    "auto": {"blocks": 24, "host_blocks": 16, "max_model_len": 128},
    "big blocks": {"block_size": 32, "blocks": 40},
    "priority": {"scheduling_policy": "priority", "blocks": 24, "max_model_len": 128},
    "sjf": {"scheduling_policy": "sjf", "blocks": 24, "max_model_len": 128},
}


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_thirty_requests_equal_the_plain_loop(name, overlap):
    bench = Bench(overlap=overlap, **OPTIONS[name])
    for i in range(30):
        shared = prompt(3, 8 * (i % 4))
        bench.add(f"r{i}", shared + prompt(i, 3 + i * 5 % 29), max_tokens=5 + i * 3 % 40, stream=i % 3 == 0, seed=i,
                  temperature=float(i % 2), n=1 + (i % 5 == 4) * 2, eos=(1,) if i % 4 else (),
                  ignore_eos=i % 7 == 0, min_tokens=i % 4)
    bench.run()
    bench.assert_reference()
    assert len(bench.finished) == 30
    if name in ("recompute", "swap", "auto", "little swap"):
        stats = bench.engine.stats
        assert stats.preempted_swap + stats.preempted_recompute > 0
        assert (stats.preempted_swap > 0) == (name != "recompute")
    assert bench.group.most_tokens <= bench.group.info.max_num_batched_tokens


@pytest.mark.parametrize("where", ["submit", "result"])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_failed_step_ends_its_requests_and_no_others(where, overlap):
    bench = Bench(overlap=overlap)
    bench.add("a", prompt(1, 20), max_tokens=20, eos=())
    bench.group.fail = lambda step: where if step == 4 else None
    for _ in range(6):
        bench.step()
    bench.add("b", prompt(1, 20), max_tokens=20, eos=())
    bench.run()
    assert bench.ends["a", 0].reason == "error"
    assert bench.ends["a", 0].error == "A step of the engine failed (Fault)."
    assert bench.tokens("b") == bench.expected("b")


def test_the_third_failure_in_a_row_ends_the_engine():
    bench = Bench()
    bench.group.fail = lambda step: "result"
    for i in range(3):
        bench.add(f"r{i}", prompt(i, 20), max_tokens=20)
        if i < 2:
            bench.step()
            assert bench.ends[f"r{i}", 0].reason == "error"
    with pytest.raises(EngineDead):
        bench.step()
    with pytest.raises(EngineDead):
        bench.add("later", [5], max_tokens=1)


@pytest.mark.parametrize("where", ["submit", "result"])
@pytest.mark.parametrize("overlap", [False, True])
def test_one_failure_among_many_requests_is_one_failure(where, overlap):
    """With overlap the next step is under way already: it must not fail for the rows of the first."""
    bench = Bench(overlap=overlap, budget=24)
    for i in range(12):
        bench.add(f"r{i}", prompt(i, 20), max_tokens=12, eos=())
    bench.group.fail = lambda step: where if step == 3 else None
    bench.run()
    failed = {name for (name, _), end in bench.ends.items() if end.reason == "error"}
    assert bench.engine.stats.failed_steps == 1
    assert 0 < len(failed) < 12 and len(bench.finished) == 12
    for i in range(12):
        if f"r{i}" not in failed:
            assert bench.tokens(f"r{i}") == bench.expected(f"r{i}")


def test_what_a_row_without_finite_logits_computed_is_not_published():
    bench = Bench()
    bench.group.bad = lambda tokens: len(tokens) >= 20
    bench.add("bad", prompt(1, 20), max_tokens=4, eos=())
    bench.run()
    assert bench.ends["bad", 0].reason == "error"
    assert bench.state.pool.num_cached == 0
    bench.group.bad = lambda tokens: False
    bench.add("again", prompt(1, 20), max_tokens=4, eos=())
    bench.run()
    assert bench.started["again"] == 0 and bench.tokens("again") == bench.expected("again")


def test_an_abort_that_is_not_reported_frees_the_name_at_once():
    for overlap in (False, True):
        bench = Bench(overlap=overlap)
        bench.add("a", prompt(1, 20), max_tokens=9, eos=())
        for _ in range(3):
            bench.step()
        assert bench.engine.abort("a", report=False) and not bench.engine.abort("a", report=False)
        bench.started.clear()
        bench.add("a", prompt(2, 11), max_tokens=5, eos=())
        bench.run()
        assert bench.ends["a", 0].reason == "length" and bench.tokens("a") == bench.expected("a")


def test_prompt_logprobs_go_on_when_the_first_of_several_continuations_is_aborted():
    bench = Bench(budget=8, rows=4)
    bench.add("a", prompt(1, 24), n=2, max_tokens=3, eos=(), prompt_logprobs=1)
    bench.step()
    assert bench.engine.abort("a", 0)
    bench.run()
    assert len(bench.prompt_logprobs["a"]) == 23


def test_siblings_fork_from_a_prompt_whose_last_chunk_but_one_has_failed_meanwhile():
    """The step that forks them was planned on top of the failed one; all end, and their blocks are not found again."""
    bench = Bench(overlap=True, long_prefill_token_threshold=8)
    bench.faults = True
    bench.group.fail = lambda step: "result" if step == 1 else None
    tokens = list(range(6, 30))
    bench.add("a", tokens, n=3, temperature=1.0, seed=1, max_tokens=4, eos=())
    bench.run()
    assert {index: end.reason for (_, index), end in bench.ends.items()} == dict.fromkeys(range(3), "error")
    bench.add("b", tokens, n=3, temperature=1.0, seed=1, max_tokens=4, eos=())
    bench.run()
    bench.assert_reference()
    assert bench.started["b"] == 8 and bench.ends["b", 2].reason == "length"


def test_an_engine_that_was_broken_off_in_the_middle_takes_aborts_and_does_nothing():
    """Its blocks and rows need not fit together any more; whoever cleans up after it must not stumble over that."""
    bench = Bench()
    bench.add("a", prompt(1, 20), max_tokens=5, eos=())
    bench.step()
    place = bench.state.place

    def broken(sequence, blocks, computed, published):
        place(sequence, blocks, computed, published)
        bench.state.pool.release(blocks)
        raise KeyError("planted")

    bench.state.place = broken
    bench.add("b", prompt(2, 20), max_tokens=5, eos=())
    with pytest.raises(KeyError):
        bench.engine.step()
    assert not bench.engine.abort("b", report=False) and not bench.engine.abort("a", 0)
    with pytest.raises(EngineDead, match="KeyError"):
        bench.engine.step()
