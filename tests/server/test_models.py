"""octavo.server.models: the names of the model."""

import asyncio
from typing import Any

from fake_service import Reply, make_service, send_request, texts
from openai.types import Model


def get(path: str, **options: Any) -> Reply:
    async def run() -> Reply:
        service, _ = make_service(texts("x"), **options)
        reply = await send_request(service, path, b"", method="GET")
        service.close()
        return reply

    return asyncio.run(run())


def test_the_list() -> None:
    reply = get("/v1/models").json
    assert reply["object"] == "list" and len(reply["data"]) == 1
    card = reply["data"][0]
    Model.model_validate(card, strict=True)
    assert (card["id"], card["owned_by"], card["root"], card["parent"]) == ("some/model", "octavo", "some/model", None)
    assert card["max_model_len"] == 4096 and card["permission"][0]["object"] == "model_permission"


def test_names_that_the_operator_gives() -> None:
    options = {"server": {"served_model_name": ("one", "org/two")}}
    assert [card["id"] for card in get("/v1/models", **options).json["data"]] == ["one", "org/two"]
    assert get("/v1/models/org/two", **options).json["id"] == "org/two"
    assert get("/v1/models/org/two", **options).json["root"] == "some/model"

    async def answer(model: str | None) -> Reply:
        service, link = make_service(texts("x"), **options)
        reply = await send_request(service, "/v1/completions", {"prompt": "a", "model": model})
        await asyncio.gather(*link.tasks)
        service.close()
        return reply

    assert [asyncio.run(answer(name)).json.get("model") for name in (None, "one", "org/two", "some/model")] == [
        "one", "one", "org/two", None]


def test_a_model_that_is_not_there() -> None:
    reply = get("/v1/models/other")
    assert reply.status == 404 and reply.json["error"] == {
        "message": "The model 'other' does not exist.", "type": "invalid_request_error", "param": "model",
        "code": "model_not_found"}
