"""openai: its client as users write it, and its types as a strict oracle for every raw body."""

import json
import urllib.request
from typing import Any

import openai
from openai import OpenAI
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, Field, TypeAdapter
from recipes import BASE, MODEL, QUESTION, WEATHER, recipe, run

client = OpenAI(base_url=BASE, api_key="x", max_retries=0, timeout=60)
TOOL: Any = [WEATHER]
SHORT: Any = {"model": MODEL, "max_tokens": 12, "temperature": 0}


class City(BaseModel):
    name: str = Field(max_length=20)
    people: int = Field(ge=0, le=99)


def raw(path: str, body: Any = None) -> bytes:
    """The bytes of an answer, unseen by any client."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(BASE + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        found: bytes = answer.read()
    return found


def objects(stream: bytes) -> list[Any]:
    """The objects of an event stream, [DONE] left out."""
    lines = [line.removeprefix("data: ") for line in stream.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@recipe
def models() -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL
    Model.model_validate_json(raw(f"/models/{MODEL}"), strict=True)


@recipe
def chat() -> None:
    answer = client.chat.completions.create(messages=QUESTION, **SHORT)
    assert "Paris" in (answer.choices[0].message.content or ""), answer
    assert answer.usage and answer.usage.completion_tokens <= 12
    assert answer._request_id


@recipe
def chat_stream_with_usage() -> None:
    whole = client.chat.completions.create(messages=QUESTION, **SHORT)
    chunks = list(client.chat.completions.create(
        messages=QUESTION, stream=True, stream_options={"include_usage": True}, **SHORT))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert not chunks[-1].choices and chunks[-1].usage == whole.usage


@recipe
def chat_stream_helper() -> None:
    with client.chat.completions.stream(messages=QUESTION, **SHORT) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert "Paris" in (final.choices[0].message.content or "")


@recipe
def chat_parse() -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=QUESTION, response_format=City, max_tokens=64, temperature=0)
    assert isinstance(answer.choices[0].message.parsed, City)


@recipe
def chat_tools_stream() -> None:
    with client.chat.completions.stream(
            model=MODEL, messages=QUESTION, tools=TOOL, tool_choice="required", max_tokens=64, temperature=0) as stream:
        for _ in stream:
            pass
        choice = stream.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls
    call = choice.message.tool_calls[0]
    assert call.function.name == "get_weather" and "city" in json.loads(call.function.arguments)
    messages: Any = [*QUESTION, choice.message.model_dump(exclude_none=True), {
        "role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert client.chat.completions.create(messages=messages, **SHORT).choices[0].message.content
    # As clients send it that leave nothing out.
    messages[1] = choice.message.model_dump(include={"role", "content", "tool_calls"})
    assert client.chat.completions.create(messages=messages, **SHORT).choices[0].message.content


@recipe
def chat_logprobs() -> None:
    answer = client.chat.completions.create(messages=QUESTION, logprobs=True, top_logprobs=3, **SHORT)
    assert answer.usage and answer.choices[0].logprobs and answer.choices[0].logprobs.content
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    assert all(len(entry.top_logprobs) == 3 and entry.logprob <= 0 for entry in entries)
    spelled = b"".join(bytes(entry.bytes or ()) for entry in entries).decode()
    assert spelled.startswith(answer.choices[0].message.content or "?")


@recipe
def completions_echo_and_logprobs() -> None:
    prompt = "The capital of France is"
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=3, echo=True, logprobs=2, temperature=0)
    choice = answer.choices[0]
    assert choice.text.startswith(prompt) and choice.logprobs
    lists = (choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.text_offset, choice.logprobs.top_logprobs)
    lengths = {len(one or ()) for one in lists}
    assert answer.usage and lengths == {answer.usage.total_tokens}
    assert choice.logprobs.token_logprobs and choice.logprobs.token_logprobs[0] is None
    several = client.completions.create(model=MODEL, prompt=[prompt, "One"], max_tokens=2, n=2)
    assert [one.index for one in several.choices] == [0, 1, 2, 3]


@recipe
def errors_are_the_clients_own() -> None:
    for error, change in ((openai.NotFoundError, {"model": "nobody"}), (openai.BadRequestError, {"temperature": -1})):
        try:
            client.chat.completions.create(messages=QUESTION, **{**SHORT, **change})
        except error as caught:
            assert caught.param == next(iter(change)) and caught.type == "invalid_request_error"
        else:
            raise AssertionError(f"no {error.__name__}")


@recipe
def raw_headers() -> None:
    answer = client.chat.completions.with_raw_response.create(
        messages=QUESTION, extra_headers={"x-request-id": "mine"}, **SHORT)
    assert answer.headers["x-request-id"] == "mine" and answer.headers["content-type"] == "application/json"
    assert answer.parse().choices


@recipe
def responses() -> None:
    answer = client.responses.create(model=MODEL, input="What is the capital of France?", max_output_tokens=12, temperature=0)
    assert "Paris" in answer.output_text and answer.usage
    parsed = client.responses.parse(model=MODEL, input="Name a city.", text_format=City, max_output_tokens=64, temperature=0)
    assert isinstance(parsed.output_parsed, City)


@recipe
def responses_stream() -> None:
    with client.responses.stream(
            model=MODEL, input="What is the capital of France?", max_output_tokens=12, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert text == final.output_text and "Paris" in text


@recipe
def responses_tools() -> None:
    tool: Any = {"type": "function", **WEATHER["function"], "strict": True}
    answer = client.responses.create(
        model=MODEL, input="Weather in Rome?", tools=[tool], tool_choice="required", max_output_tokens=64, temperature=0)
    call = next(item for item in answer.output if item.type == "function_call")
    assert "city" in json.loads(call.arguments)
    follow: Any = [{"role": "user", "content": "Weather in Rome?"}, call.model_dump(), {
        "type": "function_call_output", "call_id": call.call_id, "output": "sunny"}]
    assert client.responses.create(model=MODEL, input=follow, max_output_tokens=12, temperature=0).output_text


@recipe
def raw_bodies_fit_the_types() -> None:
    question = {"messages": QUESTION, **SHORT}
    tools = {**question, "max_tokens": 64, "tools": TOOL, "tool_choice": "required"}
    for body in (question, {**question, "logprobs": True, "top_logprobs": 2, "n": 2}, tools):
        ChatCompletion.model_validate_json(raw("/chat/completions", body), strict=True)
        for usage in (False, True):
            stream = {**body, "stream": True, "stream_options": {"include_usage": usage}}
            for chunk in objects(raw("/chat/completions", stream)):
                ChatCompletionChunk.model_validate_json(json.dumps(chunk), strict=True)
    prompt = {**SHORT, "prompt": "The capital of France is"}
    for body in (prompt, {**prompt, "prompt": ["a", "b"], "n": 2}):
        Completion.model_validate_json(raw("/completions", body), strict=True)
        for chunk in objects(raw("/completions", {**body, "stream": True})):
            for choice in chunk["choices"]:  # the type speaks of whole answers only: in a stream it is null until the end
                choice["finish_reason"] = choice["finish_reason"] or "stop"
            Completion.model_validate_json(json.dumps(chunk), strict=True)
    tool = {"type": "function", **WEATHER["function"], "strict": True}
    event: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    for more in ({}, {"tools": [tool], "tool_choice": "required"}, {"include": ["message.output_text.logprobs"]}):
        body = {"model": MODEL, "input": "Rome?", "max_output_tokens": 48, "temperature": 0, **more}
        Response.model_validate_json(raw("/responses", body), strict=True)
        for one in objects(raw("/responses", {**body, "stream": True})):
            event.validate_json(json.dumps(one), strict=True)


run()
