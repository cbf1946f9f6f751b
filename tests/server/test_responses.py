"""octavo.server.responses: every option streamed and whole, in the shapes of OpenAI's own types and through its own client."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import fake_service
import openai
import pydantic
import pytest
from fake_service import CHATML, HERMES, THINKING, Reply, ask, make_service, send_request, texts, tokenizer
from loopback import listening, survey
from openai.types.responses import Response, ResponseStreamEvent

from octavo.server.responses_input import ResponsesRequest

PATH = "/v1/responses"
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
WEATHER = {"type": "function", "name": "get_weather", "description": "Weather.", "parameters": CITY}
NAMED = {"type": "function", "name": "get_weather"}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Größe"}}\n</tool_call>'
SAID = texts("<think>hm 🎉</think>\n\nThe capital" + CALL + "\n" + CALL)
EVENT: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)
LOGPROBS = "message.output_text.logprobs"
ENDS = ("response.completed", "response.incomplete")


def events_of(reply: Reply) -> list[Any]:
    """The stream's events, each checked by OpenAI's types; the name before an event is its own."""
    *parts, rest = reply.body.decode().split("\n\n")
    assert rest == "" and reply.complete
    found = []
    for number, part in enumerate(parts):
        name, data = part.split("\n")
        found.append(event := json.loads(data.removeprefix("data: ")))
        assert name == f"event: {event['type']}" and event["sequence_number"] == number
        EVENT.validate_python(event, strict=True)
    return found


def fold(events: list[Any]) -> list[Any]:
    """The items that the events add up to; every rule about their order is checked."""
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []
    items: list[Any] = []
    for event in events[2:-1]:
        kind = event["type"]
        if kind == "response.output_item.added":
            assert event["output_index"] == len(items) and event["item"]["status"] == "in_progress"
            assert not items or items[-1]["status"] != "in_progress", "two items are open"
            items.append(event["item"])
            continue
        assert event["output_index"] == len(items) - 1
        item = items[-1]
        assert item["status"] == "in_progress" and event.get("item_id", item["id"]) == item["id"]
        if kind == "response.output_item.done":
            assert event["item"] == item | {"status": event["item"]["status"]}
            item["status"] = event["item"]["status"]
        elif kind == "response.content_part.added":
            assert item["content"] == [] and event["content_index"] == 0
            item["content"].append(event["part"])
        elif kind.endswith(".delta"):
            assert kind.startswith({"message": "response.output_text", "reasoning": "response.reasoning_text",
                                    "function_call": "response.function_call_arguments"}[item["type"]])
            if item["type"] == "function_call":
                item["arguments"] += event["delta"]
            else:
                item["content"][0]["text"] += event["delta"]
                if item["type"] == "message":
                    item["content"][0]["logprobs"] += event["logprobs"]
        elif kind == "response.content_part.done":
            assert event["part"] == item["content"][0]
        elif kind == "response.function_call_arguments.done":
            assert event["arguments"] == item["arguments"] and event["name"] == item["name"]
        else:
            assert event["text"] == item["content"][0]["text"]
            assert event.get("logprobs") == item["content"][0].get("logprobs")
    assert events[-1]["type"] in ENDS
    return items


def comparable(value: Any) -> Any:
    """An answer without what differs by chance."""
    if isinstance(value, dict):
        return {name: comparable(item) for name, item in value.items()
                if name not in ("id", "call_id", "created_at", "completed_at")}
    return [comparable(item) for item in value] if isinstance(value, list) else value


OPTIONS: list[dict[str, Any]] = [
    {}, {"tools": [WEATHER]}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": [WEATHER], "tool_choice": "required"},
    {"tools": [WEATHER], "tool_choice": NAMED, "parallel_tool_calls": False}, {"include": [LOGPROBS]}, {"top_logprobs": 2},
    {"tools": [WEATHER], "top_logprobs": 1, "include": [LOGPROBS, "reasoning.encrypted_content"]}, {"max_output_tokens": 9},
    {"max_output_tokens": 1}, {"tools": [WEATHER], "max_output_tokens": 19}, {"tools": [WEATHER], "max_output_tokens": 28},
    {"stop": "pit"}, {"tools": [WEATHER], "stop": ["get_w"]}, {"reasoning": {"effort": "none"}, "tools": [WEATHER]},
    {"text": {"format": {"type": "json_schema", "name": "x", "schema": CITY, "strict": True}}, "instructions": "Be brief.",
     "metadata": {"a": "b"}, "stream_options": {"include_obfuscation": False}},
    {"skip_special_tokens": False, "ignore_eos": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)) or "plain")
def test_the_fold_of_a_stream_is_the_whole_answer(options: dict[str, Any]) -> None:
    answers = []
    for per_step in (1, 2, 3, 100):
        body = {"input": "Hi", **options}
        stream = ask(SAID, PATH, {**body, "stream": True}, per_step=per_step, template=THINKING)
        assert stream.status == 200 and stream.headers["content-type"].startswith("text/event-stream"), stream.body
        events = events_of(stream)
        body.pop("stream_options", None)
        whole = ask(SAID, PATH, body, per_step=per_step, template=THINKING)
        Response.model_validate(whole.json, strict=True)
        assert comparable(events[-1]["response"]) == comparable(whole.json)
        assert fold(events) == events[-1]["response"]["output"]
        answers.append(comparable(whole.json))
        # Which tokens a step's texts came from is known for the step as a whole only.
        answers[-1]["usage"]["output_tokens_details"] = None
        for item in answers[-1]["output"]:
            if item["type"] == "message" and len(answers[-1]["output"]) > 1:
                item["content"][0]["logprobs"] = None
    assert all(answer == answers[0] for answer in answers), "the engine's steps show in the answer"


def output(script: Any, body: dict[str, Any], **options: Any) -> Any:
    reply = ask(script, PATH, {"input": "Hi", **body}, **{"template": THINKING, **options})
    assert reply.status == 200, reply.body
    Response.model_validate(reply.json, strict=True)
    return reply.json


def test_the_items() -> None:
    reply = output(SAID, {"tools": [WEATHER]})
    reasoning, message, *calls = reply["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "hm 🎉"}] and reasoning["summary"] == []
    assert message["content"] == [{"type": "output_text", "text": "The capital", "annotations": [], "logprobs": []}]
    assert message["role"] == "assistant" and {item["status"] for item in reply["output"]} == {"completed"}
    assert [(call["name"], call["arguments"]) for call in calls if call["type"] == "function_call"] == [
        ("get_weather", '{"city": "Größe"}')] * 2
    assert len({item["id"] for item in reply["output"]}) == len(reply["output"])
    assert [item["id"].split("_")[0] for item in reply["output"]][:3] == ["rs", "msg", "fc"]
    ids = [call["call_id"] for call in calls if call["type"] == "function_call"]
    assert len(set(ids)) == 2 and all(name.startswith("call_") for name in ids)


def test_the_rest_of_the_response() -> None:
    reply = output(texts("Paris"), {"metadata": {"a": "b"}, "temperature": 0.5, "user": "me", "store": True}, template=CHATML)
    assert reply["id"].startswith("resp_") and reply["object"] == "response" and reply["model"] == "some/model"
    assert (reply["status"], reply["error"], reply["incomplete_details"]) == ("completed", None, None)
    assert (reply["store"], reply["background"], reply["previous_response_id"]) == (False, False, None)
    assert (reply["metadata"], reply["temperature"], reply["top_p"], reply["user"]) == ({"a": "b"}, 0.5, 1.0, "me")
    assert (reply["tools"], reply["tool_choice"], reply["parallel_tool_calls"]) == ([], "auto", True)
    assert reply["text"] == {"format": {"type": "text"}} and reply["truncation"] == "disabled"
    assert reply["completed_at"] >= reply["created_at"]
    assert output(texts("x"), {"request_id": "mine"})["id"] == "resp_mine"


def test_usage() -> None:
    usage = output(SAID, {"tools": [WEATHER]})["usage"]
    thought = len(tokenizer().encode("<think>hm 🎉</think>\n\n", add_special_tokens=False))
    assert usage["output_tokens_details"]["reasoning_tokens"] == thought
    assert usage["input_tokens_details"] == {"cached_tokens": 8, "cache_write_tokens": 0}
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert output(texts("x", end=False), {"max_output_tokens": 1})["usage"]["output_tokens"] == 1


def test_what_is_cut_off_says_so() -> None:
    cut = output(SAID, {"tools": [WEATHER], "max_output_tokens": 28})
    assert (cut["status"], cut["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert cut["completed_at"] is None
    assert [item["status"] for item in cut["output"]][-1] == "incomplete"
    assert {item["status"] for item in cut["output"][:-1]} == {"completed"}
    assert output(texts(""), {})["output"][0]["content"][0]["text"] == ""


def test_logprobs_belong_to_the_text() -> None:
    body = {"include": [LOGPROBS], "top_logprobs": 2}
    plain = output(texts("a 🎉"), body, template=CHATML)["output"][0]["content"][0]
    assert bytes(byte for token in plain["logprobs"] for byte in token["bytes"]).decode() == "a 🎉<|im_end|>"
    assert all([top["logprob"] for top in token["top_logprobs"]] == [-0.5, -1.0] for token in plain["logprobs"])
    beside = output(SAID, {**body, "tools": [WEATHER]})["output"][1]["content"][0]
    told = "".join(token["token"] for token in beside["logprobs"])
    assert told == "The capital"
    assert output(texts("a"), {}, template=CHATML)["output"][0]["content"][0]["logprobs"] == []


def test_a_text_of_other_line_ends_stays_one_line() -> None:
    said = "a\u2028b\u2029c\x85d\x0be\r\nf"
    reply = ask(texts(said), PATH, {"input": "Hi", "stream": True})
    assert fold(events_of(reply))[0]["content"][0]["text"] == said
    assert all(len(part.splitlines()) == 2 for part in reply.body.decode().strip().split("\n\n"))


def sent(body: dict[str, Any], **options: Any) -> Any:
    """The request that reaches the engine."""

    async def run() -> Any:
        service, link = make_service(texts("x"), **options)
        reply = await send_request(service, PATH, {"input": "Hi", **body}, salt="k")
        assert reply.status == 200, reply.body
        service.close()
        return link.requests[0]

    return asyncio.run(run())


def prompt(body: dict[str, Any], **options: Any) -> str:
    return tokenizer().decode(sent(body, **options).prompt_token_ids, skip_special_tokens=False)


LISTING = ("{% for m in messages %}[{{ m.role }}|{{ m.content }}|{{ m.reasoning_content }}|{{ m.tool_call_id }}|"
           "{% for c in m.tool_calls or [] %}{{ c.id }} {{ c.function.name }} {{ c.function.arguments | tojson }};{% endfor %}]"
           "{% endfor %}{{ (tools or []) | tojson }}<tool_call><think>")


def item(role: str, *texts: str) -> dict[str, Any]:
    kind = "output_text" if role == "assistant" else "input_text"
    return {"type": "message", "role": role, "content": [{"type": kind, "text": text} for text in texts]}


def call(name: str, arguments: str = "{}") -> dict[str, Any]:
    return {"type": "function_call", "call_id": name, "name": name, "arguments": arguments}


@pytest.mark.parametrize(("given", "wanted"), [
    ("Hi", "[user|Hi|||]"),
    ([{"role": "user", "content": "Hi"}, item("user", "a", "b")], "[user|Hi|||][user|a\nb|||]"),
    ([item("developer", "d"), item("system", "s"), {"role": "assistant", "content": "a", "id": "msg_1", "status": "completed"}],
     "[system|d|||][system|s|||][assistant|a|||]"),
    ([{"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
      item("assistant", "So"), call("f", '{"a": 1}'), call("g", "broken"),
      {"type": "function_call_output", "call_id": "f", "output": "42"},
      {"type": "function_call_output", "call_id": "g", "output": [{"type": "input_text", "text": "no"}]}],
     '[assistant|So|hm||f f {"a": 1};g g "broken";][tool|42||f|][tool|no||g|]'),
    ([call("f"), call("g"), item("assistant", "a"), item("assistant", "b"),
      {"type": "reasoning", "id": "rs", "summary": [{"type": "summary_text", "text": "s"}]}, call("h")],
     "[assistant||||f f {};g g {};][assistant|a|||][assistant|b|||][assistant||s||h h {};]"),
])
def test_items_become_messages(given: Any, wanted: str) -> None:
    assert prompt({"input": given}, template=LISTING) == wanted + "[]<tool_call><think>"


def test_an_answer_can_be_sent_back() -> None:
    answer = output(SAID, {"tools": [WEATHER]})["output"]
    calls = [one for one in answer if one["type"] == "function_call"]
    results = [{"type": "function_call_output", "call_id": one["call_id"], "output": "20"} for one in calls]
    told = prompt({"input": [{"role": "user", "content": "Hi"}, *answer, *results]}, template=LISTING)
    assert "[assistant|The capital|hm 🎉||call_" in told and told.count("[tool|20||call_") == 2


def test_instructions_tools_and_effort_reach_the_template() -> None:
    told = prompt({"instructions": "Be brief.", "tools": [WEATHER | {"strict": None}]}, template=LISTING)
    assert told.startswith("[system|Be brief.|||][user|Hi|||]")
    assert '[{"type": "function", "function": {"name": "get_weather", "description": "Weather.", "parameters": {' in told
    assert "strict" not in told
    assert "</think>" in prompt({"reasoning": {"effort": "none"}}, template=THINKING)
    assert "</think>" not in prompt({"reasoning": {"effort": "low", "summary": "auto"}}, template=THINKING)
    assert "</think>" in prompt({"chat_template_kwargs": {"enable_thinking": False}}, template=THINKING)


def test_tools_are_forced_as_asked() -> None:
    free = sent({"tools": [WEATHER]}, template=HERMES)
    assert free.grammar is None
    for change in ({"tool_choice": "required"}, {"tool_choice": NAMED}, {"parallel_tool_calls": False},
                   {"tools": [WEATHER | {"strict": True}]}):
        assert sent({"tools": [WEATHER], **change}, template=HERMES).grammar is not None
    named = output(texts('{"city": "Paris"}'), {"tools": [WEATHER], "tool_choice": NAMED}, template=CHATML)
    assert (named["output"][0]["name"], named["output"][0]["arguments"]) == ("get_weather", '{"city": "Paris"}')
    assert named["tool_choice"] == NAMED and named["tools"] == [WEATHER]


@pytest.mark.parametrize(("form", "wanted"), [
    ({"type": "text"}, None), ({"type": "json_object"}, {"json_object": True}),
    ({"type": "json_schema", "name": "x", "schema": CITY, "strict": False, "description": "d"}, {"json": CITY})])
def test_formats(form: dict[str, Any], wanted: dict[str, Any] | None) -> None:
    found = sent({"text": {"format": form, "verbosity": "medium"}}).params.structured_outputs
    assert found is None if wanted is None else {name: getattr(found, name) for name in wanted} == wanted
    assert output(texts("{}"), {"text": {"format": form}}, template=CHATML)["text"] == {"format": form}


# Each field with a value that differs from its default, and the parameter that it becomes where it does.
PARAMETERS: dict[str, Any] = {
    "temperature": 0.25, "top_p": 0.5, "frequency_penalty": 0.5, "presence_penalty": 0.5, "repetition_penalty": 1.5, "top_k": 7,
    "min_p": 0.1, "seed": 2**64 - 1, "stop": ["a", "b"], "stop_token_ids": [4, 5], "include_stop_str_in_output": True,
    "ignore_eos": True, "min_tokens": 2, "skip_special_tokens": False, "max_output_tokens": 77, "top_logprobs": 3}
RENAMED = {"max_output_tokens": "max_tokens", "top_logprobs": "logprobs"}
WITHOUT_EFFECT = {"user": "me", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k", "store": True,
                  "service_tier": "auto"}
ELSEWHERE = {"input", "model", "instructions", "tools", "tool_choice", "parallel_tool_calls", "text", "reasoning", "include",
             "truncation", "stream", "stream_options", "previous_response_id", "conversation", "background", "logit_bias",
             "structured_outputs", "chat_template_kwargs", "cache_salt", "priority", "request_id", "timeout"}


def test_every_field_is_in_one_of_the_tables() -> None:
    assert set(ResponsesRequest.__struct_fields__) == {*PARAMETERS, *WITHOUT_EFFECT, *ELSEWHERE}


@pytest.mark.parametrize("name", PARAMETERS)
def test_fields_that_become_parameters(name: str) -> None:
    value, parameter = PARAMETERS[name], RENAMED.get(name, name)
    found = getattr(sent({name: value}).params, parameter)
    assert found == (tuple(value) if isinstance(value, list) else value)
    assert getattr(sent({name: None}).params, parameter) != found


def test_other_fields() -> None:
    body = {**WITHOUT_EFFECT, "truncation": "disabled", "background": False, "conversation": None, "model": "some/model",
            "reasoning": {"summary": "auto", "generate_summary": "auto", "context": "auto", "mode": "standard"}}
    assert output(texts("x"), body, template=CHATML)["status"] == "completed"
    assert sent({"logit_bias": {"5": -1}}).params.logit_bias == {5: -1.0}
    assert sent({"structured_outputs": {"regex": "a+"}}).params.structured_outputs.regex == "a+"
    assert sent({"priority": 3}, engine={"scheduling_policy": "priority"}).priority == 3
    assert len({sent(body).cache_salt for body in ({}, {"cache_salt": "s"})}) == 2
    defaults = sent({}, generation={"temperature": 0.7}).params
    assert (defaults.temperature, defaults.max_tokens) == (0.7, None)


IMAGE = {"type": "input_image", "image_url": "data:"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"), ({"input": []}, "input"), ({"input": 1}, "input"), ({"input": ["a"]}, "input[0]"),
    ({"input": [{"role": "tool", "content": "a"}]}, "input"), ({"input": [{"content": "a"}]}, "input"),
    ({"input": [{"role": "user"}]}, "input"), ({"input": [{"role": "user", "content": [IMAGE]}]}, "input"),
    ({"input": [{"role": "user", "content": [1]}]}, "input"), ({"input": [item("user") | {"content": 1}]}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_text", "text": 1}]}]}, "input"),
    ({"input": [{"role": "user", "content": [{"type": ["x"], "text": "a"}]}]}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input"), ({"input": [{"type": ["x"]}]}, "input"),
    ({"input": [{"type": "web_search_call", "id": "x"}]}, "input"), ({"input": [call("f") | {"name": 1}]}, "input"),
    ({"input": [call("f") | {"arguments": {}}]}, "input"), ({"input": [call("f") | {"call_id": None}]}, "input"),
    ({"input": [{"type": "function_call_output", "output": "a"}]}, "input"),
    ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input"),
    ({"input": [{"type": "function_call_output", "call_id": "a", "output": [IMAGE]}]}, "input"),
    ({"input": [{"type": "reasoning", "id": "x", "summary": [], "encrypted_content": "x"}]}, "input"),
    ({"input": [{"type": "reasoning", "id": "x", "summary": [{"type": "other"}]}]}, "input"),
    ({"input": "Hi " * 5000}, "input"), ({"max_output_tokens": 4090, "input": "Hi " * 50}, "max_output_tokens"),
    ({"max_output_tokens": 0}, "max_output_tokens"), ({"max_output_tokens": 1.5}, "max_output_tokens"),
    ({"previous_response_id": "resp_1"}, "previous_response_id"), ({"conversation": "c"}, "conversation"),
    ({"conversation": {"id": "c"}}, "conversation"), ({"background": True}, "background"), ({"prompt": {"id": "p"}}, "prompt"),
    ({"truncation": "auto"}, "truncation"), ({"include": ["file_search_call.results"]}, "include"),
    ({"text": {"verbosity": "low"}}, "text.verbosity"), ({"text": {"format": {"type": "xml"}}}, "text.format"),
    ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"), ({"text": {"x": 1}}, "text.x"),
    ({"text": {"format": {"type": "json_schema", "schema": CITY}}}, "text.format"),
    ({"text": {"format": {"type": "text", "name": "x"}}}, "text.format"),
    ({"reasoning": {"effort": "high"}}, "reasoning.effort"), ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
    ({"reasoning": {"context": "all_turns"}}, "reasoning.context"), ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
    ({"reasoning": {"generate_summary": "concise"}}, "reasoning.generate_summary"),
    ({"top_logprobs": 21}, "top_logprobs"), ({"top_logprobs": -1}, "top_logprobs"), ({"temperature": -1}, "temperature"),
    ({"tools": [{"type": "web_search"}]}, "tools"), ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": [WEATHER, WEATHER], "tool_choice": "required"}, "tools"), ({"tools": [WEATHER]}, "tools"),
    ({"tools": [WEATHER | {"parameters": {"type": "x"}}]}, "tools"), ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": "any"}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
    ({"stream": False, "stream_options": {"include_obfuscation": True}}, "stream_options"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage"),
    ({"model": "other"}, "model"), ({"max_tokens": 5}, "max_tokens"), ({"n": 2}, "n"), ({"messages": []}, "messages"),
    ({"metadata": {"a": 1}}, "metadata[...]"), ({"priority": 1}, "priority"), ({"timeout": 0}, "timeout"),
    ({"max_tool_calls": 1}, "max_tool_calls"), ({"min_tokens": 9, "max_output_tokens": 3}, "min_tokens"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=lambda value: json.dumps(value)[:40])
def test_refusals(body: dict[str, Any], param: str) -> None:
    for stream in (False, True):
        reply = ask(texts("x"), PATH, {"input": "Hi", "stream": stream, **body})
        assert reply.status == (404 if param == "model" else 400), reply.body
        error = reply.json["error"]
        assert error["param"] == param and len(reply.body) < 2500, error
        assert param.split("[")[0].split(".")[0] in error["message"], error


def test_no_value_anywhere_is_the_servers_mistake() -> None:
    body = {"input": [
        item("user", "Hi"), {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "s"}], "content": None},
        item("assistant", "So"), call("f", '{"a": 1}'), {"type": "function_call_output", "call_id": "f", "output": "42"}],
        "tools": [WEATHER], "tool_choice": NAMED, "text": {"format": {"type": "json_schema", "name": "x", "schema": CITY}},
        "reasoning": {"effort": "low", "summary": "auto"}, "metadata": {"a": "b"}, "include": [LOGPROBS], "max_output_tokens": 9,
        "logit_bias": {"5": 1}, "stop": ["x"]}
    statuses = survey(PATH, body, template=THINKING)
    assert set(statuses) == {200, 400} and statuses.count(400) > 100


def test_mistakes_are_told_in_the_clients_words() -> None:
    def message(body: dict[str, Any]) -> str:
        return str(ask(texts("x"), PATH, {"input": "Hi", **body}).json["error"]["message"])

    assert message({"max_output_tokens": 0}).startswith("max_output_tokens must be")
    assert "max_output_tokens is 4090" in message({"max_output_tokens": 4090})
    assert message({"input": "Hi " * 5000}).startswith("input has")
    assert message({"tools": [{"type": "function"}]}).startswith("tools[0].name must be")
    assert message({"tools": [WEATHER | {"parameters": {"type": "x"}}]}).startswith("tools[0].parameters.type must be")
    assert message({"top_logprobs": 21}).startswith("top_logprobs must be")
    assert message({"max_tokens": 5}).startswith("max_tokens is not a field")
    assert ask(texts("x"), PATH, {"input": "Hi " * 5000}).json["error"]["code"] == "context_length_exceeded"


def test_there_is_nothing_to_get() -> None:
    async def run() -> Reply:
        service, _ = make_service(SAID)
        reply = await send_request(service, f"{PATH}/resp_1", method="GET")
        service.close()
        return reply

    reply = asyncio.run(run())
    assert reply.status == 404 and reply.json["error"]["type"] == "invalid_request_error"


def test_an_error_of_the_engine() -> None:
    whole = ask(SAID, PATH, {"input": "Hi"}, fail=3)
    assert whole.status == 500 and whole.json["error"]["type"] == "server_error"
    assert ask(SAID, PATH, {"input": "Hi", "stream": True}, fail=0).status == 500
    late = ask(texts("one two three four"), PATH, {"input": "Hi", "stream": True}, fail=4)
    *_, failed, error = events_of(late)
    assert failed["type"] == "response.failed" and failed["response"]["status"] == "failed"
    assert failed["response"]["error"] == {"code": "server_error", "message": "The request failed."}
    assert failed["response"]["output"][0]["status"] == "incomplete"
    assert (error["type"], error["code"], error["message"]) == ("error", "server_error", "The request failed.")
    assert b"dead" not in late.body


def test_a_deadline_and_a_client_that_leaves() -> None:
    body = {"input": "Hi"}
    late = asyncio.run(fake_service.late_and_left(PATH, SAID, {**body, "stream": True, "timeout": 0.05}, body))
    assert events_of(late)[-1]["code"] == "timeout_error"


# OpenAI's own client.


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    with listening(SAID, keys=("sk-1",), template=THINKING) as (address, _), \
            openai.OpenAI(base_url=f"{address}/v1", api_key="sk-1", max_retries=0, timeout=10) as found:
        yield found


def test_the_client_whole(client: openai.OpenAI) -> None:
    tools: Any = [WEATHER | {"strict": False}]
    reply = client.responses.create(model="some/model", input="Hi", tools=tools)
    assert reply.output_text.startswith("The capital") and reply.usage is not None and reply.usage.output_tokens > 20
    call = next(one for one in reply.output if one.type == "function_call")
    assert json.loads(call.arguments) == {"city": "Größe"}
    again: Any = [{"role": "user", "content": "Hi"}, *reply.output,
                  {"type": "function_call_output", "call_id": call.call_id, "output": "20"}]
    assert client.responses.create(model="some/model", input=again, tools=tools).status == "completed"


def test_the_client_streaming(client: openai.OpenAI) -> None:
    tools: Any = [WEATHER | {"strict": False}]
    with client.responses.stream(model="some/model", input="Hi", tools=tools) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[0] == "response.created" and kinds[-1] == "response.completed"
    assert "response.reasoning_text.delta" in kinds and "response.function_call_arguments.delta" in kinds
    assert final.output_text.startswith("The capital")
    deltas = [event.delta for event in client.responses.create(model="some/model", input="Hi", stream=True)
              if event.type == "response.output_text.delta"]
    assert "".join(deltas).startswith("The capital")


def test_the_client_parses() -> None:
    class City(pydantic.BaseModel):
        city: str

    with listening(texts('{"city": "Paris"}')) as (address, link), \
            openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0, timeout=10) as client:
        reply = client.responses.parse(model="some/model", input="Hi", text_format=City)
        assert reply.output_parsed == City(city="Paris")
        assert link.requests[0].grammar is not None


def test_the_clients_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="some/model", input="Hi", previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model="other", input="Hi")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve("resp_1")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="sk-2").responses.create(model="some/model", input="Hi")
