"""Workloads: lengths files, random prompts, and the check that an engine did what it was asked."""

import json
from pathlib import Path
from typing import Any

import pytest

from octavo.bench.workload import Workload, random_prompts, read_lengths, run, uniform
from octavo.errors import ConfigError, OctavoError
from octavo.outputs import CompletionOutput, RequestOutput

WORKLOADS = Path(__file__).resolve().parents[2] / "benchmarks" / "workloads"


class Short:
    """An engine that gives ``less`` tokens fewer than asked, or an error."""

    def __init__(self, less: int = 0, error: str | None = None) -> None:
        self.less, self.error = less, error

    def generate(self, prompts: Any, sampling_params: Any = None, use_tqdm: bool = True) -> list[RequestOutput]:
        return [RequestOutput(str(i), None, p["prompt_token_ids"], error=self.error, finished=True,
                              outputs=[CompletionOutput(0, "", [1] * (params.max_tokens - self.less))])
                for i, (p, params) in enumerate(zip(prompts, sampling_params, strict=True))]


def test_uniform() -> None:
    assert uniform(1, 8, 4) == Workload("single_8_4", ((8, 4),))
    three = uniform(3, 8, 4)
    assert (three.name, three.num_prompt_tokens, three.num_output_tokens) == ("batch3_8_4", 24, 12)


@pytest.mark.parametrize("values", [(0, 1, 1), (1, 0, 1), (1, 1, -1)])
def test_uniform_refuses(values: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        uniform(*values)


@pytest.mark.parametrize(("name", "requests", "prompt", "output"), [
    ("sharegpt_like", 1000, 223_729, 197_977), ("nano", 256, 142_827, 133_966)])
def test_the_workloads_of_the_repository(name: str, requests: int, prompt: int, output: int) -> None:
    found = read_lengths(str(WORKLOADS / f"{name}.json"))
    assert (found.name, len(found.lengths)) == (name, requests)
    assert (found.num_prompt_tokens, found.num_output_tokens) == (prompt, output)


@pytest.mark.parametrize("content", [
    "", "{}", "[]", "[1]", "[[1]]", "[[1, 2, 3]]", "[[0, 1]]", "[[1, -1]]", "[[1, 1.5]]", "[[true, 1]]", '[["1", 2]]'])
def test_a_bad_lengths_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"bad\.json") as caught:
        read_lengths(str(path))
    assert caught.value.param == "lengths"


def test_more_prompts_than_lengths_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    path.write_text(json.dumps([[1, 1], [2, 2]]))
    assert read_lengths(str(path), 1).lengths == ((1, 1),)
    for number in (0, 3, -1):
        with pytest.raises(ConfigError, match=f"got {number}"):
            read_lengths(str(path), number)


def test_random_prompts_repeat_with_their_seed() -> None:
    first, again, other = (random_prompts([3, 50], 10, seed) for seed in (1, 1, 2))
    assert first == again != other
    assert [len(ids) for ids in first] == [3, 50] and all(type(i) is int and 0 <= i < 10 for ids in first for i in ids)


def test_run_accepts_exactly_what_was_asked() -> None:
    run(Short(), [[1], [2, 3]], [4, 5], 0.0, False)
    for engine in (Short(less=1), Short(error="out of memory")):
        with pytest.raises(OctavoError, match="of 4 tokens"):
            run(engine, [[1], [2, 3]], [4, 5], 0.0, False)
