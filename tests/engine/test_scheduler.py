"""Who computes what in a step: budget, chunks, order, forks, preemption."""

import pytest
from fakes import Bench

from octavo.engine.scheduler import MIXED_PROMPT_TOKENS


def prompt(seed: int, length: int) -> list[int]:
    return [(seed * 13 + i * i * 7 + i) % 40 + 6 for i in range(length)]


def watch(bench: Bench) -> list:
    """Every plan that the group gets from now on."""
    plans, submit = [], bench.group.submit
    bench.group.submit = lambda plan: (plans.append(plan), submit(plan))[1]
    return plans


def test_decodes_come_first_and_chunks_share_what_is_left():
    bench = Bench(budget=20, rows=4)
    plans = watch(bench)
    bench.add("a", prompt(1, 5), max_tokens=30, eos=())
    bench.step()
    bench.add("b", prompt(2, 50), max_tokens=3, eos=())
    bench.add("c", prompt(3, 10), max_tokens=3, eos=())
    for _ in range(4):
        bench.step()
    counts = [plan.counts.tolist() for plan in plans]
    assert counts[0] == [5]
    # One token for a, then b up to a block's end; what the end of a block leaves over goes to c.
    assert counts[1:] == [[1, 16, 3], [1, 16, 3], [1, 16, 3], [1, 1, 2, 1]] or counts[1] == [1, 16, 3]
    assert all(sum(c) <= 20 for c in counts)
    bench.run()
    bench.assert_reference()


def test_prompts_take_512_tokens_while_others_decode_and_the_budget_when_nobody_does():
    bench = Bench(budget=4096, max_model_len=4096, blocks=1024, rows=4)
    plans = watch(bench)
    bench.add("a", prompt(1, 1500), max_tokens=40, eos=())
    bench.step()
    assert plans[-1].counts.tolist() == [1500]
    bench.add("b", prompt(2, 1300), max_tokens=4, eos=())
    sizes = []
    while "b" not in bench.finished:
        bench.step()
        sizes.append(plans[-1].counts.tolist()[1])
    assert sizes[:4] == [MIXED_PROMPT_TOKENS, MIXED_PROMPT_TOKENS, 1300 - 2 * MIXED_PROMPT_TOKENS, 1]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_patient_engine_gives_prompts_the_whole_budget_while_others_decode(overlap):
    def steps(patient):
        """Prompt tokens of each step that computes some while a decodes, and what is generated."""
        bench = Bench(budget=2048, max_model_len=4096, blocks=1024, rows=8, overlap=overlap, patient=patient)
        plans = watch(bench)
        bench.add("a", prompt(1, 100), max_tokens=60, eos=())
        bench.step()
        bench.add("b", prompt(2, 3000), max_tokens=4, eos=())
        bench.add("c", prompt(3, 1500), max_tokens=4, eos=())
        bench.run()
        bench.assert_reference()
        assert bench.group.most_tokens <= 2048
        mixed = [sum(n for n in plan.counts.tolist() if n > 1) for plan in plans[1:]]
        return [total for total in mixed if total], [bench.tokens(name) for name in "abc"]

    patient, answers = steps(True)
    # The row that decodes takes one token of the budget, and a prompt whose end is not reached ends at a block.
    assert patient[0] == 2047 and 2040 <= patient[1] <= 2047 and sum(patient) == 4500 and len(patient) == 3
    hurried, same = steps(False)
    assert max(hurried) == MIXED_PROMPT_TOKENS and sum(hurried) == 4500 and same == answers


def test_a_patient_engine_still_cuts_prompts_where_it_was_asked_to():
    bench = Bench(budget=2048, max_model_len=4096, blocks=1024, rows=8, patient=True, long_prefill_token_threshold=700)
    plans = watch(bench)
    bench.add("a", prompt(1, 20), max_tokens=9, eos=())
    bench.step()
    bench.add("b", prompt(2, 1000), max_tokens=2, eos=())
    bench.step()
    assert plans[-1].counts.tolist() == [1, 696]


@pytest.mark.parametrize(("threshold", "expected"), [(1, [1] * 8), (7, [7, 1, 7, 1, 7, 1]), (16, [16, 16, 8]), (20, [16, 16, 8])])
def test_chunk_ends_are_aligned_where_that_costs_nothing(threshold, expected):
    bench = Bench(long_prefill_token_threshold=threshold)
    plans = watch(bench)
    bench.add("a", prompt(1, 40), max_tokens=1)
    for _ in expected:
        bench.step()
    assert [plan.counts.tolist()[0] for plan in plans] == expected


def test_without_chunks_a_prompt_waits_until_a_step_can_hold_it():
    bench = Bench(budget=32, rows=4, enable_chunked_prefill=False)
    plans = watch(bench)
    bench.add("a", prompt(1, 32), max_tokens=3, eos=())
    bench.add("b", prompt(2, 32), max_tokens=3, eos=())
    bench.add("c", prompt(3, 4), max_tokens=3, eos=())  # would fit beside a, but b is first
    bench.run()
    assert [plan.counts.tolist() for plan in plans][:5] == [[32], [1], [1], [32], [1, 4]]
    bench.assert_reference()


def test_a_wholly_cached_prompt_computes_its_last_block_only():
    for length, computed in ((40, 8), (41, 1), (47, 7)):
        bench = Bench()
        plans = watch(bench)
        bench.add("a", prompt(1, 47)[:length], max_tokens=2, eos=())
        bench.run()
        bench.add("b", prompt(1, 47)[:length], max_tokens=2, eos=())
        bench.step()
        assert plans[-1].counts.tolist() == [computed]
        assert bench.started["b"] == length - computed
        bench.run()
        assert bench.tokens("a") == bench.tokens("b")


def test_salts_keep_caches_apart_and_off_means_off():
    bench = Bench()
    for name, salt, cached in (("a", "x", 0), ("b", "y", 0), ("c", "x", 32)):
        bench.add(name, prompt(1, 40), salt=salt, max_tokens=2)
        bench.run()
        assert bench.started[name] == cached
    bench = Bench(enable_prefix_caching=False)
    for name in "ab":
        bench.add(name, prompt(1, 40), max_tokens=2)
        bench.run()
        assert bench.started[name] == 0
    assert bench.engine.stats.kv_cached == 0


def test_answers_are_cached_too():
    bench = Bench()
    bench.add("a", prompt(1, 10), max_tokens=30, eos=())
    bench.run()
    bench.add("b", prompt(1, 10) + bench.tokens("a") + [7, 8], max_tokens=2)
    bench.run()
    assert bench.started["b"] == 32  # 39 computed tokens are four full blocks


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("length", [37, 40])
def test_the_prompt_of_n_continuations_is_stored_once(length, overlap, caching):
    bench = Bench(overlap=overlap, enable_prefix_caching=caching, rows=8)
    plans = watch(bench)
    bench.add("a", prompt(1, length), n=5, temperature=1.0, seed=9, max_tokens=3, eos=())
    bench.step()
    assert sum(plan.counts.sum() for plan in plans) == length  # computed once
    assert plans[0].sample_from.tolist() == [0] * 5 and len(plans[0].new) == 5
    assert bench.state.pool.num_used == 5
    bench.step()
    full, partial = length // 8, length % 8 != 0
    # Full blocks once; the rest is one block for each: all but one of them copy it when they first write.
    assert bench.state.pool.num_used == full + 5
    assert bench.group.plans["copies"] == (4 if partial else 0)
    bench.run()
    bench.assert_reference()
    assert bench.group.plans["copies"] == (4 if partial else 0)


def test_continuations_without_a_row_follow_ahead_of_the_queue_and_share_the_prompt():
    bench = Bench(rows=3)
    bench.add("a", prompt(1, 41), n=6, temperature=1.0, seed=4, max_tokens=5, eos=())
    bench.add("b", prompt(2, 5), max_tokens=2, eos=())
    plans = watch(bench)
    most = 0
    while "a" not in bench.finished:
        bench.step()
        most = max(most, bench.state.pool.num_used)
    late = [plan.counts.tolist() for plan in plans if plan.new and plan.step > 0]
    assert late[0][-3:] == [1, 1, 1]  # their prompt was found, its last token is computed
    assert most <= 5 + 3
    bench.run()
    bench.assert_reference()


def test_n_equals_separate_requests():
    bench = Bench()
    bench.add("n", prompt(1, 19), n=4, temperature=0.9, seed=5, max_tokens=12)
    bench.add("one", prompt(1, 19), temperature=0.9, seed=5, max_tokens=12)
    bench.run()
    assert bench.tokens("n", 0) == bench.tokens("one")
    assert len({tuple(bench.tokens("n", i)) for i in range(4)}) == 4
    bench.assert_reference()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_the_last_arrival_gives_way_and_comes_back_first(mode, overlap):
    host_blocks = 20 if mode == "swap" else 0  # evicted prefixes would be moved too
    bench = Bench(blocks=10, host_blocks=host_blocks, rows=3, preemption_mode=mode, overlap=overlap, max_model_len=80)
    for i in range(3):
        bench.add(f"r{i}", prompt(i, 9), max_tokens=40, eos=(), stream=True)
    bench.add("last", prompt(7, 9), max_tokens=4, eos=())
    plans = watch(bench)
    while bench.engine.has_work():
        bench.step()
        assert bench.state.sequences[0] is None or len(bench.finished) or any(
            s is not None and s.request.id == "r0" for s in bench.state.sequences)  # the first is never preempted
    names = {tuple(request.prompt_token_ids): name for name, request in bench.requests.items()}
    starts = [names[tuple(new.tokens[:9].tolist())] for plan in plans for new in plan.new]
    assert starts[:3] == ["r0", "r1", "r2"] and len(starts) > 4
    assert starts[-1] == "last" and bench.finished[:2] == ["r0", "r1"]  # a newcomer does not pass those that came back
    bench.assert_reference()
    stats = bench.engine.stats
    assert (stats.preempted_swap > 0, stats.preempted_recompute > 0) == (mode == "swap", mode == "recompute")
    assert (bench.group.plans["swap_out"] > 0) == (bench.group.plans["swap_in"] > 0) == (mode == "swap")


def test_priority_gives_way_by_priority():
    bench = Bench(blocks=10, rows=3, scheduling_policy="priority", max_model_len=80)
    bench.add("low", prompt(1, 9), max_tokens=40, eos=(), priority=5)
    bench.add("high", prompt(2, 9), max_tokens=40, eos=(), priority=-5)
    bench.add("mid", prompt(3, 9), max_tokens=40, eos=(), priority=0)
    bench.run()
    assert bench.finished == ["high", "mid", "low"]
    bench.assert_reference()


@pytest.mark.parametrize("overlap", [False, True])
def test_beams_that_wait_for_each_other_are_unblocked(overlap):
    """Two searches hold rows and blocks while a beam of each waits: the younger gives way, nobody hangs."""
    wanted = None
    for blocks, rows in ((200, 16), (15, 6), (16, 8), (17, 7), (18, 9)):
        bench = Bench(blocks=blocks, rows=rows, max_model_len=80, overlap=overlap, enable_prefix_caching=False)
        for i in range(3):
            bench.add(f"r{i}", prompt(i, 9 + 8 * i), n=3, use_beam_search=True, max_tokens=22, eos=())
        bench.run(limit=3000)
        answers = {key: (end.token_ids, end.reason) for key, end in bench.ends.items()}
        wanted = wanted or answers
        assert answers == wanted and len(wanted) == 9


def test_host_bound_rows_wait_for_the_host_and_nobody_else_does():
    bench = Bench(overlap=True)
    plans = watch(bench)
    seen = []

    def processor(output, scores):
        seen.append(len(output))
        return scores

    bench.add("slow", prompt(1, 5), max_tokens=6, eos=(), logits_processors=(processor,))
    bench.add("fast", prompt(2, 5), max_tokens=12, eos=())
    bench.run()
    assert seen == list(range(6))  # every call has seen every token before it
    bench.assert_reference()
    assert [len(plan.rows) for plan in plans] == [2, 1, 2, 1, 2, 1, 2, 1, 2, 1, 2, 1]


def test_a_row_that_reaches_its_limit_is_not_in_the_next_step():
    bench = Bench(overlap=True)
    plans = watch(bench)
    bench.add("a", prompt(1, 5), max_tokens=3, eos=())
    bench.run()
    assert [plan.rows.tolist() for plan in plans] == [[0], [0], [0]]


def test_an_extra_token_after_an_end_token_is_dropped():
    for stream in (False, True):
        bench = Bench(overlap=True)
        plans = watch(bench)
        bench.add("a", prompt(4, 5), max_tokens=60, eos=tuple(range(8)), stream=stream)
        bench.run()
        wanted = bench.expected("a")
        assert 0 < len(wanted) < 60 and bench.tokens("a") == wanted
        assert len(plans) == len(wanted) + 1


def test_more_stop_ids_than_columns():
    free = Bench()
    free.add("a", prompt(1, 5), max_tokens=100, eos=())
    free.run()
    answer = free.tokens("a")
    first = {token: place for place, token in reversed(list(enumerate(answer)))}
    last = max(range(48), key=lambda token: first.get(token, -1))
    # The largest id, beyond the columns, is the only one that is generated.
    stops = (*(token for token in range(last) if token not in first), last)
    bench = Bench()
    bench.add("a", prompt(1, 5), max_tokens=100, eos=(), stop_token_ids=stops)
    bench.run()
    bench.assert_reference()
    assert bench.ends["a", 0].reason == "stop"
    assert bench.ends["a", 0].stop_token == stops[-1] == bench.tokens("a")[-1]


@pytest.mark.parametrize("mode", ["recompute", "swap"])
def test_a_token_that_is_under_way_while_its_row_is_taken_is_not_lost(mode):
    bench = Bench(blocks=10, host_blocks=20, rows=3, preemption_mode=mode, overlap=True, max_model_len=80)
    plans = watch(bench)
    for i in range(3):
        bench.add(f"r{i}", prompt(i, 9), max_tokens=40, eos=())
    bench.run()
    stats = bench.engine.stats
    assert stats.preempted_recompute + stats.preempted_swap > 0
    assert sum(len(plan.sample_rows) for plan in plans) == 3 * 40 == stats.generated_tokens  # each was sampled once


def test_a_newcomer_leaves_room_for_the_growth_of_those_that_run():
    for length, waits in ((24, False), (32, True)):
        bench = Bench(blocks=12, rows=9, enable_prefix_caching=False)
        for i in range(4):
            bench.add(f"r{i}", prompt(i, 9), max_tokens=5, eos=())
        bench.step()
        assert bench.state.num_running == 4 and bench.state.pool.num_available == 4
        bench.add("new", prompt(9, length), max_tokens=3, eos=())  # three blocks, or all four that are left
        bench.step()
        assert ("new" not in bench.started) == waits
        bench.run()
        bench.assert_reference()


def test_headroom_does_not_keep_the_last_beam_from_its_siblings():
    bench = Bench(blocks=11, rows=5, enable_prefix_caching=False)
    bench.add("a", prompt(1, 9), n=5, use_beam_search=True, max_tokens=7, eos=())
    for _ in range(3):
        bench.step()
    bench.engine._scheduler.preemption.preempt(bench.state.sequences[0])
    held = bench.state.pool.take(5)  # the prompt's block and one for each beam are left
    bench.checks = False
    for _ in range(12):
        bench.step()
    assert bench.finished == ["a"]
    bench.state.pool.release(held)
    bench.idle()


@pytest.mark.parametrize("when", [2, 3, 5])
def test_two_searches_that_lose_a_beam_and_every_free_block_come_to_the_same_end(when):
    answers = []
    for disturbed in (False, True):
        bench = Bench(blocks=40, rows=8, check=False)
        for name in "ab":
            bench.add(name, prompt(ord(name), 17), n=3, use_beam_search=True, max_tokens=9, eos=())
        for _ in range(when):
            bench.step()
        if disturbed:
            state = bench.state
            for name in "ab":
                bench.engine._scheduler.preemption._park(state.requests[name].sequences[1])
            held = state.pool.take(state.pool.num_available)
            for _ in range(3):
                bench.step()
            assert "a" in {s.request.id for s in state.sequences if s is not None}  # if one gave way, it was the younger
            state.pool.release(held)
        bench.run()
        answers.append({key: (end.token_ids, end.cumulative_logprob) for key, end in bench.ends.items()})
    assert answers[0] == answers[1] and len(answers[0]) == 6
