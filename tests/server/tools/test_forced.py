"""Forced calls: whatever a grammar lets through, the parser reads as calls that follow the tools' schemas."""

import json
import random

import jsonschema
import llguidance.numpy as masks
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from octavo.server.tools.definitions import ToolChoice, check_tools
from octavo.server.tools.events import CallArguments, CallEnd, CallStart, Content, join
from octavo.server.tools.forced import force_calls
from octavo.server.tools.parser import JSON, make_parser

END = "</s>"
MARKS = [END, "[TOOL_CALLS]", "[ARGS]", "<tool_call>", "</tool_call>", "<think>", "</think>", "<|python_tag|>"]
SCHEMA = {
    "type": "object", "additionalProperties": False, "required": ["city", "days"],
    "properties": {
        "city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["c", "f"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 5}, "factor": {"anyOf": [{"type": "null"}, {"type": "number"}]},
        "place": {"$ref": "#/$defs/P"}, "flags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3}},
    "$defs": {"P": {"type": "object", "properties": {"x": {"type": "string", "maxLength": 5}}, "required": ["x"],
                    "additionalProperties": False}}}
TOOLS = check_tools([
    {"type": "function", "function": {"name": "weather", "strict": True, "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "no.args"}},
    {"type": "function", "function": {"name": "any-thing", "parameters": {}}}])
NAMED, REQUIRED, AUTO = ToolChoice("named", "weather"), ToolChoice("required"), ToolChoice("auto")


class Model:
    """A vocabulary of single bytes and the given control tokens, and a model that walks through grammars at random."""

    def __init__(self, special: list[str]) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([AddedToken(text, special=True) for text in special])
        self.special = {text: backend.token_to_id(text) for text in special}
        self.backend, self.end = backend, self.special[END]
        self.guide = LLTokenizer(backend.to_str(), eos_token=self.end)
        closing = [backend.token_to_id(char) for char in '"}]']
        self.closing = {*closing, *self.special.values()}

    def walk(self, grammar: str, rng: random.Random, begin: str = "") -> str | None:
        matcher = LLMatcher(self.guide, grammar)
        assert not matcher.is_error(), matcher.get_error()
        mask = masks.allocate_token_bitmask(1, self.guide.vocab_size)
        ids = self.guide.tokenize_str(begin, parse_special=True)
        assert all(matcher.consume_token(token) for token in ids), matcher.get_error()
        while not matcher.is_stopped() and len(ids) < 700:
            masks.fill_next_token_bitmask(matcher, mask, 0)
            allowed = [i for i in range(self.guide.vocab_size) if mask[0, i // 32] >> (i % 32) & 1]
            closing = [i for i in allowed if i in self.closing]
            often = 0.9 if len(ids) > 60 + len(begin) else 0.4
            token = rng.choice(closing if closing and rng.random() < often else allowed)
            if token == self.end and len(allowed) > 1 and rng.random() < 0.5:
                token = rng.choice([i for i in allowed if i != token])
            if token == self.end:
                break
            assert matcher.consume_token(token), matcher.get_error()
            ids.append(token)
        else:
            if not matcher.is_accepting():
                return None
        return self.backend.decode(ids, skip_special_tokens=False)


PLAIN, MARKED = Model([END, "[TOOL_CALLS]"]), Model(MARKS)


def check(output: str, forced, reasoning=None, opened=None) -> tuple[int, bool]:
    """Number of calls, and whether there is content; fails unless every call is complete and follows its schema."""
    parser = make_parser(forced.tool_format, reasoning, [tool.definition for tool in TOOLS], thinking_open=opened,
                         name=forced.name)
    events = join(parser.push(output) + parser.finish())
    schemas = {tool.name: tool.schema for tool in TOOLS}
    starts = [event for event in events if isinstance(event, CallStart)]
    for start in starts:
        assert CallEnd(start.index) in events, output
        text = "".join(e.fragment for e in events if isinstance(e, CallArguments) and e.index == start.index)
        jsonschema.validate(json.loads(text), schemas[start.name])
    return len(starts), any(isinstance(event, Content) for event in events)


@pytest.mark.parametrize("reasoning", [None, "qwen3", "deepseek_r1"])
@pytest.mark.parametrize("model", [PLAIN, MARKED], ids=["text marks", "special marks"])
@pytest.mark.parametrize("tool_format", ["hermes", "llama3_json", "mistral", "qwen3_coder", None])
def test_required_and_named(tool_format, model, reasoning):
    rng = random.Random(f"{tool_format}{reasoning}")
    begin = {None: "", "qwen3": "<think>a</think>", "deepseek_r1": "a <tool_call> b</think>"}[reasoning]
    begin = begin.replace(" <tool_call>", "") if model is MARKED else begin  # as text it is no token
    walked = 0
    for choice, parallel in ((REQUIRED, True), (REQUIRED, False), (NAMED, True)):
        forced = force_calls(choice, TOOLS, tool_format, parallel=parallel, special=model.special, reasoning_format=reasoning)
        assert forced is not None and forced.tool_format == (tool_format or JSON)
        for _ in range(4):
            output = model.walk(forced.grammar, rng, begin)
            if output is None:
                continue
            calls, content = check(output, forced, reasoning)
            assert not content and calls >= 1, output
            assert calls == 1 or (choice is REQUIRED and parallel), output
            walked += 1
    assert walked >= 6


@pytest.mark.parametrize("model", [PLAIN, MARKED], ids=["text marks", "special marks"])
@pytest.mark.parametrize(("tool_format", "begin"), [
    ("hermes", "Hi <tool_call>"), ("llama3_json", "{"), ("mistral", "Hi[TOOL_CALLS]"), ("qwen3_coder", "Hi\n<tool_call>")])
def test_auto_forces_what_has_begun(tool_format, begin, model):
    rng, found = random.Random(tool_format), []
    for parallel in (True, False):
        forced = force_calls(AUTO, TOOLS, tool_format, parallel=parallel, special=model.special)
        assert forced is not None
        for prefix in ("", "Just text", begin, begin):
            output = model.walk(forced.grammar, rng, prefix)
            if output is not None:
                calls, _ = check(output, forced)
                assert calls <= 1 or parallel
                assert calls or prefix != begin
                found.append(calls)
    assert found


def accepts(model: Model, forced, text: str) -> bool:
    matcher = LLMatcher(model.guide, forced.grammar)
    ids = model.guide.tokenize_str(text, parse_special=True)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


ONE = {"hermes": '{"name": "no.args", "arguments": {}}', "llama3_json": '{"name": "no.args", "parameters": {}}',
       "mistral": '{"name": "no.args", "arguments": {}}', "qwen3_coder": "<function=no.args>\n</function>",
       None: '{"name": "no.args", "parameters": {}}'}
TAGS = ("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>")
AROUND = {"hermes": TAGS, "llama3_json": ("", "; ", ""), "mistral": ("[TOOL_CALLS] [", ", ", "]"), "qwen3_coder": TAGS,
          None: ("[", ", ", "]")}


@pytest.mark.parametrize("tool_format", ONE)
def test_several_calls_only_where_allowed(tool_format):
    (begin, between, end), one = AROUND[tool_format], ONE[tool_format]
    for parallel in (True, False):
        forced = force_calls(REQUIRED, TOOLS, tool_format, parallel=parallel, special=PLAIN.special)
        assert accepts(PLAIN, forced, begin + one + end)
        assert accepts(PLAIN, forced, begin + one + between + one + end) is parallel
    named = force_calls(NAMED, TOOLS, tool_format, parallel=True, special=PLAIN.special)
    assert not accepts(PLAIN, named, begin + one + end)


def test_the_newer_mistral_style_where_the_vocabulary_has_it():
    for parallel in (True, False):
        forced = force_calls(REQUIRED, TOOLS, "mistral", parallel=parallel, special=MARKED.special)
        assert accepts(MARKED, forced, "[TOOL_CALLS]no.args[ARGS]{}")
        assert accepts(MARKED, forced, "[TOOL_CALLS]no.args[ARGS]{}[TOOL_CALLS]no.args[ARGS]{}") is parallel


@pytest.mark.parametrize("tool_format", ["hermes", "llama3_json", "mistral", "qwen3_coder"])
def test_auto_lets_the_model_answer(tool_format):
    for parallel in (True, False):
        forced = force_calls(AUTO, TOOLS, tool_format, parallel=parallel, special=PLAIN.special)
        assert accepts(PLAIN, forced, "It is <b>{fine}</b>;\n[1] \u00e9")
        assert accepts(PLAIN, forced, "")


def test_strings_of_the_xml_style_keep_their_limits():
    properties = {
        "a": {"type": "string", "minLength": 2, "maxLength": 3}, "e": {"enum": ["x y", "z"]}, "n": {"type": ["integer", "null"]}}
    tools = check_tools([{"type": "function", "function": {
        "name": "f", "parameters": {"type": "object", "required": ["a", "e"], "properties": properties}}}])
    forced = force_calls(REQUIRED, tools, "qwen3_coder", parallel=True, special=PLAIN.special)

    def text(a: str, e: str, rest: str = "") -> str:
        return (f"<tool_call>\n<function=f>\n<parameter=a>\n{a}\n</parameter>\n<parameter=e>\n{e}\n</parameter>\n{rest}"
                "</function>\n</tool_call>")

    assert accepts(PLAIN, forced, text("<>\n", "x y"))
    assert accepts(PLAIN, forced, text("ab", "z", "<parameter=n>\nnull\n</parameter>\n"))
    for bad in (text("a", "z"), text("abcd", "z"), text("ab", "y"), text("ab", "z", "<parameter=n>\n1.5\n</parameter>\n")):
        assert not accepts(PLAIN, forced, bad)


@pytest.mark.parametrize("tool_format", ["hermes", "llama3_json", "mistral", "qwen3_coder", None])
@pytest.mark.parametrize("wrong", [
    '{"name": "weather", "arguments": {"city": "a"}}', "hello", '[{"name": "nope"', '<tool_call>\n{"name": "wea"'])
def test_other_output_is_refused(tool_format, wrong):
    forced = force_calls(NAMED, TOOLS, tool_format, parallel=False, special=PLAIN.special)
    matcher = LLMatcher(PLAIN.guide, forced.grammar)
    ids = PLAIN.guide.tokenize_str(wrong)
    assert matcher.try_consume_tokens(ids) < len(ids)


def test_nothing_is_forced_without_need():
    free = [tool for tool in TOOLS if not tool.strict]
    for choice, tools, tool_format, parallel in (
            (ToolChoice("none"), TOOLS, "hermes", True), (REQUIRED, [], "hermes", True), (AUTO, free, "hermes", True),
            (AUTO, TOOLS, None, False)):
        assert force_calls(choice, tools, tool_format, parallel=parallel, special={}) is None
    assert force_calls(AUTO, free, "hermes", parallel=False, special={}) is not None
