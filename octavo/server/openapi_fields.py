"""What fields accept beyond their Python types: ranges, names, forms of nested objects, as JSON schema.

Owns the part of the OpenAPI document that types cannot say; it does not check anything: each rule here is enforced where its
field is read, and stands here so that a client can read it before it sends. Invariant: a field named here exists.
"""

from collections.abc import Mapping
from typing import Any

from octavo import params
from octavo.server.models import served_names
from octavo.server.prompting import EFFORTS
from octavo.server.responses_input import INCLUDABLE
from octavo.server.sampling_fields import MAX_ID_CHARS, SERVICE_TIERS
from octavo.server.service import Service
from octavo.server.tokenize import CHAT_ONLY
from octavo.server.tools.definitions import MAX_TOOLS, NAME
from octavo.text.chat import RESERVED, ROLES

Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
JSON_OBJECT: Schema = {"type": "object"}
NULL: Schema = {"type": "null"}
_NAME: Schema = {"type": "string", "pattern": f"^{NAME.pattern}$"}


def null_or(*values: object) -> Schema:
    """One of these values, or null, which counts as absent."""
    return {"enum": [*values, None]}


def tagged(kind: str, *required: str, **properties: Schema) -> Schema:
    """An object that says what it is."""
    return {"type": "object", "properties": {"type": {"const": kind}, **properties}, "required": ["type", *required]}


def closed(schema: Schema) -> Schema:
    """The same object without further properties."""
    return schema | {"additionalProperties": False}


def list_of(item: Schema, **more: object) -> Schema:
    """An array."""
    return {"type": "array", "items": item, **more}


def texts(*kinds: str) -> Schema:
    """A text, or a list of parts that are text."""
    return {"anyOf": [TEXT, list_of({"anyOf": [tagged(kind, "text", text=TEXT) for kind in kinds]}, minItems=1)]}


def message(roles: tuple[str, ...], content: Schema, **more: Schema) -> Schema:
    """A message; other keys reach the chat template."""
    return {"type": "object", "properties": {"role": {"enum": list(roles)}, "content": content, **more},
            "required": ["role", "content"]}


CALL = tagged("function", "function", id=TEXT, function={
    "type": "object", "properties": {"name": TEXT, "arguments": TEXT}, "required": ["name", "arguments"]})
CHAT_MESSAGES = list_of({"anyOf": [
    message(ROLES, texts("text")),
    message(("assistant",), {"anyOf": [*texts("text")["anyOf"], NULL]}, tool_calls=list_of(CALL, minItems=1))
    | {"required": ["role", "tool_calls"]}]}, minItems=1)
_FUNCTION_PROPERTIES: Schema = {
    "name": _NAME, "description": {"type": ["string", "null"]}, "strict": {"type": ["boolean", "null"]},
    "parameters": {"anyOf": [tagged("object") | {"required": []}, NULL]}}
FUNCTION: Schema = {"type": "object", "required": ["name"], "properties": _FUNCTION_PROPERTIES}
CHAT_TOOLS = list_of(tagged("function", "function", function=FUNCTION), maxItems=MAX_TOOLS)
NAMED_FUNCTION = {"type": "object", "properties": {"name": TEXT}, "required": ["name"]}

RESPONSES_TOOLS = list_of(tagged("function", "name", **_FUNCTION_PROPERTIES), maxItems=MAX_TOOLS)
RESPONSES_ITEM = {"anyOf": [
    message(("user", "assistant", "system", "developer"), texts("input_text", "output_text"), type={"const": "message"}),
    tagged("function_call", "call_id", "name", "arguments", call_id=TEXT, name=TEXT, arguments=TEXT),
    tagged("function_call_output", "call_id", "output", call_id=TEXT, output=texts("input_text")),
    tagged("reasoning", "summary", summary=list_of(tagged("summary_text", "text", text=TEXT)),
           content=list_of(tagged("reasoning_text", "text", text=TEXT)), encrypted_content=NULL)]}

TEXT_BLOCK = tagged("text", "text", text=TEXT)
USER_BLOCK = {"anyOf": [TEXT_BLOCK, tagged("tool_result", "tool_use_id", tool_use_id=TEXT, content=texts("text"),
                                           is_error={"type": "boolean"})]}
ASSISTANT_BLOCK = {"anyOf": [TEXT_BLOCK, tagged("thinking", "thinking", thinking=TEXT),
                             tagged("tool_use", "id", "name", "input", id=TEXT, name=TEXT, input=JSON_OBJECT)]}
CLAUDE_MESSAGES = list_of({"anyOf": [
    message(("user",), {"anyOf": [TEXT, list_of(USER_BLOCK, minItems=1)]}),
    message(("assistant",), {"anyOf": [TEXT, list_of(ASSISTANT_BLOCK, minItems=1)]}),
    message(("system",), texts("text"))]}, minItems=1)
CLAUDE_TOOLS = list_of({"type": "object", "required": ["name", "input_schema"], "properties": {
    "type": null_or("custom"), "name": _NAME, "description": {"type": ["string", "null"]},
    "input_schema": tagged("object") | {"required": []}}}, maxItems=MAX_TOOLS)


FORMS: Mapping[str, list[Schema]] = {
    "ResponseFormat": [closed(tagged("text")), closed(tagged("json_object")), closed(tagged(
        "json_schema", "json_schema", json_schema={"$ref": "#/components/schemas/JsonSchemaFormat"}))],
    "TextFormat": [closed(tagged("text")), closed(tagged("json_object")), closed(tagged(
        "json_schema", "name", "schema", name=TEXT, schema=JSON_OBJECT, strict={"type": ["boolean", "null"]},
        description={"type": ["string", "null"]}))],
}
"""Structs that are a choice between objects: by name, what takes the place of their schema."""
CASES: Mapping[str, list[Schema]] = {
    "StructuredOutputs": [{"required": [name], "properties": {name: {"not": NULL}}} for name in params.CONSTRAINTS],
    "TokenizeRequest": [
        {"required": ["prompt"], "properties": {"prompt": TEXT, "messages": NULL, **dict.fromkeys(CHAT_ONLY, NULL)}},
        {"required": ["messages"], "properties": {"messages": {"type": "array"}, "prompt": NULL}}],
}
"""Structs of which exactly one of several things must be said: by name, what joins their schema."""


ANSWERS: Mapping[str, Schema] = {
    "ChatChoice.finish_reason": {"enum": ["stop", "length", "tool_calls"]},
    "CompletionChoice.finish_reason": {"enum": ["stop", "length"]},
    "Response.status": {"enum": ["completed", "incomplete"]},
    "IncompleteDetails.reason": {"const": "max_output_tokens"},
    "Message.stop_reason": {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use"]},
}
"""What fields of answers hold, by Struct.name."""


def fields(service: Service) -> Mapping[str, Schema]:
    """Keywords of fields, by name or by Struct.name, as this server and this model have them. The engine must be ready."""
    server, info = service.server, service.info
    ids: Schema = {"type": "integer", "minimum": 0, "maximum": info.vocab_size - 1}
    stop: Schema = {"type": "string", "minLength": 1, "maxLength": server.max_stop_chars}
    words: Schema = {"items": stop, "maxItems": server.max_stop}
    top: Schema = {"minimum": 0, "maximum": min(service.config.max_logprobs, info.vocab_size)}
    count: Schema = {"minimum": 1, "maximum": server.max_n}
    length: Schema = {"minimum": 1, "maximum": info.max_model_len - 1}
    penalty: Schema = {"minimum": -2, "maximum": 2}
    low, high = params.REPETITION_RANGE
    by_priority = service.config.scheduling_policy == "priority"
    priority: Schema = {"minimum": -(2**63), "maximum": 2**64 - 1} if by_priority else null_or(0)
    return {
        "model": null_or(*served_names(service)),
        "n": count, "best_of": count, "presence_penalty": penalty, "frequency_penalty": penalty,
        "repetition_penalty": {"minimum": low, "maximum": high},
        "temperature": {"minimum": 0, "maximum": params.MAX_TEMPERATURE},
        "top_p": {"exclusiveMinimum": 0, "maximum": 1}, "top_k": {"minimum": -1, "maximum": 2**31 - 1},
        "min_p": {"minimum": 0, "maximum": 1}, "seed": {"minimum": 0, "maximum": params.MAX_SEED},
        "length_penalty": {"minimum": -params.MAX_LENGTH_PENALTY, "maximum": params.MAX_LENGTH_PENALTY},
        "early_stopping": null_or(True, False, "never"),
        "stop": stop | words | {"type": ["string", "array", "null"]}, "stop_sequences": words,
        "stop_token_ids": {"items": ids}, "allowed_token_ids": {"items": ids, "minItems": 1},
        "bad_words": {"items": stop, "maxItems": server.max_logit_bias},
        "logit_bias": {"propertyNames": {"pattern": "^[0-9]{1,10}$"}, "maxProperties": server.max_logit_bias,
                       "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
        "max_tokens": length, "max_completion_tokens": length, "max_output_tokens": length,
        "CompletionRequest.max_tokens": length | {"minimum": 0},
        "min_tokens": length | {"minimum": 0}, "timeout": {"exclusiveMinimum": 0},
        "CompletionRequest.logprobs": top, "prompt_logprobs": top, "top_logprobs": top,
        "truncate_prompt_tokens": {"minimum": -1, "not": {"const": 0}}, "priority": priority,
        "cache_salt": {"minLength": 1, "maxLength": MAX_ID_CHARS},
        "request_id": {"pattern": f"^[ -~]{{1,{MAX_ID_CHARS}}}$"},
        "service_tier": null_or(*SERVICE_TIERS), "reasoning_effort": null_or(*EFFORTS),
        "CompletionRequest.prompt": {"anyOf": [
            TEXT, list_of(TEXT, minItems=1, maxItems=server.max_prompts), list_of(ids, minItems=1),
            list_of(list_of(ids, minItems=1), minItems=1, maxItems=server.max_prompts)]},
        "DetokenizeRequest.tokens": {"items": ids},
        "ChatRequest.messages": CHAT_MESSAGES, "TokenizeRequest.messages": {"anyOf": [CHAT_MESSAGES, NULL]},
        "ChatRequest.tools": {"anyOf": [CHAT_TOOLS, NULL]}, "TokenizeRequest.tools": {"anyOf": [CHAT_TOOLS, NULL]},
        "ChatRequest.tool_choice": {"anyOf": [
            null_or("none", "auto", "required"), tagged("function", "function", function=NAMED_FUNCTION)]},
        "choice": {"minItems": 1}, "guided_choice": {"minItems": 1},
        "regex": {"minLength": 1}, "guided_regex": {"minLength": 1}, "grammar": {"minLength": 1},
        "guided_grammar": {"minLength": 1}, "modalities": null_or(["text"]),
        "chat_template": {} if server.trust_request_chat_template else NULL,
        "chat_template_kwargs": {"propertyNames": {"not": {"enum": list(RESERVED)}}},
        "ResponsesRequest.input": {"anyOf": [TEXT, list_of(RESPONSES_ITEM, minItems=1)]},
        "ResponsesRequest.tools": {"anyOf": [RESPONSES_TOOLS, NULL]},
        "ResponsesRequest.tool_choice": {"anyOf": [
            null_or("none", "auto", "required"), tagged("function", "name", name=TEXT)]},
        "include": {"items": {"enum": list(INCLUDABLE)}}, "truncation": null_or("disabled"), "background": null_or(False),
        "previous_response_id": NULL, "conversation": NULL, "TextOptions.verbosity": null_or("medium"),
        "ReasoningOptions.effort": null_or(*EFFORTS), "summary": null_or("auto"), "generate_summary": null_or("auto"),
        "context": null_or("auto"), "mode": null_or("standard"),
        "Said.messages": CLAUDE_MESSAGES, "MessagesRequest.messages": CLAUDE_MESSAGES,
        "Said.tools": {"anyOf": [CLAUDE_TOOLS, NULL]}, "MessagesRequest.tools": {"anyOf": [CLAUDE_TOOLS, NULL]},
        "Said.tool_choice": _CLAUDE_CHOICE, "MessagesRequest.tool_choice": _CLAUDE_CHOICE,
        "system": {"anyOf": [*texts("text")["anyOf"], NULL]}, "MessagesRequest.service_tier": null_or("auto", "standard_only"),
        "Thinking.type": {"enum": ["enabled", "adaptive", "disabled"]}, "display": null_or("summarized", "omitted"),
        "OutputFormat.type": {"const": "json_schema"}, "OutputConfig.effort": null_or(*EFFORTS),
    }


_CLAUDE_CHOICE: Schema = {"anyOf": [NULL, *({"type": "object", "required": ["type", *more], "properties": {
    "type": {"enum": kinds}, "disable_parallel_tool_use": {"type": "boolean"}, **dict.fromkeys(more, TEXT)}}
    for kinds, more in ((["auto", "any", "none"], ()), (["tool"], ("name",))))]}
