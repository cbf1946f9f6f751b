"""octavo.server.logprobs: names, order and numbers."""

import json
import math

import msgspec
from fake_service import tokenizer

from octavo.outputs import Logprob, PositionLogprobs
from octavo.server.logprobs import FLOOR, Offsets, TokenNames, likeliest, prompt_entries

POSITION: PositionLogprobs = {7: Logprob(-3.0, 9, "x"), 5: Logprob(-1.0, 2, "y"), 6: Logprob(-0.5, 1, "z"), 8: Logprob(-2.0, 3)}


def test_the_likeliest_in_order() -> None:
    assert [token for token, _ in likeliest(POSITION, 2)] == [6, 5]
    assert likeliest(POSITION, 0) == []


def test_a_logprob_of_minus_infinity_is_a_number() -> None:
    names = TokenNames(tokenizer(), as_ids=True)
    position = {5: Logprob(-math.inf, 1, "a")}
    for shape in (names.chat([position], [5], 1), names.completion([position], [5], 1, [0]), prompt_entries([position], [5], 1)):
        assert str(FLOOR) in json.dumps(json.loads(msgspec.json.encode(shape)))


def test_the_token_itself_is_among_the_entries() -> None:
    names = TokenNames(tokenizer(), as_ids=True)
    found = names.completion([None, POSITION], [3, 7], 1, [0, 1])
    assert found.top_logprobs == [None, {"token_id:7": -3.0, "token_id:6": -0.5}]
    assert found.token_logprobs == [None, -3.0] and found.tokens == ["token_id:3", "token_id:7"]
    assert prompt_entries([None, POSITION], [3, 7], 1)[1].keys() == {"7", "6"}
    chat = names.chat([POSITION], [7], 2).content[0]
    assert chat.token == "token_id:7" and [top.token for top in chat.top_logprobs] == ["token_id:6", "token_id:5"]
    assert bytes(chat.bytes) == tokenizer().token_bytes(7)


def test_of_tokens_with_one_name_the_generated_one_counts() -> None:
    halves = [token for token in range(256) if tokenizer().token_text(token) == "\ufffd"][:2]
    position = {halves[0]: Logprob(-2.0, 2), halves[1]: Logprob(-1.0, 1)}
    names = TokenNames(tokenizer(), as_ids=False)
    assert names.completion([position], [halves[0]], 1, [0]).top_logprobs == [{"\ufffd": -2.0}]


def test_offsets() -> None:
    ids = tokenizer().encode("a\U0001f916b", add_special_tokens=False)
    found = Offsets(tokenizer().stream(True, True), 10)
    assert found.take(ids[:2]) + found.take(ids[2:]) == [10, *[11] * (len(ids) - 2), 12]
    assert Offsets(tokenizer().stream(True, True), -1).take(ids[:2]) == [0, 0]
