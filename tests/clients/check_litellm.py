"""litellm: sync, stream, async and the mapping of errors, as a hosted vLLM and as an OpenAI."""

import asyncio
from typing import Any

import litellm
from recipes import BASE, MODEL, QUESTION, WEATHER, recipe, run

ASK: Any = {"messages": QUESTION, "api_base": BASE, "api_key": "x", "max_tokens": 16, "temperature": 0, "num_retries": 0}
NAMES = (f"hosted_vllm/{MODEL}", f"openai/{MODEL}")


@recipe
def completion() -> None:
    for name in NAMES:
        assert "Paris" in litellm.completion(model=name, **ASK).choices[0].message.content
    answer = asyncio.run(litellm.acompletion(model=NAMES[0], **ASK))
    assert answer.usage.completion_tokens <= 16


@recipe
def stream() -> None:
    for name in NAMES:
        parts = [chunk.choices[0].delta.content or "" for chunk in litellm.completion(model=name, stream=True, **ASK)]
        assert len(parts) > 3 and "Paris" in "".join(parts)


@recipe
def tools() -> None:
    answer = litellm.completion(model=NAMES[0], tools=[WEATHER], tool_choice="required", **{**ASK, "max_tokens": 64})
    assert answer.choices[0].message.tool_calls[0].function.name == "get_weather"


@recipe
def errors() -> None:
    for error, change in ((litellm.NotFoundError, {"model": "hosted_vllm/nobody"}),
                          (litellm.BadRequestError, {"model": NAMES[0], "temperature": -1})):
        try:
            litellm.completion(**{**ASK, **change})
        except error:
            continue
        raise AssertionError(f"no {error.__name__}")


run()
