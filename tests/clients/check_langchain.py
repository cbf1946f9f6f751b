"""langchain-openai: invoke, stream, structured output, tools."""

from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict, Field, SecretStr
from recipes import BASE, MODEL, recipe, run

model = ChatOpenAI(model=MODEL, base_url=BASE, api_key=SecretStr("x"), temperature=0, max_retries=0, timeout=60)
short = model.bind(max_tokens=16)
QUESTION = "What is the capital of France?"


class City(BaseModel):
    """A city."""

    model_config = ConfigDict(extra="forbid")  # a small model would go on adding members that are not forbidden

    name: str = Field(max_length=20)
    people: int = Field(ge=0, le=99)


@recipe
def invoke() -> None:
    answer = short.invoke(QUESTION)
    assert "Paris" in answer.text and answer.usage_metadata["output_tokens"] <= 16  # type: ignore[attr-defined]


@recipe
def stream() -> None:
    parts = [part.text for part in short.stream(QUESTION)]  # type: ignore[attr-defined]
    assert len(parts) > 3 and "Paris" in "".join(parts)


@recipe
def structured_output() -> None:
    for method in ("json_schema", "function_calling"):
        found = model.with_structured_output(City, method=method).invoke("Name a city.")  # type: ignore[arg-type]
        assert isinstance(found, City), method


@recipe
def tools() -> None:
    bound = model.bind_tools([City], tool_choice="any").bind(max_tokens=64)
    answer = bound.invoke("Name a city.")
    (call,) = answer.tool_calls  # type: ignore[attr-defined]
    assert call["name"] == "City" and "name" in call["args"]
    assert short.invoke([HumanMessage("Name a city."), answer, ToolMessage("noted", tool_call_id=call["id"])]).text
    chunks = list(bound.stream("Name a city."))
    whole = chunks[0]
    for chunk in chunks[1:]:
        whole = whole + chunk  # type: ignore[assignment, operator]
    assert whole.tool_calls[0]["args"].keys() == call["args"].keys()  # type: ignore[attr-defined]


run()
