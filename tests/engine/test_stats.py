"""Counters, and the line every ten seconds."""

import logging

from fakes import Bench

from octavo.engine.stats import STEP_SIZES, Stats, StatsLog


def test_counters_of_a_run():
    bench = Bench(blocks=64)
    bench.add("a", list(range(6, 26)), max_tokens=5, eos=())
    bench.run()
    bench.add("b", list(range(6, 26)), max_tokens=5, eos=())
    bench.add("c", [7, 8], max_tokens=50, eos=())
    for _ in range(7):
        bench.step()
    stats = bench.engine.stats
    assert (stats.running, stats.waiting, stats.swapped) == (1, 0, 0)
    assert (stats.prefix_queries, stats.prefix_hits) == (42, 16)
    assert stats.prompt_tokens == 20 + 4 + 2
    assert stats.generated_tokens == 5 + 5 + 7
    assert stats.kv_used == 1 and stats.kv_usage == 1 / 64
    assert stats.requests == 3 and dict(stats.finished) == {"length": 2}
    bench.engine.abort("c")
    bench.run()
    assert bench.engine.stats.finished["abort"] == 1 and bench.engine.stats.running == 0


def test_empty_stats_divide_by_nothing():
    assert Stats().kv_usage == 0.0


def test_a_line_every_ten_seconds_about_those_ten_seconds(caplog):
    now = [100.0]
    bench = Bench(clock=lambda: now[0], disable_log_stats=False)
    bench.add("a", list(range(6, 26)), max_tokens=200, eos=())
    with caplog.at_level(logging.INFO, "octavo"):
        for _ in range(41):
            bench.step()
            now[0] += 0.5
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("in 2.0 tokens/s, out 2.1 tokens/s, running 1, waiting 0, swapped 0, KV use 2.")
    assert lines[1].startswith("in 0.0 tokens/s, out 2.0 tokens/s")
    assert "prefix hits 0.0 %" in lines[0]


def test_no_line_when_switched_off(caplog):
    now = [100.0]
    bench = Bench(clock=lambda: now[0])
    bench.add("a", [6], max_tokens=5, eos=())
    with caplog.at_level(logging.INFO, "octavo"):
        for _ in range(5):
            bench.step()
            now[0] += 20.0
    assert not caplog.records


def test_the_log_itself(caplog):
    log = StatsLog(logging.getLogger("octavo.test"), 0.0)
    assert not log.due(9.9) and log.due(10.0)
    with caplog.at_level(logging.INFO, "octavo"):
        log.write(Stats(prompt_tokens=50, generated_tokens=20, prefix_queries=40, prefix_hits=10, running=2), 10.0)
    assert caplog.messages == [
        "in 5.0 tokens/s, out 2.0 tokens/s, running 2, waiting 0, swapped 0, KV use 0.0 %, prefix hits 25.0 %"]


def test_steps_are_counted_by_size_and_a_copy_stands_still() -> None:
    stats = Stats()
    for prompt, generated in ((0, 1), (0, 8), (5, 4), (16384, 0), (16384, 1), (0, 0)):
        stats.note_step(prompt, generated)
    kept = stats.copy()
    assert dict(zip((*STEP_SIZES, "more"), kept.step_sizes, strict=True)) == {
        **dict.fromkeys(STEP_SIZES, 0), 1: 1, 8: 1, 16: 1, 16384: 1, "more": 1}
    assert (kept.prompt_tokens, kept.generated_tokens) == (32773, 14)
    stats.note_step(1, 0)
    stats.finished["stop"] += 1
    assert sum(kept.step_sizes) == 5 and not kept.finished


def test_what_the_cache_held_and_was_computed_again_is_counted() -> None:
    bench = Bench(block_size=8)
    for name, length in (("a", 16), ("again", 16), ("longer", 17), ("shorter", 8)):
        bench.add(name, [7] * length, max_tokens=2, ignore_eos=True)
        bench.run()
    assert [bench.started[name] for name in ("a", "again", "longer", "shorter")] == [0, 8, 16, 0]
    assert bench.engine.stats.prefix_again == 16  # the last block of "again", and the only one of "shorter"


def test_a_step_says_when_it_gave_requests_their_rows() -> None:
    now = [100.0]
    bench = Bench(clock=lambda: now[0], rows=1)
    bench.add("a", [7] * 4, max_tokens=2, ignore_eos=True)
    bench.add("b", [7] * 4, max_tokens=2, ignore_eos=True)
    found = {}
    while bench.engine.has_work():
        now[0] += 1.0
        out = bench.step()
        found |= {name: (out.planned, now[0]) for name, _ in out.started}
    assert found["a"] == (101.0, 101.0) and found["b"][0] == found["b"][1] > 101.0
