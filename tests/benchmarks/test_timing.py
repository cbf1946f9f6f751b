"""The timing that the kernel benchmarks share, on stand-ins for CUDA's graphs and events; and that the scripts use it."""

import importlib
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Milliseconds that the next replays take; a replay beyond them takes 1."""
    took: list[float] = []
    clock = [0.0]

    class Graph:
        def replay(self) -> None:
            clock[0] += took.pop(0) if took else 1.0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: "Event") -> float:
            return end.at - self.at

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", nullcontext)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return took


def test_a_figure_is_the_median_replay_over_its_calls(replays: list[float]) -> None:
    from timing import seconds

    ran: list[int] = []
    replays += [99.0, 4.0, 8.0, 500.0]  # the first warms up
    assert seconds([lambda: ran.append(1)] * 4, 3) == pytest.approx(0.008 / 4)
    assert len(ran) == 2 + 4  # two before the capture, all of them in it


@pytest.mark.parametrize("name", sorted(path.stem for path in SCRIPTS.glob("kernels_*.py")))
def test_every_kernel_benchmark_measures_with_it(replays: list[float], name: str) -> None:
    assert importlib.import_module(name).seconds is importlib.import_module("timing").seconds
