"""octavo.server.turn: reasoning, calls and constraints of the answer together; and octavo.server.prompting."""

import json
from typing import Any

import fake_service
import numpy as np
import pytest
from fake_service import CHATML, HERMES, THINKING, ask, texts, tokenizer

from octavo.messages import EngineRequest
from octavo.text.matcher import compile_grammar

PATH = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
JSON = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {
    "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}}}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
OPENED = THINKING + "{% if add_generation_prompt %}<think>\n{% endif %}"


def sent(body: dict[str, Any], **options: Any) -> EngineRequest:
    """The request that reaches the engine."""
    return fake_service.sent(PATH, {"messages": USER, **body}, **options)


def allows(request: EngineRequest, text: str) -> bool:
    """Whether the request's grammar lets a whole output through."""
    tok = tokenizer()
    if request.grammar is None:
        return True
    matcher = compile_grammar(request.grammar.text, tok, tok.eos_token_ids)
    ids = [*tok.encode(text, add_special_tokens=False), tok.eos_token_ids[0]]
    words = np.zeros(-(-tok.vocab_size // 32), np.int32)
    for i, token in enumerate(ids):
        assert matcher(np.array(ids[:i], np.int32), words), matcher.error
        if not words[token // 32] >> token % 32 & 1:
            return False
    return True


@pytest.mark.parametrize(("template", "body", "good", "bad"), [
    (CHATML, JSON, ['{"a": 1}'], ['<think>so</think>{"a": 1}', "no", '{"a": "b"}']),
    (THINKING, JSON, ['{"a": 1}', '<think>so {"b"</think>\n\n{"a": 1}'], ["no", "<think>so</think>no", CALL]),
    (OPENED, JSON, ['so</think>\n\n{"a": 1}'], ["so</think>no"]),
    (OPENED, {"guided_choice": ["yes", "no"]}, ["so</think>yes"], ["so</think>maybe"]),
    (HERMES, {**JSON, "tools": [WEATHER]}, ['{"a": 1}', CALL, CALL + "\n" + CALL], ["no", CALL.replace("city", "x")]),
    (HERMES, {**JSON, "tools": [WEATHER], "parallel_tool_calls": False}, ['{"a": 1}', CALL], [CALL + "\n" + CALL]),
    (OPENED, {**JSON, "tools": [WEATHER]}, ['so</think>{"a": 1}', "so</think>" + CALL], ["so</think>no"]),
    (HERMES, {**JSON, "tools": [WEATHER], "tool_choice": "none"}, ['{"a": 1}'], [CALL]),
    (HERMES, {**JSON, "tools": [WEATHER], "tool_choice": "required"}, [CALL], ['{"a": 1}']),
    (HERMES, {"tools": [WEATHER], "parallel_tool_calls": False}, ["no", CALL], [CALL + "\n" + CALL]),
])
def test_a_constraint_is_one_of_the_answer(template: str, body: dict[str, Any], good: list[str], bad: list[str]) -> None:
    request = sent(body, template=template)
    assert [text for text in good if not allows(request, text)] == []
    assert [text for text in bad if allows(request, text)] == []


def test_what_a_grammar_let_through_is_read() -> None:
    said = texts('so</think>\n\n{"a": 1}', "so</think>" + CALL)
    choices = ask(said, PATH, {"messages": USER, "n": 2, "tools": [WEATHER], **JSON}, template=OPENED).json["choices"]
    assert [choice["message"]["reasoning"] for choice in choices] == ["so", "so"]
    assert json.loads(choices[0]["message"]["content"]) == {"a": 1} and choices[0]["finish_reason"] == "stop"
    assert choices[1]["message"]["tool_calls"][0]["function"]["name"] == "get_weather"
    assert choices[1]["finish_reason"] == "tool_calls"


def test_a_grammar_speaks_of_the_whole_output() -> None:
    body = {"messages": USER, "guided_grammar": 'start: "</think>" /[a-z]+/'}
    message = ask(texts("</think>abc"), PATH, body, template=OPENED).json["choices"][0]["message"]
    assert message["content"] == "</think>abc" and message["reasoning"] is None
    refused = ask(texts("x"), PATH, {**body, "tools": [WEATHER]}, template=HERMES)
    assert refused.status == 400 and refused.json["error"]["param"] == "tools"


@pytest.mark.parametrize(("begun", "said", "reasoning", "content"), [
    ("<think>a", "b</think>c", "b", "c"), ("<think>a</think>", "b", None, "b"), ("a", "b", None, "b")])
def test_a_message_to_be_continued_within_its_reasoning(begun: str, said: str, reasoning: str | None, content: str) -> None:
    body = {"messages": [*USER, {"role": "assistant", "content": begun}], "continue_final_message": True}
    message = ask(texts(said), PATH, body, template=THINKING).json["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (reasoning, content)


def test_what_the_operator_chose() -> None:
    said = texts("<think>so</think>x" + CALL)
    body = {"messages": USER, "tools": [WEATHER]}
    plain = ask(said, PATH, {"messages": USER}, template=THINKING, server={"reasoning_parser": "none"})
    assert plain.json["choices"][0]["message"]["content"].startswith("<think>so</think>x")
    refused = ask(said, PATH, body, template=HERMES, server={"enable_auto_tool_choice": False})
    assert refused.status == 400 and refused.json["error"]["param"] == "tool_choice"
    given = ask(said, PATH, body, template=CHATML, server={"tool_call_parser": "hermes", "reasoning_parser": "qwen3"})
    message = given.json["choices"][0]["message"]
    assert (message["reasoning"], message["content"], len(message["tool_calls"])) == ("so", "x", 1)


def test_a_model_without_a_template() -> None:
    reply = ask(texts("x"), PATH, {"messages": USER}, template=None)
    assert reply.status == 400 and "chat template" in reply.json["error"]["message"]


@pytest.mark.parametrize("choice", ["auto", "none", "required", {"type": "function", "function": {"name": "get_weather"}}])
@pytest.mark.parametrize(("schema", "said"), [
    ({"properties": {"a": {"type": "integer", "multipleOf": 999983}}}, "multipleOf"),
    ({"description": "a" * (64 << 10)}, "more than 65536 bytes"),
    ({"properties": json.loads('{"a":' * 64 + "{}" + "}" * 64)}, "nested more than 64 deep")])
def test_a_tool_s_schema_is_refused_in_every_mode(choice: Any, schema: dict[str, Any], said: str) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": schema}}
    reply = ask(texts("x"), PATH, {"messages": USER, "tools": [tool], "tool_choice": choice}, template=HERMES)
    error = reply.json["error"]
    assert (reply.status, error["param"]) == (400, "tools") and error["message"].startswith("tools[0].function.parameters")
    assert said in error["message"]


def test_a_forced_grammar_that_cannot_be_used_is_the_tools_mistake() -> None:
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": {"description": "a" * 40_000}}} for i in range(2)]
    for tool_choice, status in (("none", 200), ("required", 400)):
        reply = ask(texts("x"), PATH, {"messages": USER, "tools": tools, "tool_choice": tool_choice}, template=CHATML)
        assert reply.status == status
    assert reply.json["error"]["param"] == "tools" and reply.json["error"]["message"].startswith("tools cannot be used")


@pytest.mark.parametrize(("server", "body", "param"), [
    ({"max_schema_bytes": 50}, {"tools": [WEATHER]}, "tools"), ({"max_schema_depth": 3}, {"tools": [WEATHER]}, "tools"),
    ({"max_schema_bytes": 20}, JSON, "response_format"), ({"max_schema_depth": 2}, JSON, "response_format"),
    ({"max_regex_bytes": 3}, {"structured_outputs": {"regex": "abcd"}}, "structured_outputs")])
def test_limits_of_constraints_are_the_operator_s(server: dict[str, Any], body: dict[str, Any], param: str) -> None:
    body = {"messages": USER, **body}
    assert ask(texts("x"), PATH, body, template=HERMES).status == 200
    reply = ask(texts("x"), PATH, body, template=HERMES, server=server)
    assert (reply.status, reply.json["error"]["param"]) == (400, param)
