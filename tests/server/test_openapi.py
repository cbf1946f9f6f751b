"""octavo.server.openapi: the document names every route, says what is accepted, and what it shows works."""

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import fake_service
import pytest
from fake_service import FakeEngine, Service, make_service, send_request, texts
from jsonschema import Draft202012Validator

from octavo.server import messages, openapi, responses
from octavo.server.app import build_app
from octavo.server.auth import Keys
from octavo.server.openapi_fields import ANSWERS, CASES, FORMS, fields
from octavo.server.openapi_operations import OPERATIONS
from octavo.server.probes import Health

DIALECT = "https://json-schema.org/draft/2020-12/schema"


@pytest.fixture(autouse=True)
def all_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        fake_service, "ROUTES", (*fake_service.ROUTES, *responses.ROUTES, *messages.ROUTES, *openapi.ROUTES))


def fresh(**options: Any) -> tuple[Service, FakeEngine]:
    return make_service(texts('{"city": "Paris"}'), template=fake_service.THINKING, **options)


def documented(**options: Any) -> dict[str, Any]:
    async def run() -> dict[str, Any]:
        service, _ = fresh(**options)
        reply = await send_request(service, "/openapi.json", method="GET")
        service.close()
        assert reply.status == 200
        return reply.json

    return asyncio.run(run())


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator({"$schema": DIALECT, "components": document["components"], **schema})


def refs(value: Any) -> set[str]:
    if isinstance(value, dict):
        own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
        return own.union(*map(refs, value.values()))
    return set().union(*map(refs, value)) if isinstance(value, list) else set()


def test_every_route_is_in_the_document_and_nothing_else() -> None:
    async def nothing(scope: Any, receive: Any, send: Any) -> None: ...

    async def run() -> set[tuple[str, str]]:
        service, _ = fresh()
        metrics = SimpleNamespace(serve=nothing, http=None, num_open=nothing)
        gate: Any = build_app(service, Health(service.link, 1.0), metrics, Keys())
        service.close()
        return {(method, route.path) for route in gate.app.routes for method in route.methods - {"HEAD"}}

    served = asyncio.run(run())
    assert {(operation.method, operation.path) for operation in OPERATIONS} == served
    paths = documented()["paths"]
    assert {(method.upper(), path) for path, item in paths.items() for method in item} == {
        (method, path.replace(":path}", "}")) for method, path in served}
    names = [operation["operationId"] for item in paths.values() for operation in item.values()]
    assert len(set(names)) == len(names)


def test_the_document_holds_together() -> None:
    document = documented()
    assert document["openapi"].startswith("3.1.")
    for ref in refs(document):
        found: Any = document
        for part in ref.removeprefix("#/").split("/"):
            found = found[part]
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    named = {ref.rpartition("/")[2] for ref in refs(document)}
    assert named >= set(document["components"]["schemas"]), "a schema that nothing uses"


def test_no_rule_is_about_a_field_that_does_not_exist() -> None:
    async def run() -> Any:
        service, _ = fresh()
        service.close()
        return fields(service)

    schemas = documented()["components"]["schemas"]
    have = {f"{name}.{field}" for name, schema in schemas.items() for field in schema.get("properties", ())}
    have |= {name.partition(".")[2] for name in have}
    assert set(asyncio.run(run())) <= have
    assert set(ANSWERS) <= have
    assert set(FORMS) | set(CASES) <= set(schemas)


EXAMPLES = [(operation, name) for operation in OPERATIONS for name in operation.examples]


@pytest.mark.parametrize("operation, name", EXAMPLES, ids=[f"{op.path} {name}" for op, name in EXAMPLES])
def test_examples_are_answered_and_all_fits_its_schema(operation: Any, name: str) -> None:
    async def run() -> Any:
        service, _ = fresh()
        reply = await send_request(service, operation.path, operation.examples[name])
        service.close()
        return reply

    document, reply = documented(), asyncio.run(run())
    known = document["paths"][operation.path]["post"]
    validator(document, known["requestBody"]["content"]["application/json"]["schema"]).validate(operation.examples[name])
    assert reply.status == 200, reply.body
    kind = reply.headers["content-type"].partition(";")[0]
    assert kind in known["responses"]["200"]["content"]
    if kind == "application/json":
        validator(document, known["responses"]["200"]["content"][kind]["schema"]).validate(reply.json)


TURN = [{"role": "user", "content": "a"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "echo": True}, "/generate": {"prompt": "a"}, "/v1/responses": {"input": "a"},
    "/v1/messages": {"messages": TURN, "max_tokens": 1}, "/v1/chat/completions": {"messages": TURN}}


@pytest.mark.parametrize("path", BODIES)
def test_bounds_are_those_that_are_kept_to(path: str) -> None:
    """A value just beyond a bound is refused by name, and the bound itself is not."""
    document = documented()
    struct = next(operation.request.__name__ for operation in OPERATIONS if operation.path == path and operation.request)
    bounds = [(name, schema[keyword], away) for name, schema in document["components"]["schemas"][struct]["properties"].items()
              for keyword, away in (("minimum", -1), ("maximum", 1)) if keyword in schema]
    assert len(bounds) >= 5

    async def run() -> None:
        service, _ = fresh()
        for name, bound, away in bounds:
            beyond = bound + away * (1 if isinstance(bound, int) else abs(bound) / 100)
            for value in (bound, beyond):
                reply = await send_request(service, path, BODIES[path] | {name: value})
                message = "" if reply.status == 200 else reply.json["error"]["message"]
                # A length is refused for the room that prompt and answer take together, which depends on both.
                about = name in message or "max_model_len" in message
                if value == beyond:
                    assert reply.status == 400 and about, (name, value, reply.body)
                else:
                    assert not message.startswith(f"{name} must"), (name, value, message)
        service.close()

    asyncio.run(run())


def test_what_the_server_is_told_is_in_the_document() -> None:
    plain = documented()
    assert plain["security"] == [] and plain["servers"] == [{"url": "/"}]
    told = documented(server={
        "api_key": ("k",), "metrics_auth": False, "served_model_name": ("a", "b/c"), "root_path": "/llm", "max_n": 3,
        "trust_request_chat_template": True}, engine={"scheduling_policy": "priority"})
    assert told["security"] == [{"bearer": []}, {"key": []}] and told["servers"] == [{"url": "/llm"}]
    assert [told["paths"][path]["get"].get("security") for path in ("/health", "/metrics", "/", "/version")] == [
        [], [], [], None]
    chat = told["components"]["schemas"]["ChatRequest"]["properties"]
    assert chat["model"] == {"enum": ["a", "b/c", None]} and chat["n"]["maximum"] == 3
    assert chat["chat_template"]["type"] == ["string", "null"] and chat["priority"]["type"] == ["integer", "null"]
    assert told["paths"]["/v1/models/{model}"]["get"]["parameters"][0]["schema"] == {"enum": ["a", "b/c"]}


def test_errors_fit_their_schemas() -> None:
    async def run() -> Any:
        service, _ = fresh()
        bad = {"max_tokens": -1, "nonsense": 1}
        replies = [await send_request(service, path, bad) for path in ("/v1/completions", "/v1/messages")]
        service.close()
        return replies

    document = documented()
    for reply, path in zip(asyncio.run(run()), ("/v1/completions", "/v1/messages"), strict=True):
        schema = document["paths"][path]["post"]["responses"][str(reply.status)]["content"]["application/json"]["schema"]
        assert validator(document, schema).is_valid(json.loads(reply.body))
        other = {"$ref": "#/components/schemas/" + ("Error" if path == "/v1/messages" else "AnthropicError")}
        assert not validator(document, other).is_valid(json.loads(reply.body))
