"""pydantic-ai: text, typed output, stream."""

import asyncio

from pydantic import BaseModel, ConfigDict, Field
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.output import NativeOutput
from pydantic_ai.providers.openai import OpenAIProvider
from recipes import BASE, MODEL, recipe, run

model = OpenAIChatModel(MODEL, provider=OpenAIProvider(base_url=BASE, api_key="x"))
SETTINGS = {"temperature": 0.0, "max_tokens": 128}


class City(BaseModel):
    """A city."""

    model_config = ConfigDict(extra="forbid")  # a small model would go on adding members that are not forbidden

    name: str = Field(max_length=20)
    people: int = Field(ge=0, le=99)


@recipe
def text() -> None:
    assert "Paris" in Agent(model, model_settings=SETTINGS).run_sync("What is the capital of France?").output


@recipe
def typed_output() -> None:
    for wanted in (City, NativeOutput(City)):
        found = Agent(model, output_type=wanted, model_settings=SETTINGS).run_sync("Name a city.")
        assert isinstance(found.output, City)


@recipe
def stream() -> None:
    async def read() -> list[str]:
        async with Agent(model, model_settings=SETTINGS).run_stream("What is the capital of France?") as result:
            return [piece async for piece in result.stream_text(delta=True, debounce_by=None)]

    parts = asyncio.run(read())
    assert len(parts) > 3 and "Paris" in "".join(parts)


run()
