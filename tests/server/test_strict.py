"""Strict JSON: every kind of body that is not simply right, and the promise for all others: a request or a RequestError, soon."""

import json
import time
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.errors import RequestError
from octavo.server.strict import MAX_CONTAINERS, decode, measure


class Message(msgspec.Struct):
    role: Literal["user", "assistant"]
    content: str | None = None


class Options(msgspec.Struct, forbid_unknown_fields=True):
    usage: bool = False


class Body(msgspec.Struct, forbid_unknown_fields=True):
    prompt: str | list[int]
    n: Annotated[int, msgspec.Meta(ge=1)] = 1
    temperature: float = 1.0
    stream: bool = False
    bias: dict[int, float] = {}
    messages: list[Message] = []
    options: Options | None = None
    extra: Any = None

    def __post_init__(self) -> None:
        if self.prompt == "refuse me":
            raise RequestError("this prompt is refused", "prompt", "some_code")


def read(body: bytes) -> Body:
    return decode(body, Body)


def refusal(body: bytes) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read(body)
    assert len(str(caught.value)) <= 600
    return caught.value


def test_a_right_body() -> None:
    request = read(b' {"prompt":"h\xc3\xa9\\ud83d\\ude00","n":2,"temperature":1,"bias":{"5":-1},'
                   b'"messages":[{"role":"user","name":"x"}]}\n')
    assert request.prompt == "h\xe9\U0001f600" and request.n == 2 and request.temperature == 1.0 and request.bias == {5: -1.0}


def test_null_counts_as_absent() -> None:
    body = b'{"prompt":"a","n":null,"bias":null,"options":null,"unknown":null, "extra": null }'
    assert read(body) == read(b'{"prompt":"a"}')


def test_of_members_with_one_name_the_last_counts_on_both_paths() -> None:
    assert read(b'{"prompt":"a","prompt":"b"}').prompt == read(b'{"prompt":"a","n":null,"prompt":"b"}').prompt == "b"


def test_an_escaped_nul_is_a_character() -> None:
    assert read(b'{"prompt":"a\\u0000b"}').prompt == "a\0b"


BAD_JSON = {
    "empty": b"", "blank": b" \n", "cut": b'{"prompt":"a"', "behind": b'{"prompt":"a"} x', "NUL behind": b'{"prompt":"a"}\0',
    "single quotes": b"{'prompt':'a'}",
    "comma": b'{"prompt":"a",}',
    "comment": b'{"prompt":"a"/**/}',
    "byte order mark": b'\xef\xbb\xbf{"prompt":"a"}',
    "UTF-16": '{"prompt":"a"}'.encode("utf-16"),
    "invalid UTF-8": b'{"prompt":"\xff\xfe"}',
    "UTF-8 surrogate": b'{"prompt":"\xed\xa0\x80"}',
    "overlong UTF-8": b'{"prompt":"\xc0\xaf"}',
    "invalid UTF-8 in a key": b'{"prompt":"a","\xff":1}',
    "invalid UTF-8 in what is null elsewhere": b'{"prompt":"a","n":null,"extra":"\xff"}',
    "lone surrogate": b'{"prompt":"\\ud800"}',
    "low surrogate": b'{"prompt":"\\udc00 b"}',
    "surrogate in a key": b'{"prompt":"a","extra":{"\\ud800":1}}',
    "control character": b'{"prompt":"a\nb"}',
    "NUL in a string": b'{"prompt":"a\0b"}',
    "bad escape": b'{"prompt":"\\x41"}',
    "NaN": b'{"prompt":"a","temperature":NaN}',
    "Infinity": b'{"prompt":"a","temperature":-Infinity}',
    "leading zero": b'{"prompt":"a","n":01}',
    "plus": b'{"prompt":"a","n":+1}',
    "hex": b'{"prompt":"a","n":0x1}',
    "bare point": b'{"prompt":"a","temperature":1.}', "True": b'{"prompt":"a","stream":True}',
}


@pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON.keys())
def test_what_is_no_json(body: bytes) -> None:
    error = refusal(body)
    assert error.param is None and error.code is None and str(error).startswith("The body")


WRONG = {
    "array": (b"[1]", None, "must be a JSON object, not array"),
    "string": (b'"x"', None, "not string"),
    "number": (b"1", None, "not integer"),
    "null": (b"null", None, "not null"), "true": (b"true", None, "not boolean"),
    "missing": (b"{}", "prompt", "prompt is required."),
    "null and required": (b'{"prompt":null}', "prompt", "prompt is required."),
    "missing inside": (b'{"prompt":"a","messages":[{}]}', "messages[0].role", "messages[0].role is required."),
    "boolean as integer": (b'{"prompt":"a","n":true}', "n", "n: expected integer, got boolean."),
    "float as integer": (b'{"prompt":"a","n":1.0}', "n", "n: expected integer, got number."),
    "string as integer": (b'{"prompt":"a","n":"1"}', "n", "got string"),
    "integer as boolean": (b'{"prompt":"a","stream":1}', "stream", "boolean"),
    "string as number": (b'{"prompt":"a","temperature":"nan"}', "temperature", "expected number, got string"),
    "boolean among ids": (b'{"prompt":[1,true]}', "prompt[1]", "got boolean"),
    "string among ids": (b'{"prompt":[1,"a"]}', "prompt[1]", "got string"),
    "float among ids": (b'{"prompt":[1,2.0]}', "prompt[1]", "got number"),
    "object": (b'{"prompt":{}}', "prompt", "expected string or array, got object"),
    "too small": (b'{"prompt":"a","n":0}', "n", "n: expected integer >= 1."),
    "overflow": (b'{"prompt":"a","temperature":1e999}', "temperature", "out of range"),
    "overflow anywhere": (b'{"prompt":"a","extra":{"a":[-1e999]}}', "extra", "out of range"),
    "5000 digits": (b'{"prompt":"a","n":' + b"1" * 5000 + b"}", "n", "out of range"),
    "5000 digits as a float": (b'{"prompt":"a","temperature":' + b"1" * 5000 + b"}", "temperature", "out of range"),
    "key that is no number": (b'{"prompt":"a","bias":{"x":1}}', "bias", "expected integer, got string"),
    "value of a key": (b'{"prompt":"a","bias":{"5":"x"}}', "bias[...]", "expected number"),
    "role": (b'{"prompt":"a","messages":[{"role":"root"}]}', "messages[0].role", "'root'"),
    "unknown": (b'{"prompt":"a","temprature":1}', "temprature", "Did you mean temperature?"),
    "unknown inside": (b'{"prompt":"a","options":{"usge":true}}', "options.usge", "options.usge is not a field"),
    "refused by the type": (b'{"prompt":"refuse me"}', "prompt", "this prompt is refused"),
    "refused by the type, with care": (b'{"prompt":"refuse me","n":null}', "prompt", "this prompt is refused"),
}


@pytest.mark.parametrize(("body", "param", "says"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_named(body: bytes, param: str | None, says: str) -> None:
    error = refusal(body)
    assert says in str(error)
    assert error.param == param or (param == "extra" and (error.param or "").startswith("extra"))
    codes = {"is not a field": "unsupported_field", "is refused": "some_code"}
    assert error.code == next((code for text, code in codes.items() if text in str(error)), None)


def test_little_of_the_input_is_repeated() -> None:
    long = b"q" * 100_000
    for body in (b'{"prompt":"a","' + long + b'":1}', b'{"prompt":"a","messages":[{"role":"' + long + b'"}]}',
                 b'{"prompt":"a","options":{"' + long + b'":1}}'):
        error = refusal(body)
        assert str(error).count("q") <= 210 and (error.param or "").count("q") <= 200


def nested(depth: int) -> bytes:
    return b'{"prompt":"a","extra":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"


def test_depth_is_limited_exactly_and_brackets_in_strings_do_not_count() -> None:
    assert read(nested(128)).prompt == "a"
    for depth in (129, 500, 5000, 100_000):
        assert "deeper than 128" in str(refusal(nested(depth)))
        assert "deeper than 128" in str(refusal(nested(depth).replace(b'"prompt"', b'"n":null,"prompt"')))
    brackets = json.dumps("[{" * 1000 + '\\"[' * 200 + "\\").encode()
    assert read(b'{"prompt":' + brackets + b',"extra":[' + b"[]," * 500 + b"{}]}").prompt == json.loads(brackets)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('[]{}"\\ab', max_size=6), inner, max_size=4),
    max_leaves=30)
any_bytes = st.binary(max_size=200) | st.text(max_size=200).map(str.encode)


def depth_of(value: Any) -> int:
    if isinstance(value, list | dict):
        return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)
    return 0


def containers_of(value: Any) -> int:
    if isinstance(value, list | dict):
        return 1 + sum(map(containers_of, value.values() if isinstance(value, dict) else value))
    return 0


@given(json_values, st.sampled_from([(",", ":"), (", ", ": ")]))
def test_measuring_agrees_with_counting(value: Any, separators: tuple[str, str]) -> None:
    body = json.dumps([value], separators=separators).encode()
    assert measure(body, 10_000) == (depth_of([value]), containers_of([value]))


def test_measuring_agrees_across_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    body = json.dumps([["a\"[", {"]": ["\\", {}]}], "[[[["]).encode()
    for block in range(1, len(body) + 1):
        monkeypatch.setattr("octavo.server.strict.BLOCK", block)
        assert measure(body, 128) == (5, 5)


BIG = {
    "opening brackets": b"[" * (32 << 20), "brackets in a field": b'{"prompt":"a","extra":' + b"[" * (32 << 20),
    "empty lists": b'{"prompt":"a","extra":[' + b"[]," * (8 << 20) + b"[]]}",
    "quotes": b'"' * (32 << 20),
    "junk": b"x" * (32 << 20),
    "digits": b'{"prompt":"a","n":' + b"1" * (32 << 20) + b"}", "name": b'{"' + b"a" * (32 << 20) + b'":1}',
}


@pytest.mark.parametrize("name", BIG)
def test_the_largest_bodies_are_refused_soon(name: str) -> None:
    """200 ms is what is promised, four times as much what a busy machine may take."""
    start = time.process_time()
    refusal(BIG[name])
    assert time.process_time() - start < 0.8


def test_the_number_of_containers_is_limited() -> None:
    assert "arrays and objects" in str(refusal(b'{"prompt":"a","extra":[' + b"[]," * MAX_CONTAINERS + b"[]]}"))
    assert read(b'{"prompt":"' + b"[" * (MAX_CONTAINERS + 9) + b'"}')


def promise(body: bytes) -> Body | None:
    start = time.process_time()
    try:
        found = read(body)
    except RequestError as error:
        assert 0 < len(str(error).encode()) <= 2000
        found = None
    assert time.process_time() - start < 0.5  # 50 ms are promised; the process has other threads
    return found


@settings(max_examples=300, deadline=None)
@given(any_bytes | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_give_a_request_or_a_typed_error(body: bytes) -> None:
    assert promise(body) is None or b"prompt" in body


fields = st.sampled_from(["prompt", "n", "temperature", "stream", "bias", "messages", "options", "extra", "other"])


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(fields, json_values | st.just([{"role": "user"}]) | st.just("x") | st.just([1, 2]), max_size=5))
def test_any_values_of_known_fields_too_and_both_paths_agree(members: dict[str, Any]) -> None:
    found = promise(json.dumps(members).encode())
    again = promise(json.dumps(members | {"unknown": None}).encode())  # a null forces the second look
    assert found == again
    if found is not None:
        assert found.n == (members.get("n") or 1) and members.get("other") is None


class Loose(msgspec.Struct):
    prompt: str


class Holder(msgspec.Struct, forbid_unknown_fields=True):
    schema: msgspec.Raw = msgspec.Raw(b"null")


def test_raw_json_inside_is_valid_utf_8_too() -> None:
    assert bytes(decode('{"schema":"é"}'.encode(), Holder).schema) == '"é"'.encode()
    with pytest.raises(RequestError, match="UTF-8"):
        decode(b'{"schema":"\xff"}', Holder)


class Nullable(msgspec.Struct, forbid_unknown_fields=True):
    n: int | None = 5


class Needed(msgspec.Struct, forbid_unknown_fields=True):
    n: Any


@pytest.mark.parametrize("kind", [Loose, Nullable, Needed])
def test_types_whose_null_would_not_be_absent_are_refused(kind: type[msgspec.Struct]) -> None:
    with pytest.raises(TypeError):
        decode(b"{}", kind)
