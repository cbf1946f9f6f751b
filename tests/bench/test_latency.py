"""Latency: what counts, and the arithmetic of the figures, with a clock and an engine of our own."""

from typing import Any

import pytest

from octavo.bench.latency import Latency, measure
from octavo.bench.workload import uniform
from octavo.errors import ConfigError
from octavo.outputs import CompletionOutput, RequestOutput


class Engine:
    """Takes 1 s for the prompts and 0.1 s for every further token; the first call takes 100 s more."""

    def __init__(self) -> None:
        self.now, self.prompts = 0.0, []

    def clock(self) -> float:
        return self.now

    def generate(self, prompts: Any, sampling_params: Any = None, use_tqdm: bool = True) -> list[RequestOutput]:
        self.now += 1.0 + 0.1 * (sampling_params[0].max_tokens - 1) + (0 if self.prompts else 100)
        self.prompts.append(prompts)
        return [RequestOutput(str(i), None, [], outputs=[CompletionOutput(0, "", [1] * p.max_tokens)])
                for i, p in enumerate(sampling_params)]


def test_figures() -> None:
    engine = Engine()
    found = measure(engine, uniform(4, 8, 11), 50, num_iters_warmup=1, num_iters=3, clock=engine.clock)
    figures = {name: round(value, 6) for name, (value, _) in found.figures().items()}
    seconds = {"mean_s": 2.0, "median_s": 2.0, "p90_s": 2.0, "ttft_s": 1.0}
    assert figures == {**seconds, "decode_tok_s": 40.0, "tpot_ms": 100.0}


def test_no_prompt_comes_twice() -> None:
    engine = Engine()
    measure(engine, uniform(2, 8, 2), 50, num_iters_warmup=2, num_iters=2, clock=engine.clock)
    flat = [tuple(p["prompt_token_ids"]) for prompts in engine.prompts for p in prompts]
    assert len(flat) == len(set(flat)) == 2 * (2 + 2 + 2)


def test_one_token_is_its_own_first() -> None:
    engine = Engine()
    found = measure(engine, uniform(1, 8, 1), 50, num_iters_warmup=1, num_iters=2, clock=engine.clock)
    assert found.seconds == found.first_token and found.decode_rate == 0.0
    assert "decode_tok_s" not in found.figures() and len(engine.prompts) == 3


def test_noise_gives_no_figure_rather_than_a_wrong_one() -> None:
    assert Latency(uniform(1, 8, 4), (1.0,), (1.5,)).decode_rate == 0.0


@pytest.mark.parametrize(("values", "name"), [({"num_iters_warmup": -1, "num_iters": 1}, "num_iters_warmup"),
                                              ({"num_iters_warmup": 0, "num_iters": 0}, "num_iters")])
def test_refusals(values: dict[str, int], name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        measure(Engine(), uniform(1, 1, 1), 50, **values)
    assert caught.value.param == name
