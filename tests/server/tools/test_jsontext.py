"""Streaming JSON: the same verdict as json.loads, in any pieces."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.server.tools.jsontext import MAX_DEPTH, CallObject, JsonValue, Status, is_json, is_number

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=20)


def verdict(pieces) -> tuple[Status, int]:
    value, taken = JsonValue(), 0
    for piece in pieces:
        if value.status is Status.MORE:
            end = value.feed(piece, 0)
            taken += end
            if end < len(piece):
                break
    return value.status, taken


@settings(max_examples=300, deadline=None)
@given(VALUES, st.booleans(), st.sampled_from([None, 1]))
def test_valid_values(value, ascii_only, indent):
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    assert verdict([text + " x"]) == verdict(text + " x") == (Status.DONE, len(text))


@settings(max_examples=800, deadline=None)
@given(st.text(alphabet='{}[]:,"\\ \nutrefalsn0123456789.-+eE\x01\u00e9', max_size=14))
def test_the_verdict_is_that_of_json(text):
    try:
        json.loads(text)
        good = True
    except ValueError:
        good = False
    status, taken = verdict([text + "\n"])
    assert good == (status is Status.DONE and not text[taken:].strip(" \t\r\n"))
    assert verdict(text + "\n") == (status, taken)


@pytest.mark.parametrize("text", ["01", "-", "1.", "1e", "+1", ".5", "1.2.3", "1" * 5000, "nul ", "True", "'a'", '"\n"', '"\\x"',
                                  '"\\u12g4"', "[1,]", '{"a":1,}', "{a:1}", "[" * (MAX_DEPTH + 1), "NaN", "-Infinity"])
def test_bad_values(text):
    assert verdict([text + " "])[0] is verdict(text + " ")[0] is Status.BAD


def test_depth_is_bounded():
    text = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert verdict([text]) == (Status.DONE, len(text))


def test_whole_texts():
    assert is_json('{"a": 1}', "{") and not is_json('{"a": 1} ', "{") and not is_json("[1]", "{") and not is_json("", "{")
    assert is_number("-1.5e3") and not is_number("1 ") and not is_number("")


def test_without_a_mark_only_the_keys_of_a_call_go():
    one = CallObject(implied=False)
    assert one.feed('{"colour": 1}', 0) == len('{"colour"') and one.status is Status.BAD
    one = CallObject(implied=True)
    text = '{"colour": [1, {}], "name": "f", "arguments": {}}'
    assert one.feed(text, 0) == len(text) and one.status is Status.DONE and one.complete and one.name == "f"
