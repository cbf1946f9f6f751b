"""Reasoning: where it begins and ends, in any pieces."""

import pathlib

import pytest

from octavo.server.tools.events import Content, Reasoning, join
from octavo.server.tools.reasoning import ReasoningParser, detect_reasoning_format, thinking_open

TEMPLATES = pathlib.Path(__file__).resolve().parents[2] / "data" / "text" / "templates"
R, C = Reasoning, Content


def parse(pieces, name, opened):
    parser = ReasoningParser(name, opened)
    return join([event for piece in pieces for event in parser.push(piece)] + parser.finish())


@pytest.mark.parametrize(("name", "opened", "text", "events"), [
    ("qwen3", None, "hi", [C("hi")]),
    ("qwen3", None, "\n hi <think>", [C("\n hi <think>")]),
    ("qwen3", None, "<think>\n\na\n\nb\n</think>\n\n  hi\n", [R("a\n\nb"), C("  hi\n")]),
    ("qwen3", None, "\n<think>a</think>hi</think><think>", [R("a"), C("hi</think><think>")]),
    ("qwen3", None, "<thin", [C("<thin")]),
    ("qwen3", None, "<think>\n\n</think>\n\nhi", [C("hi")]),
    ("qwen3", True, "a</think>b", [R("a"), C("b")]),
    ("qwen3", True, "\n<think>a</think>b", [R("a"), C("b")]),
    ("qwen3", True, "\n\n a\n</think>b", [R(" a"), C("b")]),
    ("qwen3", True, "cut short\n", [R("cut short\n")]),
    ("qwen3", True, "a </thin", [R("a </thin")]),
    ("qwen3", True, "", []),
    ("qwen3", False, "hi </think>", [C("hi </think>")]),
    ("deepseek_r1", None, "a</think>b", [R("a"), C("b")]),
    ("deepseek_r1", None, "all of it", [R("all of it")]),
    ("deepseek_r1", False, "all of it", [C("all of it")]),
    ("deepseek_r1", False, "<think>a</think>b", [R("a"), C("b")]),
    ("mistral", None, "[THINK]a</think>[/THINK]b", [R("a</think>"), C("b")]),
])
def test_splitting(name, opened, text, events):
    assert parse([text], name, opened) == parse(text, name, opened) == events
    for i in range(len(text)):
        assert parse([text[:i], text[i:]], name, opened) == events


def test_the_prompt_says_whether_it_is_begun():
    assert thinking_open("<|im_start|>assistant\n<think>\n", "qwen3") is True
    assert thinking_open("<think>\n\n</think>\n\n", "deepseek_r1") is False
    assert thinking_open("what is <think>? <|im_start|>assistant\n", "qwen3") is None
    assert thinking_open("<think>", None) is None


@pytest.mark.parametrize(("template", "name"), [("qwen3", "qwen3"), ("qwen25", None), ("llama3", None), ("chatml", None)])
def test_detection(template, name):
    assert detect_reasoning_format((TEMPLATES / f"{template}.jinja").read_text()) == name


def test_detection_of_marks():
    assert detect_reasoning_format("{% if '</think>' in content %}") == "deepseek_r1"
    assert detect_reasoning_format("[THINK]") == "mistral"
