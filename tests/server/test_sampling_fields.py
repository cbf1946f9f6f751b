"""octavo.server.sampling_fields: whatever stands in a field, the answer is typed."""

import asyncio
import json
from typing import Any

import pytest
from fake_service import HERMES, ask, make_service, send_request, texts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from octavo.params import SamplingParams
from octavo.server.chat import ChatRequest
from octavo.server.completions import CompletionRequest
from octavo.server.generate import GenerateRequest
from octavo.server.sampling_fields import NO_EFFECT, SAME, ParamFields, SamplingFields
from octavo.server.tokenize import DetokenizeRequest, TokenizeRequest
from octavo.text.vocabulary import Tokenizer

PATHS = {"/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest, "/generate": GenerateRequest,
         "/tokenize": TokenizeRequest, "/detokenize": DetokenizeRequest}
REST: dict[str, Any] = {"messages": [{"role": "user", "content": "a"}], "prompt": "a", "tokens": [5]}

NUMBERS = st.one_of(st.integers(-3, 300), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False))
STRINGS = st.one_of(st.sampled_from(["", "auto", "user", "text", "json_object", "{{ x }}", "{{", "<|im_end|>", "a" * 300]),
                    st.text(st.characters(codec="utf-8"), max_size=5))
KEYS = st.sampled_from(["type", "role", "content", "text", "function", "name", "json", "regex", "choice", "grammar", "5",
                        "schema", "json_schema", "parameters", "include_usage", "continuous_usage_stats"])
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, STRINGS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)), max_leaves=8)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_value_in_any_field_has_a_typed_answer(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(sorted(PATHS)))
    kind = PATHS[path]
    body = {name: value for name, value in REST.items() if name in kind.__struct_fields__}
    if path == "/tokenize":
        del body[data.draw(st.sampled_from(["prompt", "messages"]))]
    body["max_tokens"] = 3
    if path.endswith("tokenize"):
        del body["max_tokens"]
    names = data.draw(st.lists(st.sampled_from(sorted(kind.__struct_fields__)), min_size=1, max_size=3, unique=True))
    body |= {name: data.draw(VALUES) for name in names}

    async def run() -> None:
        service, link = make_service(texts("a", "b"), template=HERMES, server={"trust_request_chat_template": True})
        reply = await send_request(service, path, json.dumps(body).encode())
        await asyncio.gather(*link.tasks)
        assert reply.complete and reply.status in (200, 400, 404), reply
        if reply.status != 200:
            assert set(reply.json["error"]) == {"message", "type", "param", "code"} and len(reply.body) < 3000
        assert service.num_open == 0 and not service._streams
        service.close()

    asyncio.run(run())


def test_every_parameter_has_a_field() -> None:
    own = {"logprobs", "prompt_logprobs", "logits_processors", "detokenize"}  # asked for in other ways, or offline only
    assert set(SamplingParams.__dataclass_fields__) - own == set(ParamFields.__struct_fields__) - {"timeout"}
    assert set(SAME) < set(ParamFields.__struct_fields__) and set(NO_EFFECT) < set(SamplingFields.__struct_fields__)


def test_completions_have_the_fields_of_chat_and_three_of_their_own() -> None:
    shared = set(SamplingFields.__struct_fields__)
    assert set(CompletionRequest.__struct_fields__) - shared == {"prompt", "logprobs", "echo"}
    assert shared < set(ChatRequest.__struct_fields__)  # where test_chat.py walks through all of them


def test_null_counts_as_absent_in_every_field() -> None:
    async def run(path: str) -> None:
        service, _ = make_service(texts("a"))
        body = dict.fromkeys(PATHS[path].__struct_fields__) | {
            name: value for name, value in REST.items() if name in PATHS[path].__struct_fields__}
        if path == "/tokenize":
            body["messages"] = None
        assert (await send_request(service, path, body)).status == 200
        service.close()

    for path in PATHS:
        asyncio.run(run(path))


LONG = "Paris 你好" * 20_000
ASKS = [
    ("/v1/completions", {"prompt": LONG}), ("/v1/completions", {"prompt": ["a", LONG]}), ("/generate", {"prompt": LONG}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}), ("/v1/responses", {"input": LONG}),
    ("/v1/messages", {"model": "some/model", "max_tokens": 5, "messages": [{"role": "user", "content": LONG}]})]


@pytest.mark.parametrize("some_tokens_are_long", [False, True])
@pytest.mark.parametrize(("path", "body"), ASKS)
def test_what_cannot_fit_is_refused_before_it_is_tokenised(
        path: str, body: dict[str, Any], some_tokens_are_long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a token may stand for so many characters that a length says nothing, the beginning is tokenised."""
    if some_tokens_are_long:
        monkeypatch.setattr(Tokenizer, "chars_per_token", property(lambda self: 100_000))
    seen: list[int] = []
    for name in ("encode", "encode_batch"):
        whole = getattr(Tokenizer, name)

        def counted(self: Tokenizer, text: Any, *args: Any, whole: Any = whole, **more: Any) -> Any:
            seen.append(max(map(len, [text] if isinstance(text, str) else text)))
            return whole(self, text, *args, **more)

        monkeypatch.setattr(Tokenizer, name, counted)
    reply = ask(texts("x"), path, body, max_model_len=64)
    assert reply.status == 400 and "characters" in reply.json["error"]["message"], reply.body
    assert reply.json["error"].get("code", "context_length_exceeded") == "context_length_exceeded"
    assert max(seen, default=0) <= (16 * 64 if some_tokens_are_long else 999)
    assert reply.json["error"].get("param") in {"/v1/chat/completions": ["messages"], "/v1/responses": ["input"],
                                                "/v1/messages": [None]}.get(path, ["prompt"])


def test_a_long_text_of_few_tokens_is_tokenised_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text, *args, **more: [5] * max(1, len(text) // 40))
    monkeypatch.setattr(Tokenizer, "encode_batch", lambda self, texts, *args, **more: [self.encode(text) for text in texts])
    monkeypatch.setattr(Tokenizer, "chars_per_token", property(lambda self: 100_000))
    assert ask(texts("x"), "/v1/completions", {"prompt": "a" * 2000, "max_tokens": 2}, max_model_len=64).status == 200


def test_more_messages_than_tokens_fit_are_refused_before_the_template_sees_them() -> None:
    said = [{"role": "user", "content": "a"}]
    for path, param in (("/v1/chat/completions", "messages"), ("/v1/responses", "input")):
        error = ask(texts("x"), path, {param: said * 65}, max_model_len=64).json["error"]
        assert error["code"] == "context_length_exceeded" and error["param"] == param and "65 entries" in error["message"], error
    body = {"messages": said * 65, "truncate_prompt_tokens": 8, "max_tokens": 2}
    assert ask(texts("x"), "/v1/chat/completions", body, max_model_len=64).status == 200


@pytest.mark.parametrize(("path", "body"), [
    ("/tokenize", {"prompt": LONG}), ("/tokenize", {"messages": [{"role": "user", "content": LONG}]}),
    ("/v1/messages/count_tokens", {"model": "some/model", "messages": [{"role": "user", "content": LONG}]}),
    ("/v1/completions", {"prompt": LONG, "truncate_prompt_tokens": 8, "max_tokens": 2}),
    ("/v1/chat/completions",
     {"messages": [{"role": "user", "content": LONG}], "truncate_prompt_tokens": -1, "max_tokens": 2})])
def test_what_need_not_fit_may_be_long(path: str, body: dict[str, Any]) -> None:
    assert ask(texts("x"), path, body, max_model_len=64).status == 200
