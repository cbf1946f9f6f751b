"""The choice between recompute and swap, and the rates behind it."""

import numpy as np
import pytest
from fakes import Bench

from octavo.engine.preempt import PREFILL_TOKENS_PER_SECOND, SWAP_BYTES_PER_SECOND
from octavo.engine.state import StepRecord
from octavo.plan import StepResult

NONE = np.empty(0, np.int32)


def record(prompt: int, decodes: int, swapped: int = 0) -> StepRecord:
    return StepRecord(0, np.empty(0, np.intp), NONE, NONE, np.empty(0, np.intp), NONE, decodes, prompt, swapped_bytes=swapped)


def test_rates_follow_what_is_measured():
    preemption = Bench().engine._scheduler.preemption
    assert (preemption.prefill_rate, preemption.swap_rate) == (PREFILL_TOKENS_PER_SECOND, SWAP_BYTES_PER_SECOND)
    for _ in range(60):
        preemption.observe(record(512, 8), StepResult(epoch=0, step=0, seconds=5.2))
        preemption.observe(record(4, 8, 10**9), StepResult(epoch=0, step=0, seconds=7.0, swap_seconds=0.5))
    assert preemption.prefill_rate == pytest.approx(100.0, rel=0.01)
    assert preemption.swap_rate == pytest.approx(2e9, rel=0.01)


def test_steps_that_decode_or_measure_nothing_teach_nothing():
    preemption = Bench().engine._scheduler.preemption
    preemption.observe(record(8, 8), StepResult(epoch=0, step=0, seconds=1.0))
    preemption.observe(record(512, 0), StepResult(epoch=0, step=0, seconds=0.0))
    preemption.observe(record(0, 8, 100), StepResult(epoch=0, step=0, seconds=1.0))
    assert (preemption.prefill_rate, preemption.swap_rate) == (PREFILL_TOKENS_PER_SECOND, SWAP_BYTES_PER_SECOND)


def test_the_cheaper_way_is_taken():
    preemption = Bench(block_size=8).engine._scheduler.preemption  # 1024 bytes a block
    preemption.prefill_rate, preemption.swap_rate = 1000.0, 1e6
    assert preemption.swap_is_cheaper(100)  # 13 blocks out and back: 27 ms; 100 tokens: 100 ms
    preemption.swap_rate = 1e5
    assert not preemption.swap_is_cheaper(100)


@pytest.mark.parametrize(("rate", "ready", "swaps"), [(1e12, True, True), (1.0, True, False), (1e12, False, False)])
def test_auto_follows_the_rates_once_host_memory_is_ready(rate, ready, swaps):
    bench = Bench(blocks=10, host_blocks=40, rows=3, max_model_len=80)
    bench.engine._state.host_ready = lambda: ready
    bench.engine._scheduler.preemption.swap_rate = rate
    bench.engine._scheduler.preemption.observe = lambda *_: None
    for i in range(3):
        bench.add(f"r{i}", [6 + i] * 9, max_tokens=40, eos=())
    bench.run()
    bench.assert_reference()
    stats = bench.engine.stats
    assert (stats.preempted_swap > 0) == swaps and (stats.preempted_recompute > 0) != swaps


def test_host_memory_is_expected_once_half_of_the_pool_holds_something():
    bench = Bench(blocks=40, host_blocks=40, block_size=8, rows=4, max_model_len=320)
    asked = []
    bench.engine._state.expect_host = lambda: asked.append(bench.engine._state.pool.num_free)
    bench.add("a", [6] * 8 * 19, max_tokens=6, eos=())  # 20 blocks
    bench.run()
    assert asked == [] and bench.engine._state.pool.num_free >= 20
    bench.add("b", [7] * 8 * 3, max_tokens=6, eos=())  # what "a" left is a prefix that may be asked for again
    bench.run()
    assert asked and max(asked) < 20


def test_a_failed_step_loses_the_copies_it_should_have_made():
    """What was swapped out in a step that failed is computed again, not read from host memory."""
    bench = Bench(blocks=10, host_blocks=40, rows=3, max_model_len=80, preemption_mode="swap")
    bench.faults = True
    for i in range(3):
        bench.add(f"r{i}", [6 + i] * 9, max_tokens=40, eos=())
    group, real = bench.group, bench.group._move
    failed = []

    def lose(pairs, source, target):
        if target is group.host and len(pairs) and not failed:
            failed.append(group.step - 1)
            target[pairs[:, 1]] = 12345
            return
        real(pairs, source, target)

    group._move = lose
    group.fail = lambda step: "result" if failed == [step] else None
    bench.run()
    assert failed
    reasons = sorted(end.reason for end in bench.ends.values())
    assert reasons == ["error", "error", "length"]
    bench.assert_reference()
