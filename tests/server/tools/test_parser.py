"""Output parsers: any split of the text gives the same events, in linear time, and no text is lost."""

import gc
import itertools
import json
import pathlib
import re
import statistics
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from octavo.errors import ConfigError
from octavo.server.tools.events import CallArguments, CallEnd, CallStart, Content, Event, Reasoning, join
from octavo.server.tools.parser import (
    JSON,
    REASONING_FORMATS,
    TOOL_FORMATS,
    detect_tool_format,
    make_parser,
    needs_special_tokens,
)

TEMPLATES = pathlib.Path(__file__).resolve().parents[2] / "data" / "text" / "templates"
PROPERTIES = {
    "x": {"type": "string"}, "n": {"type": "integer"}, "r": {"type": "number"}, "b": {"type": "boolean"},
    "o": {"type": "object"}, "l": {"type": "array"}, "m": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "p": {"$ref": "#/$defs/P"}, "k": {"enum": [1, 2]},
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {
    "type": "object", "properties": PROPERTIES, "$defs": {"P": {"type": "integer"}}}}}]
FORMATS = sorted(TOOL_FORMATS)


def parse(pieces, tool_format="hermes", reasoning=None, *, opened=None, ends=(), name=None) -> list[Event]:
    parser = make_parser(tool_format, reasoning, TOOLS, thinking_open=opened, end_tokens=ends, name=name)
    return join([event for piece in pieces for event in parser.push(piece)] + parser.finish())


def call(index, arguments, name="f", complete=True) -> list[Event]:
    middle = [CallArguments(index, arguments)] if arguments else []
    return [CallStart(index, name), *middle, CallEnd(index, complete)]


def xml(*parameters: tuple[str, str], name="f") -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function={name}>\n{inner}</function>\n</tool_call>"


NESTED = '{"x": "a </tool_call> } [TOOL_CALLS] \\" \\\\ \\u00e9 \u00e9\U0001f600", "o": {"l": [[], {}, -1.5e3, true, null]}}'
CORPUS = {
    "hermes": [
        ("no call { } <b> < tool_call>", [Content("no call { } <b> < tool_call>")]),
        ('<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n</tool_call>', call(0, '{"n": 1}')),
        (f'Hm.\n\n<tool_call>{{"name": "f", "arguments": {NESTED}}}</tool_call>\nand\n<tool_call>\n'
         '{"arguments": {"n": 2}, "name": "g"}\n</tool_call>\n\nbye\n',
         [Content("Hm."), *call(0, NESTED), Content("and"), *call(1, '{"n": 2}', "g"), Content("bye\n")]),
        ('<tool_call>{"name":"f"}</tool_call><tool_call>{"name":"f","arguments":null}</tool_call>\n',
         call(0, "{}") + call(1, "{}")),
        ('<tool_call>[{"name":"f","arguments":"{\\"n\\": 1}"}, {"name":"f","arguments":{}}]</tool_call>',
         call(0, '{"n": 1}') + call(1, "{}")),
        ('<tool_call>{"name": "f", "arguments": {"n": 1}}', call(0, '{"n": 1}')),
        ('<tool_call>{"name": "f", "arguments": {"n": 1}} tail', [*call(0, '{"n": 1}'), Content("tail")]),
        ('a\n<tool_call>\nno json</tool_call>', [Content('a\n<tool_call>\nno json</tool_call>')]),
        ('<tool_call>\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', [Content("<tool_call>"), *call(0, "{}")]),
        ('<tool_call>{"name": "f", "arguments": {"x": oops}}</tool_call>',
         [*call(0, '{"x": ', complete=False), Content("oops}}</tool_call>")]),
        ('<tool_call>{"name": "f", "arguments": {"x": "cut', call(0, '{"x": "cut', complete=False)),
        ('<tool_call>{"name": "f", "arg', [Content('<tool_call>{"name": "f", "arg')]),
        ('<tool_call>{"name": "f", "arguments": [1]}</tool_call>',
         [Content('<tool_call>{"name": "f", "arguments": [1]}</tool_call>')]),
        ('<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
         [Content('<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>')]),
        ('<tool_call>{"name": "f", "id": [{"name": "g"}], "arguments": {"n": 1}, "arguments": {}, "name": ""}</tool_call>',
         call(0, '{"n": 1}')),
    ],
    "llama3_json": [
        ("plain; text {", [Content("plain; text {")]),
        ('{"name": "f", "parameters": {"n": 1}}', call(0, '{"n": 1}')),
        ('\n{"type": "function", "name": "f", "parameters": {"n": 1}} ; {"name": "g", "arguments": {}}\n',
         call(0, '{"n": 1}') + call(1, "{}", "g")),
        ('<|python_tag|>{"name": "f", "parameters": ' + NESTED + "}; \n and", [*call(0, NESTED), Content("and")]),
        ("<|python_tag|>print(1)", [Content("<|python_tag|>print(1)")]),
        ("<|python", [Content("<|python")]),
        ('{"city": {"name": "f", "parameters": {}}}', [Content('{"city": {"name": "f", "parameters": {}}}')]),
        ('{"name": "Ann"}', [Content('{"name": "Ann"}')]),
        (' no {"name": "f", "parameters": {}}', [Content(' no {"name": "f", "parameters": {}}')]),
        ('{"name": "f", "parameters": {"n": 01}}', [*call(0, '{"n": 01', complete=False), Content("}}")]),
    ],
    "mistral": [
        ("text [TOOL CALLS] [1]", [Content("text [TOOL CALLS] [1]")]),
        ('Ok.\n[TOOL_CALLS] [{"name": "f", "arguments": ' + NESTED + '}, {"name": "g", "arguments": {}}]',
         [Content("Ok."), *call(0, NESTED), *call(1, "{}", "g")]),
        ('[TOOL_CALLS]f[ARGS]{"n": 1}[TOOL_CALLS]g.h-1 {"n": 2} end',
         [*call(0, '{"n": 1}'), *call(1, '{"n": 2}', "g.h-1"), Content(" end")]),
        ('[TOOL_CALLS]f[CALL_ID]a1B2[ARGS]{"n": 1}', call(0, '{"n": 1}')),
        ('[TOOL_CALLS]{"name": "f", "arguments": {}} x', [*call(0, "{}"), Content(" x")]),
        ("[TOOL_CALLS][]", [Content("[TOOL_CALLS][]")]),
        ("[TOOL_CALLS]f(x)", [Content("[TOOL_CALLS]f(x)")]),
        ('[TOOL_CALLS][{"name": "f", "arguments": {}}, oops]', [*call(0, "{}"), Content("oops]")]),
        ('[TOOL_CALLS]f[ARGS]{"n": 1', call(0, '{"n": 1', complete=False)),
        ("[TOOL_CALLS]f[AR", [Content("[TOOL_CALLS]f[AR")]),
    ],
    "qwen3_coder": [
        ("no <function> here <tool_", [Content("no <function> here <tool_")]),
        ("Ok.\n" + xml(("x", ' say "hi" <b>\n\\ '), ("n", "5"), ("o", '{"a": [1]}')) + "\n" + xml(name="g") + " end",
         [Content("Ok."), *call(0, '{"x": " say \\"hi\\" <b>\\n\\\\ ", "n": 5, "o": {"a": [1]}}'), *call(1, "{}", "g"),
          Content(" end")]),
        (xml(("r", "1.5e3"), ("b", "True"), ("l", "[1]"), ("m", "null"), ("p", "7"), ("k", "2"), ("new", "5")),
         call(0, '{"r": 1.5e3, "b": true, "l": [1], "m": null, "p": 7, "k": 2, "new": "5"}')),
        (xml(("n", "many"), ("o", "{'a': 1}"), ("x", "null"), ("m", "5")),
         call(0, '{"n": "many", "o": "{\'a\': 1}", "x": "null", "m": "5"}')),
        ("<function=f>\n<parameter=x>\na\n<parameter=n>\n1\n</function></tool_call>\nz",
         [*call(0, '{"x": "a", "n": 1}'), Content("z")]),
        ("<tool_call><function=f><parameter=x>a</parameter></tool_call>", call(0, '{"x": "a"}')),
        ("<tool_call>\n<function=f></function>\n<function=g></function></tool_call>", call(0, "{}") + call(1, "{}", "g")),
        ("<tool_call>\nhm", [Content("<tool_call>\nhm")]),
        ("<function=a\nb>", [Content("<function=a\nb>")]),
        ("<tool_call>\n<function=f>\n<parameter=x>\ncut </param", call(0, '{"x": "cut </param', complete=False)),
        ("<tool_call>\n<function=f>\n<parameter=n>\n12", call(0, '{"n": "12', complete=False)),
        ("<tool_call>\n<function=f>\nhuh</function>", [*call(0, "{", complete=False), Content("huh</function>")]),
    ],
}
CASES = [(name, text, events) for name, cases in CORPUS.items() for text, events in cases]


@pytest.mark.parametrize(("tool_format", "text", "events"), CASES)
def test_corpus(tool_format, text, events):
    assert parse([text], tool_format) == events


@pytest.mark.parametrize(("tool_format", "text", "events"), CASES)
def test_every_two_and_three_way_split(tool_format, text, events):
    assert parse(text, tool_format) == events
    for i in range(len(text) + 1):
        assert parse([text[:i], text[i:]], tool_format) == events, i
    step = max(1, len(text) ** 2 // 4000)
    for i, j in itertools.islice(itertools.combinations(range(len(text) + 1), 2), 0, None, step):
        assert parse([text[:i], text[i:j], text[j:]], tool_format) == events, (i, j)


@pytest.mark.parametrize(("tool_format", "text", "events"), CASES)
def test_truncated_anywhere(tool_format, text, events):
    for i in range(len(text)):
        found = parse([text[:i]], tool_format)
        assert found == parse(text[:i], tool_format)
        check(found)
        nothing_lost(text[:i], found)


def test_aliases_parse_alike():
    for other, name in (("llama4_json", "llama3_json"), ("qwen3_xml", "qwen3_coder")):
        for text, events in CORPUS[name]:
            assert parse([text], other) == events


def check(events: list[Event]) -> None:
    """The shape that the events of any output have, and valid JSON where a call says that it is complete."""
    index, opened, fragments = -1, False, []
    for event in events:
        if isinstance(event, CallStart):
            assert not opened and event.index == index + 1 and event.name
            index, opened, fragments = event.index, True, []
        elif isinstance(event, CallArguments):
            assert opened and event.index == index and event.fragment
            fragments.append(event.fragment)
        elif isinstance(event, CallEnd):
            assert opened and event.index == index
            opened = False
            if event.complete:
                assert isinstance(json.loads("".join(fragments)), dict)
        else:
            assert not opened and event.text
    assert not opened


CALL = r"[\s,;]*(?=<tool_call>|<function=|\[TOOL_CALLS\]|<\|python_tag\|>|\{)[\s\S]*?"


def nothing_lost(text: str, events: list[Event]) -> None:
    """What is not content begins as a call does."""
    parts = [re.escape(event.text) if isinstance(event, Content) else CALL
             for event in events if isinstance(event, Content | CallStart)]
    assert re.fullmatch("".join(parts) + r"\n*" * (CALL in parts), text), (text, events)


BITS = ["WORD", " ", "\n", "<", "</", "<tool_call>", "</tool_call>", "<tool_cal", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[", "]",
        "{", "}", ",", ";", ":", '"', "\\", '{"name": "f", "arguments": {', '"name": "f"', '"parameters": ', "{}", "1", "true",
        "<|python_tag|>", "<function=f>", "</function>", "<parameter=x>", "<parameter=n>", "</parameter>", "<think>", "</think>",
        "</s>", '{"name": "f", "arguments": {"n": 1}}', "\u00e9", "\U0001f600", "\x00", "\u2028"]
TEXTS = st.one_of(st.lists(st.sampled_from(BITS), max_size=25).map("".join), st.text(max_size=60))
WAYS = st.fixed_dictionaries({
    "tool_format": st.sampled_from([*FORMATS, JSON]), "reasoning": st.sampled_from([None, *REASONING_FORMATS]),
    "opened": st.sampled_from([None, True, False]), "ends": st.sampled_from([(), ("</s>", "<")]),
    "name": st.sampled_from([None, "f"])})


@settings(max_examples=1500, deadline=None)
@given(TEXTS, WAYS, st.data())
def test_any_text_in_any_pieces(text, ways, data):
    whole = parse([text], **ways)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    assert parse(pieces, **ways) == whole == parse(text, **ways)
    check(whole)


@settings(max_examples=600, deadline=None)
@given(TEXTS, st.sampled_from(FORMATS))
@example('<tool_call>{"name": "f", "arguments": {}}WORD', "hermes")
def test_no_word_is_lost(text, tool_format):
    events = parse([text], tool_format)
    shown = "".join(getattr(event, "text", getattr(event, "fragment", getattr(event, "name", ""))) for event in events)
    # In arguments of the XML style a word may be part of a tag, and in JSON part of a key that is passed over.
    if not any(isinstance(event, CallStart) for event in events):
        assert shown == text
    elif tool_format not in ("qwen3_coder", "qwen3_xml") and '"' not in text.replace('"name": "f"', "").replace(
            '"arguments":', "").replace('"parameters":', "").replace('"n":', ""):
        assert shown.count("WORD") == text.count("WORD")


def test_a_word_held_back_no_longer_than_needed():
    parser = make_parser("hermes", None, TOOLS, thinking_open=None)
    assert parser.push("a <tool_") == [Content("a ")]
    assert parser.push("b") == [Content("<tool_b")]
    assert parser.push("<tool_call>{") == []
    assert parser.push('"name": "f", "arguments": {') == [CallStart(0, "f"), CallArguments(0, "{")]
    assert parser.push('"x": "<') == [CallArguments(0, '"x": "<')]
    llama = make_parser("llama3_json", None, TOOLS, thinking_open=None)
    assert llama.push('{"answer"') == [Content('{"answer"')]
    coder = make_parser("qwen3_coder", None, TOOLS, thinking_open=None)
    coder.push("<function=f><parameter=x>\n")
    assert coder.push("ab\n") == [CallArguments(0, "ab")]
    assert coder.push("c") == [CallArguments(0, "\\nc")]


def test_without_tools_marks_are_text():
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    for tool_format, tools in (("hermes", None), ("hermes", []), (None, TOOLS)):
        parser = make_parser(tool_format, None, tools, thinking_open=None)
        assert parser.push(text) + parser.finish() == [Content(text)]


@pytest.mark.parametrize(("text", "name", "events"), [
    ('[{"name": "f", "parameters": {"n": 1}}, {"name": "g", "parameters": {}}]', None, call(0, '{"n": 1}') + call(1, "{}", "g")),
    ('{"name": "f", "parameters": {}}', None, call(0, "{}")),
    ("[", None, [Content("[")]),
    ("no", None, [Content("no")]),
    (' {"n": 1}', "f", call(0, '{"n": 1}')),
    ('{"n": ', "f", call(0, '{"n": ', complete=False)),
    ("[1]", "f", [Content("[1]")]),
])
def test_plain_json(text, name, events):
    assert parse([text], JSON, name=name) == parse(text, JSON, name=name) == events


def test_closing_control_tokens_are_dropped_at_the_end_only():
    ends = ("</s>", "<|im_end|>")
    for text, events in (
            ("a</s>", [Content("a")]), ("a</s>\n<|im_end|></s> ", [Content("a")]), ("<s>a</s> b", [Content("<s>a</s> b")]),
            ("a</s", [Content("a</s")]), ("a</s>\n</s", [Content("a</s>\n</s")]),
            ('<tool_call>{"name": "f", "arguments": {"x": "</s>"}}</tool_call></s>', call(0, '{"x": "</s>"}'))):
        assert parse([text], ends=ends) == parse(text, ends=ends) == events


def test_calls_inside_reasoning_are_none():
    text = '<think>\nSo <tool_call>{"name": "f"}</tool_call>\n</think>\n\n<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    events = [Reasoning('So <tool_call>{"name": "f"}</tool_call>'), *call(0, "{}")]
    assert parse([text], "hermes", "qwen3") == parse(text, "hermes", "qwen3") == events


def nested(depth: int) -> str:
    return '<tool_call>{"name": "f", "arguments": ' + '{"a":' * depth


HARD = {
    "angle": lambda n: "<" * n, "brace": lambda n: "{" * n, "begun": lambda n: "<tool_cal" * (n // 9),
    "mark": lambda n: "<tool_call>" * (n // 11), "newlines": lambda n: "\n" * n, "deep": lambda n: nested(n // 5),
    "text": lambda n: '<tool_call>{"name": "f", "arguments": {"x": "' + "a\\n" * (n // 3),
    "late": lambda n: '<tool_call>{"arguments": {"x": "' + "a" * n, "spaces": lambda n: "<tool_call>" + " " * n,
    "calls": lambda n: '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n' * (n // 54),
    "mistral": lambda n: "[TOOL_CALLS]" + "a" * n, "list": lambda n: '[TOOL_CALLS][' + '{"name":"f","arguments":{}},' * (n // 28),
    "xml": lambda n: "<function=f><parameter=o>" + "</param\n" * (n // 8), "keys": lambda n: "<function=" + "a" * n,
    "digits": lambda n: '<tool_call>{"name": "f", "arguments": {"x": ' + "1" * n,
    "think": lambda n: "</think" * (n // 7), "ends": lambda n: "</s>" * (n // 4),
}


@pytest.mark.parametrize("pieces", ["whole", "characters"])
@pytest.mark.parametrize("kind", HARD)
def test_time_is_linear(kind, pieces):
    size = {"whole": 100_000, "characters": 6_000}[pieces]
    formats = {"mistral": ["mistral"], "list": ["mistral"], "xml": ["qwen3_coder"], "keys": ["qwen3_coder"],
               "brace": ["llama3_json", "hermes"]}.get(kind, ["hermes", "qwen3_coder"])

    def took(length: int) -> float:
        text = HARD[kind](length)
        begin = time.process_time()
        for tool_format in formats:
            parse([text] if pieces == "whole" else text, tool_format, "deepseek_r1" if kind == "think" else None,
                  ends=("</s>",))
        return time.process_time() - begin

    gc.disable()
    try:
        for _ in range(3):  # a busy machine may spoil one measurement, quadratic time spoils all
            short, long = (statistics.median(took(n) for _ in range(3)) for n in (size, 2 * size))
            if long < 3 * short + 0.002:
                return
    finally:
        gc.enable()
    raise AssertionError((short, long))


@pytest.mark.parametrize(("template", "tool_format"), [
    ("qwen25", "hermes"), ("qwen3", "hermes"), ("llama3", "llama3_json"), ("mistral", "mistral"), ("chatml", None),
    ("llama2", None), ("gemma", None), ("zephyr", None), ("phi3", None)])
def test_detection(template, tool_format):
    assert detect_tool_format((TEMPLATES / f"{template}.jinja").read_text()) == tool_format


@pytest.mark.parametrize(("template", "tool_format"), [
    ("{% if tools %}Write <tool_call>\n<function=name>\n<parameter=key>\nvalue\n</parameter>{% endif %}", "qwen3_coder"),
    ("{% for t in tools %}{% endfor %}<tool_call>{{ name }}\n<arg_key>{{ k }}</arg_key>", None),
    ("{% if tools %}<tool_call>[{'name': ..}]</tool_call>{% endif %}", "hermes"),
    ("{% if tools %}{{ '<|python_tag|>' }}{% endif %}", "llama3_json"),
    ("{{ tools }}[TOOL_CALLS]name[ARGS]", "mistral"),
    ("<tool_call>", None),
    ("", None),
])
def test_detection_of_features(template, tool_format):
    assert detect_tool_format(template) == tool_format


def test_special_tokens_are_needed_where_marks_are_special():
    assert needs_special_tokens("mistral", None, {"[TOOL_CALLS]", "</s>"})
    assert needs_special_tokens("hermes", None, {"<tool_call>"})
    assert needs_special_tokens(None, "qwen3", {"</think>"})
    assert not needs_special_tokens("hermes", "qwen3", {"<|im_end|>"})
    assert not needs_special_tokens("llama3_json", None, {"<|python_tag|>"})
    assert not needs_special_tokens(None, None, {"</think>"})


@pytest.mark.parametrize(("tool_format", "reasoning", "option"), [
    ("nope", None, "tool_call_parser"), (None, "nope", "reasoning_parser")])
def test_unknown_names_are_refused(tool_format, reasoning, option):
    with pytest.raises(ConfigError, match=r"hermes.*'nope'" if tool_format else r"qwen3.*'nope'") as caught:
        make_parser(tool_format, reasoning, TOOLS, thinking_open=None)
    assert caught.value.param == option
