"""Policies and the waiting queue."""

import pytest
from fakes import Bench

from octavo.engine.policy import SJF_TOKENS_PER_SECOND, FirstCome, Priority, ShortestFirst, WaitingQueue
from octavo.engine.request import Request, Sequence, Status
from octavo.messages import EngineRequest
from octavo.params import SamplingParams


def make(number: int, *, length: int = 4, priority: int = 0, arrival: float = 0.0, index: int = 0) -> Sequence:
    source = EngineRequest(request_id=str(number), prompt_token_ids=[5] * length, params=SamplingParams(), priority=priority)
    return Sequence(Request(source, number, 0, length + 16, b"", arrival), index)


def order(policy, sequences: list[Sequence]) -> list[tuple[int, int]]:
    queue = WaitingQueue(policy)
    for sequence in sequences:
        queue.push(sequence)
    return [((s := queue.pop()).request.number, s.index) for _ in sequences]


def test_fcfs_is_by_arrival_and_index():
    assert order(FirstCome(), [make(2), make(0, index=1), make(1, priority=-5), make(0)]) == [(0, 0), (0, 1), (1, 0), (2, 0)]


def test_priority_lower_is_sooner_ties_by_arrival():
    assert order(Priority(), [make(0, priority=1), make(1, priority=-1), make(2, priority=-1), make(3)]) == [
        (1, 0), (2, 0), (3, 0), (0, 0)]
    assert Priority().rank(make(0, priority=1)) > Priority().rank(make(9, priority=0))


def test_sjf_is_by_length_until_waiting_outweighs_it():
    second = SJF_TOKENS_PER_SECOND
    assert order(ShortestFirst(), [make(0, length=300), make(1, length=20)]) == [(1, 0), (0, 0)]
    late = make(1, length=20, arrival=281 / second)
    assert order(ShortestFirst(), [make(0, length=300), late]) == [(0, 0), (1, 0)]
    earlier = make(1, length=20, arrival=279 / second)
    assert order(ShortestFirst(), [make(0, length=300), earlier]) == [(1, 0), (0, 0)]


def test_sjf_lets_those_that_have_run_go_ahead():
    old = make(1, length=500)
    old.request.started = True
    assert order(ShortestFirst(), [make(0, length=3), old]) == [(1, 0), (0, 0)]
    assert ShortestFirst().rank(make(0, length=500)) < ShortestFirst().rank(make(1, length=3))


def test_ended_sequences_leave_the_queue():
    queue = WaitingQueue(FirstCome())
    sequences = [make(i) for i in range(100)]
    for sequence in sequences:
        queue.push(sequence)
    for sequence in sequences[:99]:
        sequence.status = Status.ENDED
        queue.removed()
    assert len(queue) == 1 and list(queue) == [sequences[99]]
    assert len(queue._heap) < 50  # dead entries do not pile up
    assert queue.head() is sequences[99] and queue.pop() is sequences[99]
    assert queue.head() is None and len(queue) == 0


@pytest.mark.parametrize(("policy", "expected"), [
    ("fcfs", ["first", "long", "short", "urgent"]), ("priority", ["first", "urgent", "long", "short"]),
    ("sjf", ["first", "short", "urgent", "long"])])
def test_the_engine_admits_in_the_order_of_the_policy(policy, expected):
    bench = Bench(rows=1, scheduling_policy=policy, clock=lambda: 1.0)
    urgent = -1 if policy == "priority" else 0
    bench.add("first", [9] * 3, max_tokens=3, eos=())
    bench.step()
    bench.add("long", [5] * 60, max_tokens=2, eos=())
    bench.add("short", [6] * 2, max_tokens=2, eos=())
    bench.add("urgent", [7] * 30, max_tokens=2, priority=urgent, eos=())
    bench.run()
    assert list(bench.started) == expected


def test_nobody_starves_under_sjf():
    now = [0.0]
    bench = Bench(rows=1, scheduling_policy="sjf", clock=lambda: now[0])
    bench.add("long", [5] * 200, max_tokens=1)
    for i in range(400):
        if "long" in bench.started:
            break
        bench.add(f"s{i}", [6 + i % 30] * 3, max_tokens=1)
        bench.add(f"t{i}", [6 + i % 30] * 4, max_tokens=1)
        bench.step()
        now[0] += 0.01
    assert "long" in bench.started and i > 50
    bench.run()
