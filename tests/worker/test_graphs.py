"""Which sizes are captured, and that a replay is the function that was recorded under its key and size."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.worker.graphs import FINEST, MIXED_SIZES, GraphPool, sizes


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (1, (1,)), (2, (1, 2)), (7, (1, 2, 3, 4, 5, 6, 7)), (8, (1, 2, 3, 4, 5, 6, 7, 8)), (9, (1, 2, 3, 4, 5, 6, 7, 8, 9)),
        (24, (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24)), (33, (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32, 33)),
    ],
)  # fmt: skip
def test_small_sizes(most, expected):
    assert sizes(most) == expected


@given(most=st.integers(1, 5000))
def test_a_step_of_any_size_is_padded_by_a_quarter_at_most(most):
    found = sizes(most)
    assert found[0] == 1 and found[-1] == most and list(found) == sorted(set(found))
    smallest = [a + 1 for a in (0, *found[:-1])]  # the least that is padded to each size
    assert all(size - wanted <= size / 4 for wanted, size in zip(smallest, found, strict=True))
    assert all(size - wanted < FINEST for wanted, size in zip(smallest, found, strict=True) if size > 128)
    assert len(found) <= 53 or most > 1024


def test_mixed_sizes_ascend_to_what_prompts_may_take_beside_others():
    assert sorted(set(MIXED_SIZES)) == list(MIXED_SIZES) and MIXED_SIZES[-1] == 512


class PlainGraph:
    """What torch records between begin and end, where a kernel is a call of ``launch``."""

    recording = None

    def __init__(self):
        self.kernels, self.ended = [], False

    def capture_begin(self, pool, capture_error_mode):
        assert PlainGraph.recording is None
        self.pool, self.mode = pool, capture_error_mode
        PlainGraph.recording = self

    def capture_end(self):
        assert PlainGraph.recording is self
        PlainGraph.recording, self.ended = None, True

    def replay(self):
        assert self.ended
        for kernel in self.kernels:
            kernel()


@pytest.fixture
def made(monkeypatch):
    """The graphs that were made, by a torch whose graphs are PlainGraphs."""
    made = []

    def make():
        made.append(PlainGraph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr(PlainGraph, "recording", None)
    return made


def test_a_replay_runs_what_was_recorded_and_nothing_of_python(made):
    pool, calls, ran = GraphPool(), [], []

    def step(name, size):
        calls.append((name, size))
        PlainGraph.recording.kernels.append(lambda: ran.append((name, size)))

    for name in ("decode", "all"):
        for size in (1, 4):
            pool.capture(name, size, lambda size, name=name: step(name, size))
    assert len(pool) == 4 and len(calls) == 4 and ran == []
    assert {graph.pool for graph in made} == {"the pool"}  # they never run at the same time: their memory is shared
    assert {graph.mode for graph in made} == {"thread_local"}  # the thread that pins host memory is not in the way
    pool.replay("all", 4)
    pool.replay("decode", 1)
    assert ran == [("all", 4), ("decode", 1)] and len(calls) == 4


def test_a_capture_that_fails_is_ended_and_forgotten(made):
    pool = GraphPool()

    def fails(size):
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        pool.capture("decode", 2, fails)
    assert len(pool) == 0 and made[0].ended and PlainGraph.recording is None
    with pytest.raises(KeyError):
        pool.replay("decode", 2)
