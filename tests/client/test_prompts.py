"""Prompts: lengths that are true, seeds that hold, and files whose mistakes are named."""

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.client import prompts
from octavo.client.prompts import Ids, Texts, custom, random_prompts, repeated_prefixes, sharegpt, spread
from octavo.errors import ConfigError


async def words(texts: Sequence[str]) -> list[int]:
    """A tokenizer of words."""
    return [len(text.split()) for text in texts]


def test_lengths_are_spread_evenly_within_the_ratio() -> None:
    assert spread(3, 100, 10, 0.0, 0) == [(100, 10)] * 3
    found = spread(4000, 100, 10, 0.5, 1)
    assert {n for n, _ in found} == set(range(50, 151)) and {n for _, n in found} == set(range(5, 16))
    assert found == spread(4000, 100, 10, 0.5, 1) != spread(4000, 100, 10, 0.5, 2)
    assert min(spread(200, 1, 1, 0.9, 0)) == (1, 1)


@pytest.mark.parametrize(("values", "name"), [
    ((0, 1, 1, 0.0), "num_prompts"), ((1, 0, 1, 0.0), "random_input_len"), ((1, 1, 0, 0.0), "random_output_len"),
    ((1, 1, 1, 1.0), "random_range_ratio"), ((1, 1, 1, -0.1), "random_range_ratio"),
    ((1, 1, 1, float("nan")), "random_range_ratio"),
])
def test_bad_lengths_are_named(values: tuple[Any, ...], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        spread(*values, 0)


def test_prompts_of_ids() -> None:
    found = random_prompts(Ids(), [(5, 2), (7, 3)], 0, 4)
    assert [(len(a.prompt), a.num_prompt_tokens, a.num_output_tokens) for a in found] == [(9, 9, 2), (11, 11, 3)]
    assert found[0].prompt[:4] == found[1].prompt[:4] and found[0].prompt[4:9] != found[1].prompt[4:9]
    assert all(isinstance(token, int) and 1000 <= token < 10000 for a in found for token in a.prompt)
    assert found == random_prompts(Ids(), [(5, 2), (7, 3)], 0, 4)


@given(length=st.integers(1, 400), per_word=st.sampled_from([1.0, 1.25, 1.5, 2.0]), around=st.integers(0, 40))
def test_texts_have_the_length_that_was_measured(length: int, per_word: float, around: int) -> None:
    """On a server that counts like this one, a prompt is as long as asked for, if that is possible at all."""
    def server(count: int) -> int:
        return int(count * per_word) + around

    maker = Texts.measured((16, server(16)), (144, server(144)))
    prompt = random_prompts(maker, [(length, 1)], 3)[0].prompt
    assert isinstance(prompt, str)
    found = server(len(prompt.split()))
    assert abs(found - length) <= 3 or (found > length and len(prompt.split()) == 1)


def test_a_measurement_that_says_nothing_is_not_believed() -> None:
    assert Texts.measured((16, 50), (144, 50)) == Texts()


def test_words_are_told_apart() -> None:
    assert len(set(prompts.WORDS)) == len(prompts.WORDS) > 100
    a, b = random_prompts(Texts(), [(20, 1), (20, 1)], 0)
    assert a.prompt != b.prompt and len(str(a.prompt).split()) == 20


def test_repeated_prefixes() -> None:
    found = repeated_prefixes(Ids(), 12, 3, 8, 4, 2, 5)
    assert len({tuple(a.prompt[:8]) for a in found}) == 3 and len({tuple(a.prompt[8:]) for a in found}) == 12
    assert all(len(a.prompt) == 12 == a.num_prompt_tokens and a.num_output_tokens == 2 for a in found)
    assert [sum(a.prompt[:8] == b.prompt[:8] for b in found) for a in found] == [4] * 12
    with pytest.raises(ConfigError, match="num_prefixes"):
        repeated_prefixes(Ids(), 1, 0, 1, 1, 1, 0)


def test_a_custom_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "one two"}\n\n{"prompt": "three", "output_tokens": 4, "more": 1}\n')
    found = asyncio.run(custom(str(path), 9, None, words))
    assert [(a.prompt, a.num_prompt_tokens, a.num_output_tokens) for a in found] == [("one two", 2, 9), ("three", 1, 4)]
    assert len(asyncio.run(custom(str(path), 9, 1, words))) == 1
    with pytest.raises(ConfigError, match="1 to the 2 usable"):
        asyncio.run(custom(str(path), 9, 3, words))


@pytest.mark.parametrize("line", ['{"text": "a"}', '"a"', "{", '{"prompt": 1}', '{"prompt": ""}',
                                  '{"prompt": "a", "output_tokens": 0}', "[" * 5000])
def test_a_bad_line_of_a_custom_file_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(ConfigError, match="line 2"):
        asyncio.run(custom(str(path), 9, None, words))


def test_sharegpt(tmp_path: Path) -> None:
    """Pairs too short or too long are left out; the answer's length is the recorded one's unless it is given."""
    def entry(*values: Any) -> dict[str, Any]:
        return {"conversations": [{"from": "x", "value": value} for value in values]}

    text = "w " * 10
    path = tmp_path / "s.json"
    path.write_text(json.dumps([
        entry(text, "a b c d e"), entry("too short", text), entry(text, "short"), entry("w " * 1025, text), entry(text),
        entry("w " * 1000, "w " * 1049), entry(text, 5), {"conversations": None}, 7, entry("w " * 1000, "w " * 1048)]))
    found = asyncio.run(sharegpt(str(path), None, None, 0, words))
    assert sorted((a.num_prompt_tokens, a.num_output_tokens) for a in found) == [(10, 5), (1000, 1048)]
    given = asyncio.run(sharegpt(str(path), 6, None, 0, words))
    assert sorted(a.num_prompt_tokens for a in given) == [10, 10, 1000, 1000] and {a.num_output_tokens for a in given} == {6}
    assert len(asyncio.run(sharegpt(str(path), None, 1, random.randint(0, 9), words))) == 1


@pytest.mark.parametrize("text", ["{}", "nope", "", "[]"])
def test_a_file_that_is_no_sharegpt(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"s\.json"):
        asyncio.run(sharegpt(str(path), None, None, 0, words))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="dataset_path"):
        asyncio.run(custom("/no/such", 1, None, words))
