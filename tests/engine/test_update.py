"""What a result means: ends, streams, logprobs, bad rows, aborts in every state."""

import numpy as np
import pytest
from fakes import Bench, logprobs_of, state_of

from octavo.engine.update import BAD_LOGITS


def prompt(seed: int, length: int) -> list[int]:
    return [(seed * 13 + i * i * 7 + i) % 40 + 6 for i in range(length)]


def check_mark(mark, history: list[int], token: int, k: int) -> None:
    """A TokenLogprobs says what the model says after ``history``."""
    values = logprobs_of(state_of(history), 48)
    order = np.argsort(-values, kind="stable")
    assert mark.token_ids == [token, *order[:k].tolist()]
    assert mark.logprobs == [float(values[t]) for t in mark.token_ids]
    assert mark.ranks == [1 + order.tolist().index(token), *range(1, k + 1)]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("options", [{}, {"blocks": 12, "preemption_mode": "recompute"},
                                     {"blocks": 12, "host_blocks": 20, "preemption_mode": "swap"}])
def test_logprobs_are_one_per_token_whatever_happens(overlap, stream, options):
    bench = Bench(overlap=overlap, max_model_len=80, **options)
    for i in range(4):
        bench.add(f"r{i}", prompt(i, 9 + i), max_tokens=30, logprobs=i, temperature=1.0, seed=i, stream=stream, n=1 + i % 2)
    bench.run()
    bench.assert_reference()
    for (name, index), end in bench.ends.items():
        marks = bench.streamed_logprobs[name, index] if stream else end.logprobs
        tokens, history = bench.tokens(name, index), bench.requests[name].prompt_token_ids
        assert len(marks) == len(tokens)
        assert (end.logprobs is None) == stream
        for i, (mark, token) in enumerate(zip(marks, tokens, strict=True)):
            check_mark(mark, [*history, *tokens[:i]], token, int(name[1]))
        assert end.cumulative_logprob == pytest.approx(sum(mark.logprobs[0] for mark in marks))


def test_best_of_sums_logprobs_that_nobody_asked_to_see():
    bench = Bench()
    bench.add("a", prompt(1, 9), n=2, best_of=4, temperature=1.0, seed=1, max_tokens=5)
    bench.add("b", prompt(1, 9), max_tokens=5)
    bench.run()
    for index in range(4):
        end, history = bench.ends["a", index], list(bench.requests["a"].prompt_token_ids)
        total = 0.0
        for token in end.token_ids:
            total += float(logprobs_of(state_of(history), 48)[token])
            history.append(token)
        assert end.logprobs is None and end.cumulative_logprob == pytest.approx(total)
    assert bench.ends["b", 0].cumulative_logprob is None


@pytest.mark.parametrize("options", [
    {}, {"long_prefill_token_threshold": 7}, {"overlap": True, "long_prefill_token_threshold": 16},
    {"blocks": 12, "preemption_mode": "recompute", "long_prefill_token_threshold": 7},
    {"blocks": 12, "host_blocks": 30, "preemption_mode": "swap", "overlap": True, "long_prefill_token_threshold": 7}])
def test_prompt_logprobs_come_once_in_order_and_do_not_read_the_cache(options):
    bench = Bench(max_model_len=80, **options)
    bench.add("warm", prompt(1, 40), max_tokens=1)
    bench.run()
    bench.add("busy", prompt(8, 9), max_tokens=50, eos=())
    bench.add("a", prompt(1, 40), max_tokens=3, prompt_logprobs=2)
    bench.add("n", prompt(2, 21), max_tokens=20, prompt_logprobs=0, n=3, temperature=1.0, seed=2)
    bench.run()
    bench.assert_reference()
    for name, k in (("a", 2), ("n", 0)):
        tokens = bench.requests[name].prompt_token_ids
        marks = bench.prompt_logprobs[name]
        assert len(marks) == len(tokens) - 1
        for i, mark in enumerate(marks, 1):
            check_mark(mark, tokens[:i], tokens[i], k)
    assert bench.started["a"] == 0
    bench.add("after", prompt(2, 21), max_tokens=1)
    bench.run()
    assert bench.started["after"] == 16  # but what it computed was written


def test_stop_ids_are_told_from_end_tokens():
    wanted = {}
    for ignore in (False, True):
        for stops in ((), (1, 2)):
            bench = Bench()
            bench.add("a", prompt(3, 6), max_tokens=200, eos=(1, 2, 3), stop_token_ids=stops, ignore_eos=ignore)
            bench.run()
            bench.assert_reference()
            end = bench.ends["a", 0]
            wanted[ignore, stops] = (end.reason, end.stop_token)
            assert end.stop_token in ((None,) if not ignore or end.reason == "length" else stops)
    assert wanted[False, ()] == ("stop", None) and wanted[True, ()] == ("length", None)
    assert wanted[True, (1, 2)][0] == "stop"


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_bad_row_ends_its_request_alone(overlap, n):
    bench = Bench(overlap=overlap)
    bench.add("a", prompt(1, 12), max_tokens=20, eos=(), n=n, temperature=1.0, seed=1)
    bench.add("b", prompt(2, 12), max_tokens=20, eos=())
    bench.group.bad = lambda tokens: tokens[:12] == prompt(1, 12) and len(tokens) == 17
    bench.faults = True
    bench.run()
    for index in range(n):
        assert bench.ends["a", index].reason == "error" and bench.ends["a", index].error == BAD_LOGITS
        assert len(bench.tokens("a", index)) == 5
    assert bench.tokens("b") == bench.expected("b") and len(bench.tokens("b")) == 20


@pytest.mark.parametrize("overlap", [False, True])
def test_streams_say_every_token_once_and_names_are_kept_while_nobody_comes_or_goes(overlap):
    bench = Bench(overlap=overlap)
    for i in range(4):
        bench.add(f"r{i}", prompt(i, 5), max_tokens=12, eos=(), stream=i != 2)
    bench.run()
    bench.assert_reference()
    assert not bench.ends["r0", 0].token_ids and len(bench.ends["r2", 0].token_ids) == 12
    full = [out.streamed for out in bench.outputs if len(out.streamed) == 3]
    assert len(full) == 12 and all(names is full[0] for names in full)


STATES = ["waiting", "prefilling", "running", "swapped", "siblings", "never stepped"]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("state", STATES)
def test_abort_in_any_state(state, overlap):
    bench = Bench(blocks=10, host_blocks=20, rows=3, preemption_mode="swap", overlap=overlap, max_model_len=80, budget=16)
    bench.add("other", prompt(9, 9), max_tokens=60, eos=())
    bench.add("a", prompt(1, 35 if state == "prefilling" else 9), max_tokens=45, eos=(), temperature=1.0, seed=1,
              n=5 if state == "siblings" else 1)
    if state == "waiting":
        bench.add("b", prompt(2, 9), max_tokens=30, eos=())
        bench.add("c", prompt(3, 9), max_tokens=30, eos=())
    victim = "c" if state == "waiting" else "a"
    request = bench.state.requests[victim]

    def reached() -> bool:
        waiting = [s for s in request.sequences if s.row < 0]
        if state == "swapped":
            return any(s.host_blocks for s in waiting)
        return {"waiting": bool(waiting), "prefilling": bool(bench.state.prefilling), "siblings": len(waiting) > 0 < len(
            bench.state.prefilling) + 1 and request.spawned, "never stepped": True}.get(state, not waiting)

    for _ in range(60):
        if state == "never stepped" or (bench.group.step and reached()):
            break
        bench.step()
    assert reached()
    assert bench.engine.abort(victim) and not bench.engine.abort(victim) and not bench.engine.abort("unknown")
    bench.run()
    bench.assert_reference()
    ends = {index: end.reason for (name, index), end in bench.ends.items() if name == victim}
    assert ends == {i: "abort" for i in range(request.width)}
    assert bench.finished.count(victim) == 1 and bench.ends["other", 0].reason == "length"


@pytest.mark.parametrize("when", [0, 1, 4])
def test_one_continuation_is_aborted_and_its_siblings_go_on(when):
    bench = Bench(rows=2)
    bench.add("a", prompt(1, 20), n=4, temperature=1.0, seed=1, max_tokens=9, eos=())
    for _ in range(when):
        bench.step()
    assert bench.engine.abort("a", 0) and not bench.engine.abort("a", 0) and not bench.engine.abort("a", 9)
    bench.run()
    bench.assert_reference()
    assert {index: end.reason for (_, index), end in bench.ends.items()} == {0: "abort", 1: "length", 2: "length", 3: "length"}


def test_seeds_come_from_the_engine_in_order_and_the_request_id_never_enters():
    runs = []
    for names in (("a", "b"), ("x", "y")):
        bench = Bench(seed=11)
        for i, name in enumerate(names):
            bench.add(name, prompt(i, 9), temperature=1.0, max_tokens=9, eos=())
        bench.run()
        runs.append([bench.tokens(name) for name in names])
    assert runs[0] == runs[1]
    other = Bench(seed=12)
    other.add("a", prompt(0, 9), temperature=1.0, max_tokens=9, eos=())
    other.run()
    assert other.tokens("a") != runs[0][0]


def test_prompt_logprobs_that_were_sent_before_a_preemption_are_not_sent_again():
    bench = Bench(long_prefill_token_threshold=7, preemption_mode="recompute")
    bench.add("a", prompt(2, 40), max_tokens=3, prompt_logprobs=1)
    for _ in range(3):
        bench.step()
    assert 0 < len(bench.prompt_logprobs["a"]) < 39
    bench.engine._scheduler.preemption.preempt(bench.state.sequences[0])
    bench.run()
    tokens = bench.requests["a"].prompt_token_ids
    assert len(bench.prompt_logprobs["a"]) == 39
    for i, mark in enumerate(bench.prompt_logprobs["a"], 1):
        check_mark(mark, tokens[:i], tokens[i], 1)


@pytest.mark.parametrize("overlap", [False, True])
def test_prompt_logprobs_of_a_request_whose_first_continuation_is_aborted_do_not_read_the_cache(overlap):
    """The next one scores the prompt in its place; it began behind a cached prefix once, whose positions were never scored."""
    bench = Bench(blocks=10, host_blocks=20, budget=200, rows=1, max_model_len=72, overlap=overlap,
                  enable_chunked_prefill=False, scheduling_policy="priority")
    family = prompt(2, 29)
    bench.add("warm", family, max_tokens=1)
    bench.run()
    bench.add("a", family[:19], n=4, max_tokens=1, prompt_logprobs=1, priority=1)
    bench.engine.abort("a", 4)  # there is none, but all four wait from now on
    bench.add("first", prompt(3, 33), max_tokens=1, priority=-1)
    bench.step()
    bench.engine.abort("a", 0)
    bench.run()
    assert bench.started == {"warm": 0, "first": 0, "a": 0} and len(bench.prompt_logprobs["a"]) == 18
    bench.assert_reference()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 6])
@pytest.mark.parametrize("threshold", [0, 8])
@pytest.mark.parametrize("waiting", [False, True])
def test_prompt_logprobs_are_whole_whenever_continuations_are_aborted(overlap, rows, threshold, waiting):
    """Also with the step under way that computes the prompt's end for all, and with siblings that wait beside a chunk."""
    tokens = prompt(2, 21)
    for first in range(6):
        for second in range(first, 7):
            bench = Bench(rows=rows, overlap=overlap, long_prefill_token_threshold=threshold)
            bench.add("a", tokens, n=4, max_tokens=4, eos=(), temperature=1.0, seed=1, prompt_logprobs=1)
            if waiting:
                bench.engine.abort("a", 3)
            for step in range(8):
                if step == first:
                    bench.engine.abort("a", 0)
                if step == second:
                    bench.engine.abort("a", 1)
                if bench.engine.has_work():
                    bench.step()
            bench.run()
            bench.assert_reference()
            assert bench.ends["a", 2].reason == "length" and len(bench.prompt_logprobs["a"]) == 20
