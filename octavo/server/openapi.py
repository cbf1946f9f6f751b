"""/openapi.json: the OpenAPI 3.1 document of this server, made of the structs that it reads and writes.

Owns how a document is put together; routes are openapi_operations', what fields accept is openapi_fields'. It speaks of the
server that serves it: names, limits and vocabulary are those in force. Invariant: every body that this server answers with 200
fits its schema, and so does every answer.
"""

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from octavo import __version__
from octavo.server.errors import ANTHROPIC_TYPES, HEADERS, TYPES, is_anthropic
from octavo.server.http import OPEN_PATHS
from octavo.server.models import served_names
from octavo.server.openapi_fields import ANSWERS, CASES, FORMS, Schema, fields, null_or
from octavo.server.openapi_operations import OPERATIONS, Operation
from octavo.server.probes import Status
from octavo.server.service import Service
from octavo.server.sse import JSON, send_json

REF = "#/components/schemas/{name}"
MEANINGS = {
    400: "A mistake in the request", 401: "No valid API key", 404: "No such model", 405: "Another method than this route has",
    413: "The body is too large", 415: "The body is no plain JSON in UTF-8", 500: "A fault of the server",
    503: "Not ready, full or shutting down: come again", 504: "The request was not done within its time limit",
}
CODES = ("context_length_exceeded", "model_not_found", "invalid_api_key", "unsupported_field", "unknown_route")
# Which types a keyword speaks of: it is left out where a field of the same name has none of them.
KEYWORDS = {
    "minimum": {"integer", "number"}, "maximum": {"integer", "number"}, "exclusiveMinimum": {"number"},
    "minLength": {"string"}, "maxLength": {"string"}, "pattern": {"string"},
    "items": {"array"}, "minItems": {"array"}, "maxItems": {"array"},
    "propertyNames": {"object"}, "maxProperties": {"object"}, "additionalProperties": {"object"},
}


async def serve(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """GET /openapi.json."""
    await send_json(send, encoded(service))


@functools.lru_cache(maxsize=1)  # a process has one service
def encoded(service: Service) -> bytes:
    """The document as JSON."""
    return msgspec.json.encode(document(service))


def document(service: Service) -> dict[str, Any]:
    """The document; ApiError 503 while there is no engine, since its limits are not known."""
    server = service.server
    schemas = _schemas(service) | {"Error": _error(), "AnthropicError": _anthropic_error()}
    paths: dict[str, dict[str, Any]] = {}
    for operation in OPERATIONS:
        path = operation.path.replace(":path}", "}")
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation, service)
    guarded = bool(server.api_key or server.api_key_file)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Octavo", "version": __version__, "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "LLM inference behind the APIs of OpenAI, Anthropic and vLLM. In requests, null counts as absent.",
        },
        "servers": [{"url": server.root_path or "/"}],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "headers": _headers(),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
        "security": [{"bearer": []}, {"key": []}] if guarded else [],
    }


def _schemas(service: Service) -> dict[str, Schema]:
    """The schemas of all structs."""
    asked = _components(operation.request for operation in OPERATIONS)
    given = _components([Status, *(operation.response for operation in OPERATIONS)])
    bodies = {operation.request.__name__ for operation in OPERATIONS if operation.request is not None}
    known = fields(service)
    found = {name: _schema(name, schema, None if name not in asked else known) for name, schema in (given | asked).items()}
    for name in bodies:  # unlike those of nested objects, unknown members of a body may be null
        found[name]["additionalProperties"] = {"type": "null"}
    for name, forms in FORMS.items():
        found[name] = {"description": found[name]["description"], "oneOf": forms}
    for name, cases in CASES.items():
        found[name]["oneOf"] = cases
    return found


def _components(structs: Iterable[type[msgspec.Struct] | None]) -> dict[str, Schema]:
    return msgspec.json.schema_components([struct for struct in structs if struct is not None], ref_template=REF)[1]


def _schema(name: str, schema: Schema, known: Mapping[str, Schema] | None) -> Schema:
    """A struct's schema, sharper than its types.

    Args:
        known: what the fields of requests accept; None for a part of an answer, where what has a default is always there, and
            a text that is one never changes.
    """
    found: Schema = {"description": inspect.cleandoc(schema["description"])} if "description" in schema else {}
    found["type"] = "object"
    properties, required = {}, list(schema.get("required", ()))
    for field, kind in schema.get("properties", {}).items():
        if "default" in kind:
            kind = dict(kind)
            default = kind.pop("default")
            if known is None:
                required.append(field)
                if isinstance(default, str):
                    kind = {"const": default}
        more = ANSWERS.get(f"{name}.{field}", {}) if known is None else known.get(f"{name}.{field}", known.get(field, {}))
        properties[field] = _sharper(_flat(kind), more)
    found["properties"] = properties
    if required:
        found["required"] = required
    if "additionalProperties" in schema:
        found["additionalProperties"] = schema["additionalProperties"]
    return found


def _flat(schema: Schema) -> Schema:
    """A choice between plain types as one list of types."""
    forms = schema.get("anyOf", ())
    keys = [key for form in forms for key in form if key != "type"]
    if not forms or any("type" not in form for form in forms) or len(keys) != len(set(keys)):
        return schema
    types = [form["type"] for form in forms]
    if len(set(types)) != len(types):
        return schema
    return {key: value for form in forms for key, value in form.items()} | {"type": types}


def _sharper(schema: Schema, more: Schema) -> Schema:
    if "anyOf" in more or "enum" in more or "const" in more or "type" in more:
        return more
    types = schema.get("type", ())
    types = {types} if isinstance(types, str) else set(types)
    return schema | {key: value for key, value in more.items() if not types.isdisjoint(KEYWORDS.get(key, types))}


def _operation(operation: Operation, service: Service) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": f"{operation.method.lower()}{operation.path.partition('{')[0].replace('/', '_').rstrip('_')}"
                       f"{'_one' if '{' in operation.path else ''}",
        "summary": operation.summary, "tags": [operation.tag], "responses": _responses(operation),
    }
    if (start := operation.path.find("{")) >= 0:
        name = operation.path[start + 1 : -1].removesuffix(":path")
        schema: Schema = {"type": "string"} if name != "model" else {"enum": list(served_names(service))}
        found["parameters"] = [{"name": name, "in": "path", "required": True, "schema": schema}]
    if operation.request is not None:
        examples = {name: {"value": value} for name, value in operation.examples.items()}
        found["requestBody"] = {"required": True, "content": {JSON: {"schema": _ref(operation.request), "examples": examples}}}
    if operation.path in OPEN_PATHS or (operation.path == "/metrics" and not service.server.metrics_auth):
        found["security"] = []
    return found


def _responses(operation: Operation) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.response is not None:
        content[JSON] = {"schema": _ref(operation.response)}
    if operation.stream is not None:
        content[operation.stream] = _stream(operation.stream)
    if operation.media is not None:
        content[operation.media] = {} if operation.media == JSON else {"schema": {"type": "string"}}
    found: dict[str, Any] = {}
    if content or operation.unready:
        found["200"] = {"description": "The answer"} | ({"content": content} if content else {})
    if operation.path == "/":
        found["304"] = {"description": "The page has not changed"}
    name = "AnthropicError" if is_anthropic(operation.path) else "Error"
    for status in sorted({*operation.refusals, *((405,) if operation.refusals else ())}):
        found[str(status)] = {"description": MEANINGS[status], "content": {JSON: {"schema": {"$ref": REF.format(name=name)}}}}
        if headers := HEADERS.get(status):
            found[str(status)]["headers"] = {header: {"$ref": f"#/components/headers/{header}"} for header in headers}
    if operation.unready:
        found["503"] = {"description": "Not now", "content": {JSON: {"schema": _ref(Status)}},
                        "headers": {"Retry-After": {"$ref": "#/components/headers/Retry-After"}}}
    return found


def _stream(media: str) -> dict[str, Any]:
    """A stream; in OpenAPI 3.1, the schema of one is that of each of its events."""
    if media != "text/event-stream":
        return {"schema": {"type": "string", "description": "JSON objects, each the whole answer so far and ended by a NUL."}}
    return {"schema": {"type": "object", "required": ["data"], "properties": {
        "event": {"type": "string"}, "data": {"type": "string", "description": "A JSON object, or [DONE]."}}}}


def _ref(struct: type[msgspec.Struct]) -> Schema:
    return {"$ref": REF.format(name=struct.__name__)}


def _error() -> Schema:
    kinds = sorted({"invalid_request_error", *TYPES.values()})
    return _object(error=_object(
        message={"type": "string", "maxLength": 2000}, type={"enum": kinds}, param={"type": ["string", "null"]},
        code=null_or(*CODES)))


def _anthropic_error() -> Schema:
    kinds = sorted({"invalid_request_error", *ANTHROPIC_TYPES.values()})
    return _object(type={"const": "error"}, error=_object(type={"enum": kinds}, message={"type": "string", "maxLength": 2000}))


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _headers() -> dict[str, Any]:
    return {
        "Retry-After": {"description": "Seconds after which to come again", "schema": {"type": "integer", "minimum": 1}},
        "WWW-Authenticate": {"schema": {"const": "Bearer"}},
        "x-should-retry": {"description": "Whether clients should send it again", "schema": {"const": "false"}},
    }


ROUTES = (("GET", "/openapi.json", serve),)
