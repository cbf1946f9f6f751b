"""anthropic: messages, streams, tools, counting, and its types as a strict oracle for raw bodies."""

import json
import urllib.request
from typing import Any

import anthropic
from anthropic import Anthropic
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter
from recipes import BASE, MODEL, QUESTION, URL, WEATHER, recipe, run

client = Anthropic(base_url=URL, api_key="x", max_retries=0, timeout=60)
TURN: Any = {"model": MODEL, "max_tokens": 16, "messages": QUESTION, "extra_body": {"temperature": 0}}
TOOL: Any = {"name": "get_weather", "description": "The weather in a city.", "input_schema": WEATHER["function"]["parameters"]}


def raw(body: Any) -> bytes:
    """The bytes of an answer."""
    request = urllib.request.Request(BASE + "/messages", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: bytes = answer.read()
    return found


@recipe
def messages() -> None:
    answer = client.messages.create(system="Be brief.", **TURN)
    assert "Paris" in answer.content[0].text and answer.usage.output_tokens and answer.stop_reason in ("end_turn", "max_tokens")


@recipe
def stream() -> None:
    with client.messages.stream(**TURN) as events:
        text = "".join(events.text_stream)
        final = events.get_final_message()
    assert "Paris" in text and final.content[0].text == text and final.usage.output_tokens


@recipe
def tools() -> None:
    ask = {**TURN, "max_tokens": 64, "tools": [TOOL], "tool_choice": {"type": "any"}}
    answer = client.messages.create(**ask)
    call = next(block for block in answer.content if block.type == "tool_use")
    assert answer.stop_reason == "tool_use" and "city" in call.input
    with client.messages.stream(**ask) as events:
        assert any(block.type == "tool_use" and "city" in block.input for block in events.get_final_message().content)
    follow = [*QUESTION, {"role": "assistant", "content": answer.content}, {
        "role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}]}]
    assert client.messages.create(**{**TURN, "messages": follow}).content[0].text


@recipe
def count_tokens() -> None:
    count = client.messages.count_tokens(model=MODEL, messages=TURN["messages"])
    usage = client.messages.create(**TURN).usage
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0) > 5


@recipe
def errors_are_the_clients_own() -> None:
    for error, change in ((anthropic.NotFoundError, {"model": "nobody"}), (anthropic.BadRequestError, {"max_tokens": 0})):
        try:
            client.messages.create(**{**TURN, **change})
        except error as caught:
            assert isinstance(caught.body, dict) and caught.body["type"] == "error"
        else:
            raise AssertionError(f"no {error.__name__}")


@recipe
def raw_bodies_fit_the_types() -> None:
    event: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    plain = {"model": MODEL, "max_tokens": 48, "messages": QUESTION, "temperature": 0}
    for body in (plain, {**plain, "tools": [TOOL], "tool_choice": {"type": "any"}}):
        Message.model_validate_json(raw(body), strict=True)
        lines = [line for line in raw({**body, "stream": True}).decode().splitlines() if line.startswith("data: ")]
        assert len(lines) > 4
        for line in lines:
            event.validate_json(line.removeprefix("data: "), strict=True)


run()
