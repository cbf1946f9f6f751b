"""instructor: typed answers through tools and through a JSON schema."""

import instructor
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field
from recipes import BASE, MODEL, recipe, run


class City(BaseModel):
    """A city."""

    model_config = ConfigDict(extra="forbid")  # a small model would go on adding members that are not forbidden

    name: str = Field(max_length=20)
    people: int = Field(ge=0, le=99)


def extract(mode: instructor.Mode) -> City:
    """A city, in one try."""
    client = instructor.from_openai(OpenAI(base_url=BASE, api_key="x", max_retries=0, timeout=60), mode=mode)
    found: City = client.chat.completions.create(
        model=MODEL, response_model=City, messages=[{"role": "user", "content": "Name a city."}], max_retries=0, temperature=0,
        max_tokens=128)
    return found


@recipe
def tools() -> None:
    assert isinstance(extract(instructor.Mode.TOOLS), City)


@recipe
def json_schema() -> None:
    assert isinstance(extract(instructor.Mode.JSON_SCHEMA), City)


run()
