"""Throughput: the time of the whole workload, warm-up left out."""

from typing import Any

from octavo.bench.throughput import Throughput, measure
from octavo.bench.workload import Workload
from octavo.outputs import CompletionOutput, RequestOutput


class Engine:
    """Takes 2 s for whatever it is given."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, []

    def clock(self) -> float:
        return self.now

    def generate(self, prompts: Any, sampling_params: Any = None, use_tqdm: bool = True) -> list[RequestOutput]:
        self.now += 2.0
        self.calls.append((prompts, sampling_params))
        return [RequestOutput(str(i), None, [], outputs=[CompletionOutput(0, "", [1] * p.max_tokens)])
                for i, p in enumerate(sampling_params)]


WORK = Workload("mix", ((3, 10), (7, 30)))


def test_figures() -> None:
    engine = Engine()
    found = measure(engine, WORK, 50, temperature=0.5, clock=engine.clock)
    assert {name: value for name, (value, _) in found.figures().items()} == {
        "t0.5/output_tok_s": 20.0, "t0.5/total_tok_s": 25.0, "t0.5/request_s": 1.0, "t0.5/elapsed_s": 2.0}
    assert len(engine.calls) == 2 and len(engine.calls[0][0]) == 1
    assert [p.temperature for p in engine.calls[1][1]] == [0.5, 0.5]


def test_the_name_of_a_temperature() -> None:
    assert "t0/output_tok_s" in Throughput(WORK, 0.0, 1.0).figures()
    assert "t1/output_tok_s" in Throughput(WORK, 1.0, 1.0).figures()
