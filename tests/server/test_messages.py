"""octavo.server.messages: every option streamed and whole, in the shapes of Anthropic's own types and through its own client."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import anthropic
import fake_service
import pydantic
import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from fake_service import CHATML, HERMES, THINKING, Reply, ask, make_service, send_request, texts, tokenizer
from loopback import listening, survey

from octavo.server.messages_input import MessagesRequest, Said

PATH = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
USER = [{"role": "user", "content": "Hi"}]
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
WEATHER = {"name": "get_weather", "description": "Weather.", "input_schema": CITY}
NAMED = {"type": "tool", "name": "get_weather"}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Größe", "n": 1e400}}\n</tool_call>'
SAID = texts("<think>hm 🎉</think>\n\nThe capital" + CALL + "\n" + CALL)
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(RawMessageStreamEvent)
ALWAYS = HERMES + "{# <think> #}"  # a template that speaks of reasoning and has no switch for it


def events_of(reply: Reply) -> list[Any]:
    """The stream's events, each checked by Anthropic's types; the name before an event is its own."""
    *parts, rest = reply.body.decode().split("\n\n")
    assert rest == "" and reply.complete
    found = []
    for part in parts:
        name, data = part.split("\n")
        found.append(event := json.loads(data.removeprefix("data: ")))
        assert name == f"event: {event['type']}"
        if event["type"] != "error":
            EVENT.validate_python(event, strict=True)
    return found


def fold(events: list[Any]) -> Any:
    """The message that the events add up to; every rule about their order is checked."""
    first, *middle, delta, last = events
    assert (first["type"], delta["type"], last) == ("message_start", "message_delta", {"type": "message_stop"})
    message = first["message"]
    assert message["content"] == [] and message["stop_reason"] is None and message["usage"]["output_tokens"] == 0
    is_open = False
    for event in middle:
        blocks = message["content"]
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(blocks)
            blocks.append(event["content_block"])
            is_open, fragments = True, ""
            continue
        assert is_open and event["index"] == len(blocks) - 1
        block = blocks[-1]
        if event["type"] == "content_block_stop":
            is_open = False
            if block["type"] == "tool_use":
                assert block["input"] == {}
                try:
                    block["input"] = json.loads(fragments)
                except ValueError:
                    assert delta["delta"]["stop_reason"] != "tool_use"
            continue
        kind = event["delta"]["type"]
        if kind == "input_json_delta":
            fragments += event["delta"]["partial_json"]
        else:
            name = {"text_delta": "text", "thinking_delta": "thinking", "signature_delta": "signature"}[kind]
            block[name] += event["delta"][name]
    assert not is_open
    return message | delta["delta"] | {"usage": delta["usage"]}


def comparable(message: Any) -> Any:
    """A message without what differs by chance."""
    content = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return {name: value for name, value in message.items() if name != "id"} | {"content": content}


OPTIONS: list[dict[str, Any]] = [
    {}, {"tools": [WEATHER]}, {"tools": [WEATHER], "tool_choice": {"type": "none"}}, {"tools": [WEATHER], "max_tokens": 4},
    {"tools": [WEATHER], "tool_choice": {"type": "any", "disable_parallel_tool_use": True}}, {"max_tokens": 1},
    {"tools": [WEATHER], "tool_choice": NAMED}, {"tools": [WEATHER], "max_tokens": 28}, {"tools": [WEATHER], "max_tokens": 45},
    {"stop_sequences": ["pit"]}, {"tools": [WEATHER], "stop_sequences": ["zzz", "get_w"]}, {"thinking": {"type": "disabled"}},
    {"tools": [WEATHER], "stop_sequences": ["öße"]},
    {"tools": [WEATHER], "thinking": {"type": "adaptive", "display": "omitted"}, "system": "Be brief."},
    {"messages": [*USER, {"role": "assistant", "content": "So"}]},
    {"output_config": {"format": {"type": "json_schema", "schema": CITY}}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)) or "plain")
def test_the_fold_of_a_stream_is_the_whole_answer(options: dict[str, Any]) -> None:
    answers = []
    for per_step in (1, 2, 3, 100):
        body = {"messages": USER, "max_tokens": 200, **options}
        stream = ask(SAID, PATH, {**body, "stream": True}, per_step=per_step, template=THINKING)
        assert stream.status == 200 and stream.headers["content-type"].startswith("text/event-stream"), stream.body
        whole = ask(SAID, PATH, body, per_step=per_step, template=THINKING)
        Message.model_validate(whole.json, strict=True)
        answers.append(comparable(whole.json))
        assert comparable(fold(events_of(stream))) == answers[-1]
    assert all(answer == answers[0] for answer in answers), "the engine's steps show in the answer"


def answer(script: Any, body: dict[str, Any], **options: Any) -> Any:
    reply = ask(script, PATH, {"messages": USER, "max_tokens": 200, **body}, **{"template": THINKING, **options})
    assert reply.status == 200, reply.body
    Message.model_validate(reply.json, strict=True)
    return reply.json


def test_the_whole_message() -> None:
    message = answer(SAID, {"tools": [WEATHER]})
    assert message["id"].startswith("msg_") and (message["type"], message["role"]) == ("message", "assistant")
    assert (message["model"], message["stop_reason"], message["stop_sequence"]) == ("some/model", "tool_use", None)
    thinking, text, call, *_, other = message["content"]
    assert thinking == {"type": "thinking", "thinking": "hm 🎉", "signature": "unsigned"}
    assert text == {"type": "text", "text": "The capital"}
    assert call["name"] == "get_weather" and call["input"]["city"] == "Größe"
    assert call["id"].startswith("toolu_") and call["id"] != other["id"]
    assert answer(texts(""), {})["content"] == [{"type": "text", "text": ""}]


def test_arguments_stand_as_the_model_wrote_them() -> None:
    reply = ask(SAID, PATH, {"messages": USER, "max_tokens": 200, "tools": [WEATHER]}, template=HERMES)
    assert '"input":{"city": "Größe", "n": 1e400}'.encode() in reply.body


@pytest.mark.parametrize(("body", "said", "wanted"), [
    ({}, "no", ("end_turn", None)), ({"max_tokens": 1}, "a b c", ("max_tokens", None)),
    ({"stop_sequences": ["x", " b"]}, "a b c", ("stop_sequence", " b")), ({"tools": [WEATHER]}, CALL, ("tool_use", None)),
    ({"tools": [WEATHER], "tool_choice": NAMED}, CALL, ("tool_use", None)),
    ({"tools": [WEATHER], "tool_choice": {"type": "none"}}, CALL, ("end_turn", None)),
    ({"tools": [WEATHER], "max_tokens": 12}, CALL, ("max_tokens", None)),
    ({"tools": [WEATHER], "stop_sequences": ["öße"]}, CALL, ("stop_sequence", "öße")),
])
def test_stop_reasons(body: dict[str, Any], said: str, wanted: tuple[str, str | None]) -> None:
    message = answer(texts(said), body, template=HERMES)
    assert (message["stop_reason"], message["stop_sequence"]) == wanted


def test_usage() -> None:
    usage = answer(texts("a"), {}, template=CHATML)["usage"]
    count = ask(texts("x"), COUNT, {"messages": USER}).json["input_tokens"]
    assert usage["cache_read_input_tokens"] == 8 and usage["input_tokens"] + 8 == count
    assert usage["output_tokens"] == 2 and usage["cache_creation_input_tokens"] == 0


def test_a_text_of_other_line_ends_stays_one_line() -> None:
    said = "a\u2028b\u2029c\x85d\x0be\r\nf"
    reply = ask(texts(said), PATH, {"messages": USER, "max_tokens": 90, "stream": True})
    assert fold(events_of(reply))["content"][0]["text"] == said
    assert all(len(part.splitlines()) == 2 for part in reply.body.decode().strip().split("\n\n"))


def sent(body: dict[str, Any], **options: Any) -> Any:
    """The request that reaches the engine."""

    async def run() -> Any:
        service, link = make_service(texts("x"), **options)
        reply = await send_request(service, PATH, {"messages": USER, "max_tokens": 100, **body})
        assert reply.status == 200, reply.body
        service.close()
        return link.requests[0]

    return asyncio.run(run())


def prompt(body: dict[str, Any], **options: Any) -> str:
    return tokenizer().decode(sent(body, **options).prompt_token_ids, skip_special_tokens=False)


LISTING = ("{% for m in messages %}[{{ m.role }}|{{ m.content }}|{{ m.reasoning_content }}|{{ m.tool_call_id }}|{{ m.is_error }}|"
           "{% for c in m.tool_calls or [] %}{{ c.id }} {{ c.function.name }} {{ c.function.arguments | tojson }};{% endfor %}]"
           "{% endfor %}{{ (tools or []) | tojson }}<tool_call><think>")


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value, "cache_control": {"type": "ephemeral"}, "citations": None}


def result(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "tool_result", "tool_use_id": name, **more}


@pytest.mark.parametrize(("messages", "wanted"), [
    (USER, "[user|Hi||||]"), ([*USER, {"role": "user", "content": [text("a"), text("b")]}], "[user|Hi\na\nb||||]"),
    ([{"role": "system", "content": [text("s")]}, *USER], "[system|s||||][user|Hi||||]"),
    ([*USER, {"role": "assistant", "content": [
        {"type": "thinking", "thinking": "hm", "signature": "s"}, text("So"), text("so"),
        {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}, "caller": None},
        {"type": "tool_use", "id": "2", "name": "g", "input": {}}]},
      {"role": "user", "content": [result("1", content="42"), result("2", content=[text("no")], is_error=True), text("And?")]}],
     '[user|Hi||||][assistant|So\nso|hm|||1 f {"a": 1};2 g {};][tool|42||1||][tool|no||2|True|][user|And?||||]'),
    ([*USER, {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {}}]},
      {"role": "user", "content": [result("1")]}], "[user|Hi||||][assistant|||||1 f {};][tool|||1||]"),
])
def test_blocks_become_messages(messages: Any, wanted: str) -> None:
    assert prompt({"messages": messages}, template=LISTING) == wanted + "[]<tool_call><think>"


def test_an_answer_can_be_sent_back() -> None:
    content = [block for block in answer(texts(CALL.replace(', "n": 1e400', "")), {"tools": [WEATHER]})["content"]]
    results = [result(block["id"], content="20") for block in content if block["type"] == "tool_use"]
    messages = [*USER, {"role": "assistant", "content": content}, {"role": "user", "content": results}]
    assert "[tool|20||toolu_" in prompt({"messages": messages}, template=LISTING)


def test_system_and_tools_reach_the_template() -> None:
    body = {"system": [text("Be"), text("brief.")], "tools": [{**WEATHER, "type": "custom", "cache_control": {}, "strict": True}]}
    told = prompt(body, template=LISTING)
    assert told.startswith("[system|Be\nbrief.||||][user|Hi||||]") and "cache_control" not in told
    assert '{"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": {' in told
    assert prompt({"system": "S"}, template=LISTING).startswith("[system|S||||]")


def test_a_last_message_of_the_assistant_is_continued() -> None:
    for content in ("So", [text("So")]):
        assert prompt({"messages": [*USER, {"role": "assistant", "content": content}]}).endswith("assistant\nSo")


def test_thinking() -> None:
    def closed(thinking: Any, **more: Any) -> bool:
        return "</think>" in prompt({"thinking": thinking, **more}, template=THINKING)

    assert closed({"type": "disabled"}) and closed({"type": "disabled"}, output_config={"effort": "high"})
    assert not closed({"type": "enabled", "budget_tokens": 99}) and not closed({"type": "adaptive", "display": "summarized"})
    assert not closed(None) and closed(None, output_config={"effort": "none"})
    assert "</think>" not in prompt({"thinking": {"type": "disabled"}})
    assert sent({"thinking": {"type": "adaptive"}}, template=ALWAYS) and sent(
        {"thinking": {"type": "disabled"}}, template=ALWAYS, server={"reasoning_parser": "none"})
    assert prompt({"thinking": {"type": "disabled"}}, template="{{ reasoning_effort }}!") == "none!"
    effort = {"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}
    assert prompt(effort, template="{{ reasoning_effort }}!") == "low!"
    omitted = answer(SAID, {"thinking": {"type": "adaptive", "display": "omitted"}})
    assert "thinking" not in {block["type"] for block in omitted["content"]}


def test_tools_are_forced_as_asked() -> None:
    assert sent({"tools": [WEATHER]}, template=HERMES).grammar is None
    for change in ({"tool_choice": {"type": "any"}}, {"tool_choice": NAMED}, {"tools": [WEATHER | {"strict": True}]},
                   {"tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}):
        assert sent({"tools": [WEATHER], **change}, template=HERMES).grammar is not None
    found = sent({"output_config": {"format": {"type": "json_schema", "schema": CITY}}}).params.structured_outputs
    assert found.json == CITY


def test_count_tokens() -> None:
    body = {"messages": USER, "system": "S", "tools": [WEATHER], "tool_choice": {"type": "auto"}, "model": "some/model",
            "thinking": {"type": "disabled"}, "cache_control": {"type": "ephemeral"}}
    reply = ask(texts("x"), COUNT, body, template=THINKING).json
    MessageTokensCount.model_validate(reply, strict=True)
    assert reply == {"input_tokens": len(sent(body, template=THINKING).prompt_token_ids)}
    unnamed = {"tools": [{"name": "?", "input_schema": {}}]}
    for change, status in (({"model": "x"}, 404), ({"max_tokens": 1}, 400), (unnamed, 400)):
        refused = ask(texts("x"), COUNT, {**body, **change}, template=THINKING)
        assert refused.status == status and refused.json["type"] == "error"
    assert refused.json["error"]["message"].startswith("tools[0].name must be")


PARAMETERS: dict[str, Any] = {"temperature": 0.25, "top_p": 0.5, "top_k": 7, "max_tokens": 77, "stop_sequences": ["a", "b"]}
WITHOUT_EFFECT = {"metadata": {"user_id": "me"}, "service_tier": "standard_only", "cache_control": {"type": "ephemeral"}}
ELSEWHERE = {"messages", "model", "system", "tools", "tool_choice", "thinking", "output_config", "stream", "timeout"}


def test_every_field_is_in_one_of_the_tables() -> None:
    assert set(MessagesRequest.__struct_fields__) == {*PARAMETERS, *WITHOUT_EFFECT, *ELSEWHERE}
    assert set(Said.__struct_fields__) < set(MessagesRequest.__struct_fields__)


@pytest.mark.parametrize("name", PARAMETERS)
def test_fields_that_become_parameters(name: str) -> None:
    parameter, value = {"stop_sequences": "stop"}.get(name, name), PARAMETERS[name]
    found = getattr(sent({name: value}).params, parameter)
    assert found == (tuple(value) if isinstance(value, list) else value)
    assert getattr(sent({} if name == "max_tokens" else {name: None}).params, parameter) != found


def test_other_fields() -> None:
    assert answer(texts("x"), {**WITHOUT_EFFECT, "model": "some/model"}, template=CHATML)["stop_reason"] == "end_turn"


def message(role: str, *blocks: Any) -> dict[str, Any]:
    return {"messages": [*USER, {"role": role, "content": list(blocks)}, *USER]}


IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": ""}}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens is required"), ({"max_tokens": 0}, "max_tokens must be"),
    ({"messages": None}, "messages is required"),
    ({"messages": []}, "messages must not be empty"), ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"), ({"messages": [1]}, "messages[0]"),
    ({"messages": "Hi"}, "messages"),
    (message("user", IMAGE), "messages[1].content[0]: type 'image'"), (message("user", 1), "messages[1].content[0]"),
    (message("user", {"type": "text"}), "messages[1].content[0].text"),
    (message("user", {"type": "document"}), "messages[1].content[0]"),
    (message("user", {"type": "tool_use", "id": "1", "name": "f", "input": {}}), "messages[1].content[0]: type 'tool_use'"),
    (message("user", result("1", content=[IMAGE])), "messages[1].content[0].content[0]: type 'image'"),
    (message("user", {"type": "tool_result", "content": "a"}), "messages[1].content[0].tool_use_id"),
    (message("user", result("1", is_error=1)), "messages[1].content[0].is_error"),
    (message("assistant", result("1")), "messages[1].content[0]"),
    (message("assistant", {"type": "redacted_thinking", "data": "x"}), "messages[1].content[0]: type 'redacted_thinking'"),
    (message("assistant", {"type": "thinking"}), "messages[1].content[0].thinking"),
    (message("assistant", {"type": "tool_use", "id": "1", "name": "f", "input": "{}"}), "messages[1].content[0].input"),
    (message("assistant", {"type": "tool_use", "id": "1", "input": {}}), "messages[1].content[0].name"),
    ({"messages": message("assistant", {"type": "tool_use", "id": "1", "name": "f", "input": {}})["messages"][:2]},
     "messages must not end with a tool_use"),
    ({"messages": [{"role": "user", "content": "Hi " * 5000}]}, "prompt has"), ({"max_tokens": 4090}, "prompt has"),
    ({"system": 1}, "system"), ({"system": [IMAGE]}, "system[0]: type 'image'"), ({"temperature": -1}, "temperature must be"),
    ({"top_p": 0}, "top_p must be"), ({"top_k": 1.5}, "top_k"), ({"stop_sequences": [""]}, "stop_sequences must hold"),
    ({"stop_sequences": ["a"] * 17}, "stop_sequences"), ({"stop_sequences": "a"}, "stop_sequences"),
    ({"service_tier": "auto_only"}, "service_tier must be"), ({"tools": [WEATHER]}, "This model's chat template knows no tools"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema is required"),
    ({"tools": [{"name": "", "input_schema": {}}]}, "tools[0].name must be"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]: type 'web_search_20250305'"),
    ({"tools": [{"name": "f", "input_schema": {"type": "x"}}]}, "tools[0].input_schema.type must be"),
    ({"tool_choice": {"type": "any"}}, "tool_choice is only allowed"),
    ({"tools": [WEATHER], "tool_choice": {}}, "tool_choice.type must be"),
    ({"tools": [WEATHER], "tool_choice": {"type": ["any"]}}, "tool_choice.type must be"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name must be"),
    ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "f"}}, "tool_choice names 'f'"),
    ({"tools": [WEATHER], "tool_choice": {"type": "any", "disable_parallel_tool_use": 1}}, "tool_choice.disable_parallel"),
    ({"thinking": {"type": "enabled", "budget_tokens": 9}}, "thinking.budget_tokens"),
    ({"thinking": {}}, "thinking.type is required"),
    ({"thinking": {"type": "adaptive", "budget_tokens": 99}}, "thinking.budget_tokens needs"),
    ({"thinking": {"type": "adaptive"}}, "thinking cannot be adaptive here"),
    ({"thinking": {"type": "x"}}, "thinking.type must be"),
    ({"thinking": {"type": "adaptive", "display": "x"}}, "thinking.display must be"),
    ({"output_config": {"effort": "low"}}, "This model's chat template knows no"),
    ({"output_config": {"x": 1}}, "output_config.x"),
    ({"output_config": {"format": {"type": "text", "schema": {}}}}, "output_config.format.type"),
    ({"timeout": 0}, "timeout must be"),
    ({"stop": ["a"]}, "stop is not a field"), ({"container": "x"}, "container is not a field"),
    ({"mcp_servers": []}, "mcp_servers is not"),
    ({"context_management": {}}, "context_management is not"), ({"speed": "fast"}, "speed is not"),
]


@pytest.mark.parametrize(("body", "start"), REFUSED, ids=lambda value: json.dumps(value)[:40])
def test_refusals(body: dict[str, Any], start: str) -> None:
    for stream in (False, True):
        reply = ask(texts("x"), PATH, {"messages": USER, "max_tokens": 99, "stream": stream, **body})
        assert reply.status == 400 and len(reply.body) < 2500, reply.body
        assert set(reply.json) == {"type", "error"} and reply.json["type"] == "error"
        assert reply.json["error"]["type"] == "invalid_request_error"
        assert reply.json["error"]["message"].startswith(start)


def test_no_value_anywhere_is_the_servers_mistake() -> None:
    body = {"messages": [
        *USER, {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, text("a"),
                                                 {"type": "tool_use", "id": "1", "name": "f", "input": {"a": 1}}]},
        {"role": "user", "content": [result("1", content=[text("b")], is_error=True)]}], "system": [text("s")],
        "tools": [WEATHER], "tool_choice": NAMED, "thinking": {"type": "adaptive"}, "max_tokens": 9, "metadata": {"user_id": "u"},
        "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": CITY}}, "stop_sequences": ["x"]}
    statuses = survey(PATH, body, template=THINKING)
    assert set(statuses) == {200, 400} and statuses.count(400) > 100


def test_what_a_model_cannot_do_about_thinking() -> None:
    reply = ask(texts("x"), PATH, {"messages": USER, "max_tokens": 9, "thinking": {"type": "disabled"}}, template=ALWAYS)
    assert reply.status == 400 and "always reasons" in reply.json["error"]["message"]


def test_an_error_of_the_engine() -> None:
    body = {"messages": USER, "max_tokens": 99}
    wanted = {"type": "error", "error": {"type": "api_error", "message": "The request failed."}}
    whole = ask(SAID, PATH, body, fail=3)
    assert (whole.status, whole.json) == (500, wanted)
    assert ask(SAID, PATH, {**body, "stream": True}, fail=0).status == 500
    late = ask(texts("one two three four"), PATH, {**body, "stream": True}, fail=4)
    assert events_of(late)[-1] == wanted and b"dead" not in late.body


def test_a_deadline_and_a_client_that_leaves() -> None:
    body = {"messages": USER, "max_tokens": 99, "stream": True}
    late = asyncio.run(fake_service.late_and_left(PATH, SAID, {**body, "timeout": 0.05}, body))
    assert events_of(late)[-1]["error"]["type"] == "timeout_error"


# Anthropic's own client.


@pytest.fixture(scope="module")
def client() -> Iterator[anthropic.Anthropic]:
    with listening(texts("<think>hm</think>\n\nThe capital" + CALL.replace(', "n": 1e400', "")), keys=("sk-1",),
                   template=THINKING) as (address, _), \
            anthropic.Anthropic(base_url=address, api_key="sk-1", max_retries=0, timeout=10) as found:
        yield found


def test_the_client(client: anthropic.Anthropic) -> None:
    asked: Any = {"model": "some/model", "max_tokens": 200, "messages": USER, "tools": [WEATHER],
                  "thinking": {"type": "adaptive"}}
    whole = client.messages.create(**asked)
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"] and whole.stop_reason == "tool_use"
    with client.messages.stream(**asked) as stream:
        heard = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert heard == "The capital"
    assert final.usage.output_tokens == whole.usage.output_tokens and final.stop_reason == whole.stop_reason
    assert [block.type for block in final.content] == ["thinking", "text", "tool_use"]
    assert final.content[-1].input == whole.content[-1].input == {"city": "Größe"}  # type: ignore[union-attr]
    call: Any = whole.content[-1]
    again = [*USER, {"role": "assistant", "content": whole.content},
             {"role": "user", "content": [result(call.id, content="20")]}]
    assert client.messages.create(**asked | {"messages": again}).stop_reason == "tool_use"
    assert client.messages.count_tokens(model="some/model", messages=asked["messages"]).input_tokens > 5
    kinds = [event.type for event in client.messages.create(**asked, stream=True)]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"


def test_the_clients_errors(client: anthropic.Anthropic) -> None:
    messages: Any = USER
    with pytest.raises(anthropic.BadRequestError, match="max_tokens must be"):
        client.messages.create(model="some/model", max_tokens=0, messages=messages)
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", max_tokens=5, messages=messages)
    with pytest.raises(anthropic.AuthenticationError):
        client.with_options(api_key="sk-2").messages.create(model="some/model", max_tokens=5, messages=messages)
