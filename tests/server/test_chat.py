"""octavo.server.chat: every option streamed and whole, tools and reasoning, in the shapes of OpenAI's own types."""

import asyncio
import json
from typing import Any

import fake_service
import pytest
from fake_service import CHATML, HERMES, THINKING, Reply, ask, make_service, send_request, texts, tokenizer
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from octavo.server.chat import ChatRequest

PATH = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hi"}]
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}}}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Größe"}}\n</tool_call>'
SAID = texts("<think>hm 🎉</think>\n\nThe capital" + CALL + "\n" + CALL, "Paris 你好 is")


def ids(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def fold(events: list[Any]) -> dict[int, dict[str, Any]]:
    """A stream's chunks as choices of a whole answer, without what differs by chance (ids of calls)."""
    choices: dict[int, dict[str, Any]] = {}
    for chunk in events:
        ChatCompletionChunk.model_validate(chunk, strict=True)
        assert len(chunk["choices"]) <= 1
        for part in chunk["choices"]:
            delta, index = part["delta"], part["index"]
            if index not in choices:
                assert delta == {"role": "assistant", "content": ""} and part["finish_reason"] is None
                choices[index] = {"content": "", "reasoning": "", "calls": [], "logprobs": None, "token_ids": None,
                                  "finish_reason": None, "stop_reason": None}
            choice = choices[index]
            assert choice["finish_reason"] is None, "a chunk after the last one"
            choice["content"] += delta.get("content", "")
            choice["reasoning"] += delta.get("reasoning", "")
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["id"].startswith("chatcmpl-tool-") and call["type"] == "function"
                    assert call["index"] == len(choice["calls"]) and call["function"]["arguments"] == ""
                    choice["calls"].append([call["function"]["name"], ""])
                else:
                    choice["calls"][call["index"]][1] += call["function"]["arguments"]
            if part["logprobs"] is not None:
                choice["logprobs"] = (choice["logprobs"] or []) + part["logprobs"]["content"]
            if "token_ids" in part:
                choice["token_ids"] = (choice["token_ids"] or []) + part["token_ids"]
            choice["finish_reason"], choice["stop_reason"] = part["finish_reason"], part.get("stop_reason")
    return choices


def comparable(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice of a whole answer in the same form."""
    message = choice["message"]
    assert message["role"] == "assistant" and message["reasoning"] == message["reasoning_content"]
    calls = message.get("tool_calls", [])
    assert "tool_calls" not in message or calls
    assert len({call["id"] for call in calls}) == len(calls)
    assert (message["content"] is None) <= bool(calls or message["reasoning"])
    return {"content": message["content"] or "", "reasoning": message["reasoning"] or "",
            "calls": [[call["function"]["name"], call["function"]["arguments"]] for call in calls],
            "logprobs": None if choice["logprobs"] is None else choice["logprobs"]["content"],
            "token_ids": choice["token_ids"], "finish_reason": choice["finish_reason"], "stop_reason": choice["stop_reason"]}


OPTIONS: list[dict[str, Any]] = [
    {}, {"n": 2}, {"tools": [WEATHER], "n": 2}, {"tools": [WEATHER], "tool_choice": "none"}, {"include_reasoning": False},
    {"tools": [WEATHER], "include_reasoning": False}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 2, "n": 2},
    {"tools": [WEATHER], "logprobs": True, "top_logprobs": 1, "return_tokens_as_token_ids": True},
    {"tools": [WEATHER], "tool_choice": "required"}, {"max_tokens": 9}, {"tools": [WEATHER], "max_completion_tokens": 22},
    {"tools": [WEATHER], "return_token_ids": True, "n": 2}, {"stop": "pit"}, {"tools": [WEATHER], "stop": ["get_w"]},
    {"tools": [WEATHER], "use_beam_search": True, "n": 2}, {"skip_special_tokens": False, "include_stop_str_in_output": True},
    {"messages": [*USER, {"role": "assistant", "content": "So"}], "continue_final_message": True, "echo": True},
    {"truncate_prompt_tokens": 5}, {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "get_weather"}}},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options)) or "plain")
def test_the_fold_of_a_stream_is_the_whole_answer(options: dict[str, Any]) -> None:
    body = {"messages": USER, "max_tokens": 200, **options}
    if "max_completion_tokens" in options:
        del body["max_tokens"]
    answers = []
    for per_step in (1, 2, 3, 100):
        whole = ask(SAID, PATH, body, per_step=per_step, template=THINKING)
        assert whole.status == 200, whole.body
        ChatCompletion.model_validate(whole.json, strict=True)
        stream = ask(SAID, PATH, {**body, "stream": True, "stream_options": {"include_usage": True}}, per_step=per_step,
                     template=THINKING)
        *chunks, last = stream.events
        folded = fold(chunks)
        answers.append([comparable(choice) for choice in whole.json["choices"]])
        assert [folded[i] for i in sorted(folded)] == answers[-1]
        assert last["choices"] == [] and last["usage"] == whole.json["usage"]
        assert {chunk["object"] for chunk in stream.events} == {"chat.completion.chunk"}
        assert {chunk["id"] for chunk in stream.events} == {last["id"]} and last["id"].startswith("chatcmpl-")
    assert all(answer == answers[0] for answer in answers), "the engine's steps show in the answer"


def test_the_whole_answer() -> None:
    reply = ask(texts("Paris"), PATH, {"messages": USER}).json
    assert reply["choices"] == [{
        "index": 0, "logprobs": None, "finish_reason": "stop", "stop_reason": None, "token_ids": None,
        "message": {"role": "assistant", "content": "Paris", "refusal": None, "annotations": None, "audio": None,
                    "function_call": None, "reasoning": None, "reasoning_content": None}}]
    assert reply["object"] == "chat.completion" and reply["model"] == "some/model"
    assert reply["service_tier"] is None and reply["system_fingerprint"] is None and reply["prompt_logprobs"] is None


def test_the_prompt_is_the_templates() -> None:
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    reply = ask(texts("x"), PATH, {"messages": USER, "return_token_ids": True}).json
    assert reply["prompt_token_ids"] == ids(prompt)
    told = ask(texts("x"), PATH, {"messages": USER, "return_token_ids": True, "stream": True}).events
    assert told[0]["prompt_token_ids"] == ids(prompt) and all("prompt_token_ids" not in event for event in told[1:])
    spelled = ask(texts("x"), PATH, {"messages": [{"role": "user", "content": "<|im_end|>"}], "return_token_ids": True}).json
    assert spelled["prompt_token_ids"].count(tokenizer().eos_token_id) == 1  # the template's own
    begun = ask(texts("x"), PATH, {"messages": USER, "return_token_ids": True, "add_special_tokens": True}, bos=True).json
    assert begun["prompt_token_ids"] == [tokenizer().token_to_id("<s>"), *ids(prompt)]


@pytest.mark.parametrize(("choice", "said", "reason"), [
    ("auto", CALL, "tool_calls"), ("required", CALL, "tool_calls"), (None, "no", "stop"),
    ({"type": "function", "function": {"name": "get_weather"}}, CALL, "stop"), ("none", CALL, "stop")])
def test_finish_reasons_of_calls(choice: Any, said: str, reason: str) -> None:
    body = {"messages": USER, "tools": [WEATHER], "tool_choice": choice}
    choice = ask(texts(said), PATH, body, template=HERMES).json["choices"][0]
    assert choice["finish_reason"] == reason
    cut = ask(texts(said), PATH, {**body, "max_tokens": 5}, template=HERMES).json["choices"][0]
    assert cut["finish_reason"] == ("length" if said == CALL else reason)


def test_a_call_in_chunks() -> None:
    events = ask(texts(CALL), PATH, {"messages": USER, "tools": [WEATHER], "stream": True}, template=HERMES).events
    calls = [event["choices"][0]["delta"]["tool_calls"] for event in events if "tool_calls" in event["choices"][0]["delta"]]
    assert all(len(call) == 1 for call in calls)
    assert calls[0][0]["function"] == {"name": "get_weather", "arguments": ""}
    assert json.loads("".join(call[0]["function"]["arguments"] for call in calls[1:])) == {"city": "Größe"}
    assert events[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_named_tool_of_a_model_that_knows_none() -> None:
    body = {"messages": USER, "tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "get_weather"}}}
    choice = ask(texts('{"city": "Paris"}'), PATH, body).json["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    assert choice["message"]["content"] is None and choice["finish_reason"] == "stop"
    refused = ask(texts("x"), PATH, {**body, "tool_choice": "auto"})
    assert (refused.status, refused.json["error"]["param"]) == (400, "tools")
    assert ask(texts("x"), PATH, {**body, "tool_choice": "none"}).status == 200


def test_special_marks_are_seen_by_the_parser_and_not_by_the_client() -> None:
    said = '[TOOL_CALLS][{"name": "get_weather", "arguments": {}}]'
    body = {"messages": USER, "tools": [WEATHER], "ignore_eos": True}
    options = {"template": HERMES, "server": {"tool_call_parser": "mistral"}}
    message = ask(texts(said), PATH, body, **options).json["choices"][0]["message"]
    assert message["content"] is None and len(message["tool_calls"]) == 1
    closed = ask(texts(said + "<|im_end|>"), PATH, body, **options).json["choices"][0]["message"]
    assert closed["content"] is None and len(closed["tool_calls"]) == 1


@pytest.mark.parametrize("said", ["so <tool", "<think", "<think>so", "<tool_call>\n{"])
def test_what_a_parser_holds_back_is_not_lost(said: str) -> None:
    body = {"messages": USER, "tools": [WEATHER]}
    message = ask(texts(said), PATH, body, template=THINKING).json["choices"][0]["message"]
    assert (message["content"] or "") + (message["reasoning"] or "") == said.removeprefix("<think>")


def test_logprobs_hold_the_bytes_of_each_token() -> None:
    robot = "\U0001f916"
    said = ids("a" + robot)
    body = {"messages": USER, "logprobs": True, "top_logprobs": 2, "max_tokens": len(said)}
    choice = ask(lambda request, index: said, PATH, body).json["choices"][0]
    content = choice["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]) == ("a" + robot).encode()
    assert all([top["logprob"] for top in token["top_logprobs"]] == [-0.5, -1.0] for token in content)
    assert content[0]["token"] == "a" and content[0]["logprob"] == -1.0
    named = ask(lambda request, index: said, PATH, {**body, "return_tokens_as_token_ids": True}).json["choices"][0]
    assert [token["token"] for token in named["logprobs"]["content"]] == [f"token_id:{token}" for token in said]


def test_a_text_of_other_line_ends_stays_one_line() -> None:
    said = texts("a\u2028b\u2029c\x85d\x0be\r\nf")
    reply = ask(said, PATH, {"messages": USER, "stream": True, "max_tokens": 60}, per_step=60)
    assert fold(reply.events)[0]["content"] == "a\u2028b\u2029c\x85d\x0be\r\nf"


def test_generation_defaults_and_beams() -> None:
    async def params(body: dict[str, Any]) -> Any:
        service, link = make_service(texts("x"), generation={"temperature": 0.7, "top_k": 5})
        assert (await send_request(service, PATH, {"messages": USER, **body})).status == 200
        service.close()
        return link.requests[0].params

    plain = asyncio.run(params({}))
    assert (plain.temperature, plain.top_k, plain.max_tokens) == (0.7, 5, None)
    assert asyncio.run(params({"temperature": 0})).temperature == 0.0
    beams = asyncio.run(params({"use_beam_search": True, "n": 2}))
    assert (beams.temperature, beams.top_k, beams.use_beam_search) == (0.0, -1, True)


def test_an_error_of_the_engine() -> None:
    reply = ask(SAID, PATH, {"messages": USER}, fail=2)
    assert reply.status == 500 and reply.json["error"] == {
        "message": "The request failed.", "type": "server_error", "param": None, "code": None}
    early = ask(SAID, PATH, {"messages": USER, "stream": True}, fail=0)
    assert early.status == 500 and early.json["error"]["type"] == "server_error"
    late = ask(SAID, PATH, {"messages": USER, "stream": True}, fail=2)
    assert late.status == 200 and late.complete
    assert late.events[-1] == {"error": {"message": "The request failed.", "type": "server_error", "param": None, "code": None}}
    assert b"dead" not in late.body


def test_a_deadline_within_a_stream_is_an_event() -> None:
    async def run() -> None:
        hold = asyncio.Event()
        service, link = make_service(SAID, hold=hold)
        reply = await send_request(service, PATH, {"messages": USER, "stream": True, "timeout": 0.05})
        assert reply.complete and reply.events[-1]["error"]["type"] == "timeout_error"
        whole = await send_request(service, PATH, {"messages": USER, "timeout": 0.05})
        assert whole.status == 504 and link.aborted == {request.request_id for request in link.requests}
        hold.set()
        await asyncio.gather(*link.tasks)
        service.close()

    asyncio.run(run())


def test_a_key_keeps_its_cache_apart() -> None:
    async def salts(body: dict[str, Any], key: str) -> str:
        service, link = make_service(texts("x"))
        await send_request(service, PATH, {"messages": USER, **body}, salt=key)
        service.close()
        return link.requests[0].cache_salt

    found = [asyncio.run(salts(body, key)) for body in ({}, {"cache_salt": "s"}) for key in ("", "k")]
    assert found[:2] == ["", "k"] and len(set(found)) == 4


REFUSED: list[tuple[dict[str, Any], str | None]] = [
    ({"messages": []}, "messages"), ({"messages": "Hi"}, "messages"), ({"messages": [{"role": "x", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages"), ({"messages": [{"role": "user", "content": None}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": [1]}]}, "messages"), ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"), ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
    ({"max_tokens": 10**6}, "max_tokens"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": "x"}]}, "messages"),
    ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    ({"logprobs": 1}, "logprobs"), ({"tool_choice": "auto"}, "tool_choice"), ({"tools": [{}]}, "tools"),
    ({"tools": [WEATHER], "tool_choice": "maybe"}, "tool_choice"), ({"chat_template": "x"}, "chat_template"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"), ({"documents": [{"a": "b"}]}, "documents"),
    ({"reasoning_effort": "high"}, "reasoning_effort"), ({"modalities": ["audio"]}, "modalities"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"functions": []}, "functions"), ({"prediction": {}}, "prediction"), ({"logprob_token_ids": [1]}, "logprob_token_ids"),
    ({"kv_transfer_params": {}}, "kv_transfer_params"), ({"vllm_xargs": {}}, "vllm_xargs"), ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"), ({"temperature": -1}, "temperature"), ({"temperature": "1"}, "temperature"),
    ({"n": 0}, "n"), ({"n": True}, "n"), ({"n": 1.5}, "n"), ({"stop": ""}, "stop"), ({"stop": ["a"] * 17}, "stop"),
    ({"stop": "a" * 257}, "stop"), ({"logit_bias": {"a": 1}}, "logit_bias"), ({"logit_bias": {"99999": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"), ({"logit_bias": {"-5": 1}}, "logit_bias"), ({"priority": 1}, "priority"),
    ({"request_id": "a\nb"}, "request_id"), ({"request_id": ""}, "request_id"), ({"timeout": 0}, "timeout"),
    ({"cache_salt": ""}, "cache_salt"), ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"service_tier": "flex"}, "service_tier"), ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"), ({"stop_token_ids": [10**6]}, "stop_token_ids"),
    ({"allowed_token_ids": []}, "allowed_token_ids"), ({"bad_words": [""]}, "bad_words"), ({"min_tokens": -1}, "min_tokens"),
    ({"response_format": {"type": "xml"}}, "response_format"), ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs"),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"), ({"guided_choice": []}, "guided_choice"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "y"}}}}, "response_format"),
    ({"model": "other"}, "model"), ({"min_p": 2}, "min_p"), ({"top_p": 0}, "top_p"), ({"top_k": -2}, "top_k"),
    ({"repetition_penalty": 0}, "repetition_penalty"), ({"presence_penalty": 3}, "presence_penalty"),
    ({"best_of": 2, "n": 3}, "best_of"), ({"length_penalty": 9}, "length_penalty"), ({"early_stopping": "x"}, "early_stopping"),
]


@pytest.mark.parametrize(("body", "param"), REFUSED, ids=lambda value: json.dumps(value)[:40])
def test_refusals(body: dict[str, Any], param: str | None) -> None:
    reply = ask(SAID, PATH, {"messages": USER, **body})
    assert reply.status == (404 if param == "model" else 400), reply.body
    assert reply.json["error"]["param"] == param and len(reply.body) < 2500, reply.body


# Each field with a value that differs from its default, and what shows that it is honoured: a parameter of the request, or a
# word on where it is tested.
HONOURED: dict[str, Any] = {
    "frequency_penalty": 0.5, "presence_penalty": 0.5, "seed": 2**64 - 1, "temperature": 0.25, "top_p": 0.5, "top_k": 7,
    "min_p": 0.1, "repetition_penalty": 1.5, "length_penalty": 2.0, "early_stopping": True, "n": 3, "best_of": 3,
    "include_stop_str_in_output": True, "ignore_eos": True, "min_tokens": 2, "skip_special_tokens": False,
    "spaces_between_special_tokens": False, "max_tokens": 77, "prompt_logprobs": 2,
}
AS_TUPLE = {"stop": ["a", "b"], "stop_token_ids": [4, 5], "allowed_token_ids": [6], "bad_words": ["no"]}
ELSEWHERE = {
    "messages", "model", "stream", "stream_options", "use_beam_search", "logit_bias", "structured_outputs", "timeout",
    "truncate_prompt_tokens", "add_special_tokens", "response_format", "guided_json", "guided_regex", "guided_choice",
    "guided_grammar", "return_token_ids", "return_tokens_as_token_ids", "priority", "cache_salt", "request_id",
    "max_completion_tokens", "logprobs", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "reasoning_effort",
    "include_reasoning", "modalities", "echo", "add_generation_prompt", "continue_final_message", "documents",
    "chat_template", "chat_template_kwargs"}
WITHOUT_EFFECT = {"user": "me", "metadata": {"a": "b"}, "safety_identifier": "s", "prompt_cache_key": "k", "store": True,
                  "service_tier": "auto"}


def test_every_field_is_in_one_of_the_tables() -> None:
    assert set(ChatRequest.__struct_fields__) == {*HONOURED, *AS_TUPLE, *ELSEWHERE, *WITHOUT_EFFECT}


def sent(body: dict[str, Any], **options: Any) -> Any:
    """The request that reaches the engine."""
    return fake_service.sent(PATH, {"messages": USER, **body}, **options)


@pytest.mark.parametrize("name", [*HONOURED, *AS_TUPLE])
def test_fields_that_become_parameters(name: str) -> None:
    value = HONOURED.get(name, AS_TUPLE.get(name))
    found = getattr(sent({name: value}).params, name)
    assert found == (tuple(value) if name in AS_TUPLE else value)
    assert getattr(sent({name: None}).params, name) != found


@pytest.mark.parametrize(("body", "wanted"), [
    ({"response_format": {"type": "text"}}, None), ({"response_format": {"type": "json_object"}}, {"json_object": True}),
    ({"response_format": {"type": "json_schema", "json_schema": {
        "name": "x", "strict": True, "schema": {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object"}}}},
     {"json": {"$schema": "http://json-schema.org/draft-07/schema#", "type": "object"}}),
    ({"guided_json": {"type": "object"}}, {"json": {"type": "object"}}), ({"guided_regex": "a+"}, {"regex": "a+"}),
    ({"guided_choice": ["a", "b"]}, {"choice": ("a", "b")}), ({"guided_grammar": 'root ::= "a"'}, {"grammar": 'root ::= "a"'}),
    ({"structured_outputs": {"json": '{"type": "object"}', "disable_any_whitespace": True}},
     {"json": '{"type": "object"}', "disable_any_whitespace": True}),
])
def test_constraints(body: dict[str, Any], wanted: dict[str, Any] | None) -> None:
    found = sent(body).params.structured_outputs
    if wanted is None:
        assert found is None
    else:
        assert {name: getattr(found, name) for name in wanted} == wanted


def test_fields_of_the_template() -> None:
    template = "{{ reasoning_effort }}{{ documents[0].a if documents }}{{ colour }}" + CHATML
    body = {"reasoning_effort": "low", "documents": [{"a": "b"}], "chat_template_kwargs": {"colour": "red"}}
    assert tokenizer().decode(sent(body, template=template).prompt_token_ids).startswith("lowbred")
    switch = sent({"reasoning_effort": "none"}, template=THINKING)
    assert "</think>" in tokenizer().decode(switch.prompt_token_ids)
    own = sent({"chat_template": "mine"}, server={"trust_request_chat_template": True})
    assert tokenizer().decode(own.prompt_token_ids) == "mine"
    open_ended = sent({"add_generation_prompt": False})
    assert tokenizer().decode(open_ended.prompt_token_ids, skip_special_tokens=False).endswith("<|im_end|>\n")


def test_a_broken_template_of_a_client_is_its_own_mistake() -> None:
    for text in ("{{", "{% for x in y %}", "{{ raise_exception('no') }}"):
        reply = ask(SAID, PATH, {"messages": USER, "chat_template": text}, server={"trust_request_chat_template": True})
        assert reply.status == 400, reply.body


def test_arguments_of_earlier_calls_reach_the_template_as_objects() -> None:
    template = "{% for m in messages %}{% for c in m.tool_calls %}{{ c.function.arguments | tojson }}{% endfor %}{% endfor %}!"
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    broken = {"id": "2", "type": "function", "function": {"name": "f", "arguments": '{"a'}}
    messages = [*USER, {"role": "assistant", "content": None, "tool_calls": [call, broken]}]
    assert tokenizer().decode(sent({"messages": messages}, template=template).prompt_token_ids) == '{"a": 1}"{\\"a"!'


def test_content_formats() -> None:
    template = "{% for m in messages %}{{ m.content is string }}{{ m.content.text }}{% endfor %}"
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for setting, content, wanted in (("string", parts, "True"), ("openai", "a", "False"), ("auto", "a", "True"),
                                     ("auto", parts, "False")):
        request = sent({"messages": [{"role": "user", "content": content}]}, template=template,
                       server={"chat_template_content_format": setting})
        assert tokenizer().decode(request.prompt_token_ids).startswith(wanted)


def test_other_fields() -> None:
    body = {**WITHOUT_EFFECT, "modalities": ["text"], "priority": 0, "request_id": "mine", "logit_bias": {"5": -1}}
    assert ask(SAID, PATH, {"messages": USER, **body}).json["id"] == "chatcmpl-mine"
    assert sent(body).params.logit_bias == {5: -1.0}
    assert sent({"priority": 3}, engine={"scheduling_policy": "priority"}).priority == 3
    strict = sent({"tools": [WEATHER], "parallel_tool_calls": False}, template=HERMES)
    assert strict.params.structured_outputs is not None and sent({"tools": [WEATHER]}, template=HERMES).grammar is None


@pytest.mark.parametrize("options", [{"stream": True}, {}, {"n": 3}])
def test_a_client_that_leaves_ends_its_request(options: dict[str, Any]) -> None:
    async def run() -> None:
        hold, leave = asyncio.Event(), asyncio.Event()
        service, link = make_service(SAID, hold=hold)
        task: asyncio.Task[Reply] = asyncio.create_task(
            send_request(service, PATH, {"messages": USER, **options}, leave=leave))
        for _ in range(50):
            await asyncio.sleep(0)
        assert link.requests and not task.done()
        leave.set()
        assert (await asyncio.wait_for(task, 5)).left
        assert link.aborted == {request.request_id for request in link.requests} and service.num_open == 0
        hold.set()
        await asyncio.gather(*link.tasks)

    asyncio.run(run())
