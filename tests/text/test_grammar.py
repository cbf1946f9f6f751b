"""Grammars: every kind is followed to the letter, and nothing that a client sends hangs, harms or surprises.

A walk takes allowed tokens at random, structural ones more often so that it comes to an end: what it writes must satisfy
whoever defined the constraint (jsonschema, re), not merely the compiler.
"""

import json
import random
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import numpy as np
import pytest

from octavo.errors import RequestError
from octavo.messages import Grammar
from octavo.params import StructuredOutputsParams
from octavo.text import grammar as module
from octavo.text.grammar import check
from octavo.text.matcher import Matcher, compile_grammar
from octavo.text.schema import FORMATS, Limits
from octavo.text.vocabulary import Tokenizer

PERSON = {
    "type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
    "required": ["name", "age"], "additionalProperties": False}


def grammar(tokenizer: Tokenizer, **params: Any) -> Grammar:
    return check(StructuredOutputsParams(**params), tokenizer, "structured_outputs")


def allowed(matcher: Matcher, tokenizer: Tokenizer, output: Sequence[int]) -> list[int]:
    words = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
    assert matcher(np.array(output, np.int32), words), matcher.error
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


def walk(tokenizer: Tokenizer, text: str, seed: int = 0, steps: int = 600) -> str | None:
    """A text that random allowed tokens make; None when the walk has not come to an end."""
    rng, pieces, output = random.Random(seed), tokenizer.pieces(), list[int]()
    matcher = compile_grammar(text, tokenizer, tokenizer.eos_token_ids)
    assert not matcher.error
    for step in range(steps):
        choices = allowed(matcher, tokenizer, output)
        if tokenizer.eos_token_id in choices and (len(choices) == len(tokenizer.eos_token_ids) or rng.random() < 0.5):
            return b"".join(pieces[token] for token in output).decode()
        choices = [token for token in choices if token not in tokenizer.eos_token_ids]
        ends = [token for token in choices if pieces[token][:1] in (b'"', b"}", b"]", b",", b":")]
        output.append(rng.choice(ends if ends and rng.random() < 0.3 + step / steps else choices))
    return None


@pytest.fixture(params=["byte_level", "spaces"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Tokenizer) and found.eos_token_ids
    return found


def test_json_schema(tokenizer: Tokenizer) -> None:
    for source in (PERSON, json.dumps(PERSON)):
        made = grammar(tokenizer, json=source)
        assert made.kind == "json"
        for seed in range(5):
            text = walk(tokenizer, made.text, seed)
            assert text is not None
            jsonschema.validate(json.loads(text), PERSON)


def test_any_json_object(tokenizer: Tokenizer) -> None:
    made = grammar(tokenizer, json_object=True)
    found = [walk(tokenizer, made.text, seed) for seed in range(8)]
    ended = [text for text in found if text is not None]
    assert len(ended) > 4 and all(isinstance(json.loads(text), dict) for text in ended)


def test_regex(tokenizer: Tokenizer) -> None:
    for regex in (r"\d{3}-[a-f]+/x", r"(ab|cd){2,3}", "a\nb c", r"[^\s\"]{1,4}\\"):
        text = walk(tokenizer, grammar(tokenizer, regex=regex).text, 1)
        assert text is not None and re.fullmatch(regex, text), (regex, text)


def test_digits_are_ascii(byte_level: Tokenizer) -> None:
    made = grammar(byte_level, regex=r"\d{9}")
    for seed in range(5):
        assert re.fullmatch("[0-9]{9}", walk(byte_level, made.text, seed) or "")


def test_choice(tokenizer: Tokenizer) -> None:
    words = ["red", "reddish", 'a"b\\/', "new\nline\t", "日本 é😀", "a.*b", "{}", "%json", "</s>", "\x01\x7f"]
    made = grammar(tokenizer, choice=words)
    assert {walk(tokenizer, made.text, seed) for seed in range(150)} == set(words)


def test_lark_and_gbnf(byte_level: Tokenizer) -> None:
    for text in (
        'start: "yes" | "no" AGAIN?\nAGAIN: /!{1,3}/',
        '%llguidance {"allow_invalid_utf8": false}\nstart: "yes" | "no" "!"~1..3',
        'root ::= "yes" | "no" [!]?',
    ):
        found = {walk(byte_level, grammar(byte_level, grammar=text).text, seed) for seed in range(30)}
        assert {"yes", "no!"} <= found <= {"yes", "no", "no!", "no!!", "no!!!"}, text


def test_json_in_a_grammar(byte_level: Tokenizer) -> None:
    """What the tool parsers write: literals around a schema."""
    text = f'start: "<tool_call>\\n" %json {json.dumps(PERSON)} "\\n</tool_call>"'
    made = walk(byte_level, grammar(byte_level, grammar=text).text, 3)
    assert made is not None and made.startswith("<tool_call>\n") and made.endswith("\n</tool_call>")
    jsonschema.validate(json.loads(made[12:-13]), PERSON)


def test_control_tokens_only_where_a_grammar_names_them(byte_level: Tokenizer) -> None:
    special = set(byte_level.special_ids)
    for params in ({"regex": "(?s:.*)"}, {"json_object": True}, {"grammar": 'start: /[^"]*/'}):
        made = compile_grammar(grammar(byte_level, **params).text, byte_level, byte_level.eos_token_ids)
        assert special & set(allowed(made, byte_level, [])) <= set(byte_level.eos_token_ids)
    named = grammar(byte_level, grammar='start: <|im_start|> "a"').text
    made = compile_grammar(named, byte_level, byte_level.eos_token_ids)
    assert allowed(made, byte_level, []) == [byte_level.token_to_id("<|im_start|>")]


def test_any_spelling_of_a_forced_text_is_allowed(byte_level: Tokenizer) -> None:
    pieces = byte_level.pieces()
    for params in ({"choice": ["arguments"]}, {"regex": "arguments"}, {"grammar": 'start: "arguments"'}):
        matcher = compile_grammar(grammar(byte_level, **params).text, byte_level, byte_level.eos_token_ids)
        found = {pieces[token] for token in allowed(matcher, byte_level, [])}
        assert found == {piece for piece in pieces if piece and b"arguments".startswith(piece)}
        assert len(found) > 1


def test_all_end_tokens_exactly_at_the_end(byte_level: Tokenizer) -> None:
    ends = (byte_level.eos_token_ids[0], byte_level.token_to_id("<|im_end|>") or 0, 10**6)  # one is not in the vocabulary
    made = check(StructuredOutputsParams(regex="ab?"), byte_level, "x", ends)
    matcher = compile_grammar(made.text, byte_level, ends)
    a, b = (byte_level.token_to_id(letter) or 0 for letter in "ab")
    assert not set(ends) & set(allowed(matcher, byte_level, []))
    assert set(allowed(matcher, byte_level, [a])) == {b, *ends[:2]}
    assert set(allowed(matcher, byte_level, [a, b])) == set(ends[:2])
    assert allowed(matcher, byte_level, [a, b, ends[1]])  # planned ahead: nobody reads what comes of it, but it is no error


def test_a_matcher_goes_back_and_copies_go_their_own_way(byte_level: Tokenizer) -> None:
    matcher = compile_grammar(grammar(byte_level, choice=["aa", "bb"]).text, byte_level, byte_level.eos_token_ids)
    a, b = (byte_level.token_to_id(letter) or 0 for letter in "ab")
    other = matcher.copy()
    assert a in allowed(matcher, byte_level, [a]) and b in allowed(other, byte_level, [b])
    third = other.copy()
    assert allowed(third, byte_level, [b]) == allowed(other, byte_level, [b])
    assert set(allowed(matcher, byte_level, [])) >= {a, b}  # the row began anew
    words = np.zeros(-(-byte_level.vocab_size // 32), np.int32)
    assert not matcher(np.array([a, b], np.int32), words) and matcher.error
    assert not matcher(np.array([a], np.int32), words)  # an error stays
    assert b in allowed(other, byte_level, [b])


def test_a_vocabulary_of_the_model_may_be_larger_or_smaller(byte_level: Tokenizer) -> None:
    matcher = compile_grammar(grammar(byte_level, regex=".*").text, byte_level, byte_level.eos_token_ids)
    for words in (np.full(40, -1, np.int32), np.full(4, -1, np.int32)):
        assert matcher(np.zeros(0, np.int32), words)
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")
        assert bits.any() and not bits[byte_level.vocab_size :].any()


def test_white_space(byte_level: Tokenizer) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}

    def accepts(text: str, **options: Any) -> bool:
        made = grammar(byte_level, json=schema, **options)
        matcher = compile_grammar(made.text, byte_level, byte_level.eos_token_ids)
        words = np.zeros(-(-byte_level.vocab_size // 32), np.int32)
        ids = byte_level.encode(text, add_special_tokens=False)
        return matcher(np.array(ids, np.int32), words)

    pretty, wide = json.dumps({"a": True}, indent=4), '{"a":' + " " * 2000 + "true}"
    assert accepts(pretty) and accepts('{"a":true}') and not accepts(wide)  # no model loses itself in white space
    assert accepts('{"a":true}', disable_any_whitespace=True) and not accepts(pretty, disable_any_whitespace=True)
    assert accepts('{"a": true}', whitespace_pattern=" ?") and not accepts(pretty, whitespace_pattern=" ?")


def test_additional_properties(byte_level: Tokenizer) -> None:
    inner = {"type": "object", "properties": {"b": {"const": 1}}}
    schema = {"type": "object", "properties": {"a": inner, "additionalProperties": {"const": 2}}}
    closed = grammar(byte_level, json=schema, disable_additional_properties=True, disable_any_whitespace=True)
    found = {walk(byte_level, closed.text, seed) for seed in range(60)}
    assert found <= {"{}", '{"a":{}}', '{"a":{"b":1}}', '{"additionalProperties":2}', '{"a":{},"additionalProperties":2}',
                     '{"a":{"b":1},"additionalProperties":2}'} and len(found) > 3


def test_annotations_are_tolerated(byte_level: Tokenizer) -> None:
    schema = {"$schema": "my own", "strict": True, "title": "t", "description": "d", "examples": [1],
              "x-guidance": {"lenient": 3}, "nullable": False, "type": "object", "properties": {
                  "format": {"type": "string", "format": "phone", "maxLength": 3}, "x-guidance": {"const": 1}},
              "required": ["format", "x-guidance"], "additionalProperties": False}
    text = walk(byte_level, grammar(byte_level, json=schema).text, 2)
    assert text is not None and set(json.loads(text)) == {"format", "x-guidance"}
    for name in FORMATS:
        grammar(byte_level, json={"type": "string", "format": name})


# -- refusals ----------------------------------------------------------------------------------------------------------------


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"json": "{"}, "not valid JSON"),
    ({"json": "[]"}, "JSON object"),
    ({"json": "true"}, "JSON object"),
    ({"json": '{"maximum": NaN}'}, "NaN"),
    ({"json": "[" * 60_000}, "deep"),
    ({"json": {"title": "x" * 70_000}}, "65536"),
    ({"json": nested(70)}, "64 deep"),
    ({"json": {"type": "integer", "multipleOf": 9_999_991}}, "multipleOf"),
    ({"json": {"type": "number", "multipleOf": 1.23456789e-7}}, "multipleOf"),
    ({"json": {"type": "number", "multipleOf": 1e-300}}, "multipleOf"),
    ({"json": '{"type": "number", "multipleOf": 1e400}'}, "multipleOf"),
    ({"json": {"allOf": [{"type": "integer", "multipleOf": 9973}, {"multipleOf": 9967}]}}, "multipleOf"),
    ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    ({"json": {"not": {"type": "string"}}}, "not"),
    ({"json": {"if": {"type": "string"}, "then": {"minLength": 2}}}, "if, then"),
    ({"json": {"type": "sting"}}, "sting"),
    ({"json": {"$ref": "http://example.com/schema"}}, "example.com"),
    ({"json": {"$ref": "#/$defs/none"}}, "none"),
    ({"json": {"$ref": "#"}}, "no text"),
    ({"json": {"enum": []}}, "empty"),
    ({"json": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}, "oneOf"),
    ({"json": {"type": "string", "pattern": "(?=a)b"}}, "look"),
    ({"json": {"type": "object"}, "whitespace_pattern": "(["}, "regex"),
    ({"json": {"type": "object"}, "whitespace_pattern": ""}, "blank"),
    ({"json": {"allOf": [{"anyOf": [{"properties": {f"p{i}_{j}": {}}} for j in range(10)]} for i in range(10)]}}, "large"),
    ({"regex": ""}, "blank"),
    ({"regex": "(a"}, "unclosed|regex"),
    ({"regex": r"(a)\1"}, "regex"),
    ({"regex": "a" * 5000}, "4096"),
    ({"regex": r"[^\s\S]"}, "no text"),
    ({"regex": "(" * 2000 + "a" + ")" * 2000}, ""),
    ({"regex": "\ud800"}, "Unicode"),
    ({"choice": []}, "choice"),
    ({"choice": ["a", ""]}, "choice"),
    ({"choice": ["x" * 70_000]}, "65536"),
    ({"grammar": " \n"}, "blank"),
    ({"grammar": "nonsense"}, "GBNF"),
    ({"grammar": 'root ::= "a'}, "GBNF"),
    ({"grammar": "root ::= other"}, "other"),
    ({"grammar": "start: other"}, "other"),
    ({"grammar": 'start: ""'}, "no text"),
    ({"grammar": "start: <|no_such_token|>"}, "no_such_token"),
    ({"grammar": "%llguidance {\nstart: /a/"}, "%llguidance"),
    ({"grammar": 'start: "a" %json {"type":"integer","multipleOf":9999991}'}, "multipleOf"),
    ({"grammar": "start: " + "(" * 3000 + '"a"' + ")" * 3000}, "deep"),
    ({"grammar": "start: " + "x" * 70_000}, "65536"),
]


@pytest.mark.parametrize(("params", "words"), REFUSED, ids=range(len(REFUSED)))
def test_refusals_are_quick_and_readable(byte_level: Tokenizer, params: dict[str, Any], words: str) -> None:
    started = time.monotonic()
    with pytest.raises(RequestError) as caught:
        check(StructuredOutputsParams(**params), byte_level, "response_format")
    assert time.monotonic() - started < 5
    assert caught.value.param == "response_format" and len(str(caught.value)) <= 500
    assert re.search(words, str(caught.value)), str(caught.value)
    assert "llguidance {" not in str(caught.value)


# Constraints that may be refused or followed, but neither may take long, at the start or on the way.
HARD: list[dict[str, Any]] = [
    {"regex": "(a{1,1000}){1,1000}"}, {"regex": "(a|aa)+$"}, {"regex": "a{1000000000}"}, {"regex": ".*a.{400}"},
    {"regex": "((((a{1,30}){1,30}){1,30}){1,30}){1,30}"}, {"regex": "(" + "|".join(f"(.*{c})" for c in "abcdefghijklm") + ")*"},
    {"regex": "(.*[ab].{15}[cd].{15}|.*[xy].{25}z)+"}, {"regex": r"(\p{L}*\p{N}*){50}"}, {"regex": "(a?){1000}b"},
    {"choice": [f"word {i}" for i in range(4000)]},
    {"json": {"$defs": {f"d{i}": {"type": "object", "properties": {k: {"$ref": f"#/$defs/d{i + 1}"} for k in "ab"}}
                        for i in range(600)} | {"d600": {"type": "null"}}, "$ref": "#/$defs/d0"}},
    {"json": {"$defs": {f"d{i}": {"allOf": 2 * [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(40)} | {"d40": {"type": "object"}},
              "$ref": "#/$defs/d0"}},
    {"json": {"$defs": {f"d{i}": {"anyOf": 2 * [{"$ref": f"#/$defs/d{i + 1}"}]} for i in range(40)} | {"d40": {"type": "object"}},
              "$ref": "#/$defs/d0"}},
    {"json": {"anyOf": [{"type": "array", "items": {"$ref": "#"}}, {"type": "object", "additionalProperties": {"$ref": "#"}}]}},
    {"json": {"type": "string", "minLength": 10**9}}, {"json": {"type": "array", "minItems": 10**9}},
    {"json": {"type": "array", "items": {"type": "string"}, "maxItems": 10**9}},
    {"json": {"type": "integer", "minimum": -(10**300), "maximum": 10**300}}, {"json": {"type": "integer", "multipleOf": 9973}},
    {"json": {"type": "number", "minimum": 1e-300, "maximum": 1e300}}, {"json": {"type": "object", "minProperties": 10**9}},
    {"json": {"type": "string", "pattern": "^(a{1,1000}){1,1000}$"}},
    {"json": {"enum": [f"value {i}" for i in range(4000)]}},
    {"json": {"type": "object", "properties": {f"p{i}": {"type": "string", "maxLength": 100} for i in range(800)}}},
    {"json": {"type": "object", "patternProperties": {f"^a.*b{i}": {"type": "string"} for i in range(60)}}},
    {"grammar": "start: s\ns: s s s | s s | /./ |"}, {"grammar": 'start: a*\na: "a" | a a | "aa" | /[ab]+/ a?'},
    {"grammar": "start: A\nA: /.*/ & ~(/.*a.{15}/ & /.*b.{14}/)"},
    {"grammar": 'start: x{1000}\nx: y{1000}\ny: z{1000}\nz: "a"'}, {"grammar": 'start: X{1000000}\nX: "ab"{1,100000}'},
    {"grammar": "start: " + " | ".join(f'"w{i}" x' for i in range(3000)) + '\nx: "y"'},
    {"grammar": "root ::= " + " | ".join(f"r{i}" for i in range(1500)) + "".join(f'\nr{i} ::= "a{i}"' for i in range(1500))},
    {"grammar": "root ::= " + "(" * 2000 + '"a"' + ")" * 2000},
]


@pytest.mark.parametrize("params", HARD, ids=range(len(HARD)))
def test_what_is_hard_is_bounded(byte_level: Tokenizer, params: dict[str, Any]) -> None:
    started = time.monotonic()
    try:
        made = grammar(byte_level, **params)
    except RequestError as error:
        assert time.monotonic() - started < 5 and len(str(error)) <= 500
        return
    assert time.monotonic() - started < 5
    matcher = compile_grammar(made.text, byte_level, byte_level.eos_token_ids)
    words, output, rng = np.zeros(-(-byte_level.vocab_size // 32), np.int32), list[int](), random.Random(5)
    for _ in range(40):
        started = time.monotonic()
        good = matcher(np.array(output, np.int32), words)
        assert time.monotonic() - started < 1
        if not good:
            assert matcher.error and len(matcher.error) < 1000
            return
        choices = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()
        output.append(rng.choice(choices))
        if output[-1] in byte_level.eos_token_ids:
            return


def test_the_tokenizer_must_be_able(words: Tokenizer, byte_level: Tokenizer) -> None:
    with pytest.raises(RequestError, match="tokenizer"):
        grammar(words, regex="a")
    for ends in ((), (10**6,)):
        with pytest.raises(RequestError, match="end token"):
            check(StructuredOutputsParams(regex="a"), byte_level, "x", ends)


def test_a_grammar_is_compiled_once(byte_level: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(module, "_checked", module._Checked())
    room = Limits(cache_bytes=6000)
    monkeypatch.setattr(module, "compile_grammar", lambda *args: compiled.append(args[0]) or compile_grammar(*args))

    def use(word: str) -> None:
        check(StructuredOutputsParams(choice=[word]), byte_level, "x", limits=room)

    for _ in range(3):
        use("once")
    assert len(compiled) == 1
    for i in range(20):  # others push it out
        use(f"word {i}")
    use("once")
    assert len(compiled) == 22 and 2 <= module.num_checked() <= 5 and module._checked._bytes <= 6000
    for _ in range(2):  # what was refused is refused again
        with pytest.raises(RequestError):
            grammar(byte_level, regex="(")


def test_threads(byte_level: Tokenizer) -> None:
    def work(i: int) -> str | None:
        return walk(byte_level, grammar(byte_level, choice=[f"{i}", f"{i} {i}"]).text, i)

    with ThreadPoolExecutor(8) as pool:
        assert all(text in (f"{i}", f"{i} {i}") for i, text in enumerate(pool.map(work, range(40))))


# -- random schemas ----------------------------------------------------------------------------------------------------------


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema with keywords of every kind that can be enforced; every string and array is bounded so that walks end."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern", "format", "integer range"]
    kinds += ["object", "object", "array", "tuple", "anyOf", "oneOf", "allOf", "types"] if depth < 3 else []
    kind = rng.choice(kinds) if depth else "object"
    if kind == "string":
        low = rng.randint(0, 3)
        return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 6)}
    if kind in ("integer", "number", "boolean", "null"):
        return {"type": kind, "title": "t", "description": 'a "quoted" text'}
    if kind == "enum":
        return {"enum": rng.sample(["a", "é\n", 1, 2.5, None, True, {"x": [1]}, ["y"]], 3)}
    if kind == "const":
        return {"const": rng.choice(["tool", 7, {"k": "v"}, [1, "2"]])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-z]{1,4}$", "^x-[0-9]+$", "^(yes|no)$"]), "maxLength": 8}
    if kind == "format":
        return {"type": "string", "format": rng.choice(["date", "uuid", "ipv4"])}
    if kind == "integer range":
        low = rng.randint(-50, 50)
        return {"type": "integer", "minimum": low, rng.choice(["maximum", "exclusiveMaximum"]): low + rng.randint(1, 500)}
    if kind == "array":
        low = rng.randint(0, 2)
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": low, "maxItems": low + rng.randint(0, 2)}
    if kind == "tuple":
        return {"type": "array", "prefixItems": [random_schema(rng, depth + 1) for _ in range(2)], "items": False, "minItems": 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]}
    if kind == "oneOf":
        return {"oneOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}, {"type": "array", "maxItems": 0}]}
    if kind == "allOf":
        return {"allOf": [{"type": "integer", "minimum": rng.randint(-9, 0)}, {"maximum": rng.randint(1, 99)}]}
    if kind == "types":
        return {"type": ["null", "boolean", "integer"]}
    names = rng.sample(["name", "é", "a b", 'qu"ote', "list", "b", "id"], rng.randint(0, 4))
    found: dict[str, Any] = {"type": "object", "properties": {name: random_schema(rng, depth + 1) for name in names},
                             "required": rng.sample(names, rng.randint(0, len(names)))}
    more = rng.choice(["none", "typed", "open"])
    if more != "open" or depth:
        found["additionalProperties"] = {"type": "boolean"} if more == "typed" else False
    return found


@pytest.mark.parametrize("part", range(4))
def test_two_hundred_random_schemas(byte_level: Tokenizer, part: int) -> None:
    ended = 0
    for seed in range(50 * part, 50 * part + 50):
        schema = random_schema(random.Random(seed))
        made = grammar(byte_level, json=schema, disable_any_whitespace=seed % 2 == 0)
        text = walk(byte_level, made.text, seed)
        if text is None:
            continue
        ended += 1
        checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
        errors = [error.message for error in checker.iter_errors(json.loads(text))]
        assert not errors, (seed, schema, text, errors)
    assert ended >= 40


@pytest.mark.parametrize("params", [
    {"regex": "(" + "x" * 3000}, {"grammar": "start: " + "x" * 3000}, {"grammar": "start: /" + "(" * 3000 + "/"},
    {"json": {"type": "x" * 3000}}, {"json": {"pattern": "(" + "x" * 3000}}, {"json": {"$ref": "#/" + "x" * 3000}},
    {"json": {"properties": {"x" * 3000: {"type": 1}}}}, {"json": {"x" * 3000: 1, "not": {}}},
    {"json": {"multipleOf": "x" * 3000}},
    {"json": "{" + "x" * 3000}, {"grammar": '%llguidance {"' + "x" * 3000 + '": 1}\nstart: "a"'}])
def test_errors_repeat_little(byte_level: Tokenizer, params: dict[str, Any]) -> None:
    try:
        grammar(byte_level, **params)
    except RequestError as error:
        assert max(map(len, re.findall(r"x+|\(+", str(error))), default=0) <= 200 and len(str(error)) < 350


@pytest.mark.parametrize(("good", "bad"), [
    ({"json": {"description": "a" * 50}}, {"json": {"description": "a" * 100}}),
    ({"json": {"anyOf": [{"type": "null"}]}}, {"json": {"anyOf": [{"anyOf": [{"anyOf": [{"type": "null"}]}]}]}}),
    ({"regex": "abcdefghij"}, {"regex": "abcdefghijk"}),
    ({"json_object": True, "whitespace_pattern": "[ ]?"}, {"json_object": True, "whitespace_pattern": "[ ]?[ ]?[ ]?"}),
    ({"grammar": 'start: %json {"type": "null"}'}, {"grammar": 'start: %json {"anyOf": [{"anyOf": [{"anyOf": [{}]}]}]}'}),
])
def test_limits_are_those_that_were_given(byte_level: Tokenizer, good: dict[str, Any], bad: dict[str, Any]) -> None:
    limits = Limits(schema_bytes=100, schema_depth=4, regex_bytes=10)
    check(StructuredOutputsParams(**good), byte_level, "x", limits=limits)
    grammar(byte_level, **bad)
    with pytest.raises(RequestError, match=r"bytes|deep"):
        check(StructuredOutputsParams(**bad), byte_level, "x", limits=limits)


@pytest.mark.parametrize(("count", "before", "after"), [
    (3700, "", ""), (1800, "(" * 8, ")" * 8), (400, '("x" ' * 20, ")+" * 20)], ids=["rules", "brackets", "repeats"])
def test_rules_that_go_deep_do_not_overrun_the_stack(byte_level: Tokenizer, count: int, before: str, after: str) -> None:
    chain = "".join(f'r{i}: {before}"b" r{i + 1}{after}\n' for i in range(count))
    text = f'start: r0\n{chain}r{count}: "c"'
    assert 55_000 < len(text) < module.MAX_GRAMMAR_BYTES
    matcher = compile_grammar(grammar(byte_level, grammar=text).text, byte_level, byte_level.eos_token_ids)
    assert allowed(matcher.copy(), byte_level, [])
