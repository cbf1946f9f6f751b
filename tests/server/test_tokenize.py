"""octavo.server.tokenize: ids of texts and conversations, and back."""

from typing import Any

import pytest
from fake_service import HERMES, ask, texts, tokenizer

USER = [{"role": "user", "content": "Hi <|im_end|>"}]
WEATHER = {"type": "function", "function": {"name": "get_weather"}}


def ids(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def call(path: str, body: Any, **options: Any) -> Any:
    return ask(texts("x"), path, body, **options)


def test_a_text() -> None:
    reply = call("/tokenize", {"prompt": "Hi<|im_end|>", "return_token_strs": True, "model": "some/model"}).json
    assert reply == {"count": 3, "max_model_len": 4096, "tokens": ids("Hi<|im_end|>"), "token_strs": ["H", "i", "<|im_end|>"]}
    assert call("/tokenize", {"prompt": "Hi"}).json["token_strs"] is None
    assert call("/tokenize", {"prompt": ""}).json["tokens"] == []
    begun, bare = ({"prompt": "Hi", "add_special_tokens": add} for add in (True, False))
    assert call("/tokenize", begun, bos=True).json["tokens"] == [tokenizer().token_to_id("<s>"), *ids("Hi")]
    assert call("/tokenize", bare, bos=True).json["tokens"] == ids("Hi")


@pytest.mark.parametrize("options", [{}, {"add_generation_prompt": False}, {"tools": [WEATHER]}, {"add_special_tokens": True},
                                     {"chat_template_kwargs": {"tools_are": "none"}}])
def test_a_conversation_has_the_ids_of_a_chat(options: dict[str, Any]) -> None:
    body = {"messages": USER, **options}
    found = call("/tokenize", body, template=HERMES, bos=True).json
    chat = call("/v1/chat/completions", {**body, "return_token_ids": True}, template=HERMES, bos=True).json
    assert found["tokens"] == chat["prompt_token_ids"] and found["count"] == chat["usage"]["prompt_tokens"]
    assert found["tokens"].count(tokenizer().eos_token_id) == 1


def test_a_message_to_be_continued() -> None:
    body = {"messages": [*USER, {"role": "assistant", "content": "So"}], "continue_final_message": True}
    assert tokenizer().decode(call("/tokenize", body).json["tokens"]).endswith("assistant\nSo")


def test_back() -> None:
    text = "Größe 🎉 <|im_end|>\x00"
    assert call("/detokenize", {"tokens": ids(text)}).json == {"prompt": text}
    assert call("/detokenize", {"tokens": []}).json == {"prompt": ""}


@pytest.mark.parametrize(("path", "body", "param", "status"), [
    ("/tokenize", {}, "prompt", 400), ("/tokenize", {"prompt": "a", "messages": USER}, "prompt", 400),
    ("/tokenize", {"prompt": "a", "tools": []}, "tools", 400), ("/tokenize", {"prompt": "a", "model": "x"}, "model", 404),
    ("/tokenize", {"messages": []}, "messages", 400), ("/tokenize", {"prompt": 1}, "prompt", 400),
    ("/tokenize", {"prompt": "a", "x": 1}, "x", 400),
    ("/tokenize", {"messages": USER, "chat_template": "a"}, "chat_template", 400),
    ("/detokenize", {}, "tokens", 400), ("/detokenize", {"tokens": [-1]}, "tokens", 400),
    ("/detokenize", {"tokens": [10**30]}, "tokens", 400), ("/detokenize", {"tokens": [True]}, "tokens[0]", 400),
    ("/detokenize", {"tokens": [5], "model": "x"}, "model", 404)])
def test_refusals(path: str, body: Any, param: str, status: int) -> None:
    reply = call(path, body)
    assert (reply.status, reply.json["error"]["param"]) == (status, param)
