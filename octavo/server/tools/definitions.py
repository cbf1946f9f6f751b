"""The tools and the tool_choice of a request, checked.

Owns every rule about what a client may send there; it does not know formats or grammars. Invariant: a Tool that exists
has a name that every format can carry and a schema that a grammar can be made of, also where nothing is forced, so that a
mistake is told at once and not when the model happens to call.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from llguidance import LLMatcher

from octavo.errors import RequestError
from octavo.text.matcher import with_room
from octavo.text.schema import DEFAULT, Limits, SchemaError, read_schema

MAX_TOOLS = 128
MAX_CHARS = 1 << 20  # of all schemas together, as JSON
# OpenAI's pattern and the dot, which servers of other protocols use and vLLM lets through.
NAME = re.compile(r"[A-Za-z0-9_.\-]{1,64}")
ANYTHING: Mapping[str, Any] = {"type": "object"}
NOTHING: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
_CACHED_CHARS = 1 << 14


@dataclass(frozen=True, slots=True)
class Tool:
    """One function.

    Attributes:
        schema: of its arguments, an object. Where the client gave none, there are no arguments.
        strict: arguments must follow the schema also where the model is free to call or not.
        definition: as the client sent it, for the chat template and ``make_parser``.
    """

    name: str
    schema: Mapping[str, Any]
    strict: bool
    definition: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What the client wants: mode, and with "named" the tool's name."""

    mode: Literal["none", "auto", "required", "named"]
    name: str | None = None


def check_tools(tools: object, limits: Limits = DEFAULT) -> list[Tool]:
    """The tools of a request; None and an empty list are none.

    Args:
        limits: of the schema of each; whether the model may call it or must, they are the same.

    Raises:
        RequestError: with param "tools"; the message names the place and what is wrong.
    """
    if tools is None:
        return []
    if not isinstance(tools, Sequence) or isinstance(tools, (str, bytes)):
        raise _error(f"tools must be a list, got {_show(tools)}.")
    if len(tools) > MAX_TOOLS:
        raise _error(f"tools must hold at most {MAX_TOOLS} tools, got {len(tools)}.")
    checked, size, names = list[Tool](), 0, set[str]()
    for i, tool in enumerate(tools):
        one, chars = _tool(tool, f"tools[{i}]", limits)
        if one.name in names:
            raise _error(f"tools[{i}].function.name {one.name!r} is used twice.")
        names.add(one.name)
        checked.append(one)
        size += chars
        if size > MAX_CHARS:
            raise _error(f"the schemas of tools must not be longer than {MAX_CHARS} characters together.")
    return checked


def check_tool_choice(choice: object, tools: Sequence[Tool]) -> ToolChoice:
    """The tool_choice of a request: none, auto, required or a named function; by default auto where there are tools.

    Raises:
        RequestError: with param "tool_choice": no such form, no such tool, or no tools at all to choose from.
    """
    if choice is None:
        return ToolChoice("auto" if tools else "none")
    if choice == "none":
        return ToolChoice("none")
    named = None if isinstance(choice, str) else _named(choice)
    if named is None and choice not in ("auto", "required"):
        raise _error(
            "tool_choice must be none, auto, required or {'type': 'function', 'function': {'name': ...}}, "
            f"got {_show(choice)}.", "tool_choice")
    if not tools:
        raise _error("tool_choice is only allowed together with tools.", "tool_choice")
    if named is None:
        return ToolChoice("auto" if choice == "auto" else "required")
    if named not in {tool.name for tool in tools}:
        raise _error(f"tool_choice names {_show(named)}, which is not among tools.", "tool_choice")
    return ToolChoice("named", named)


def _named(choice: object) -> str | None:
    if not isinstance(choice, Mapping) or choice.get("type") != "function":
        return None
    function = choice.get("function")
    name = function.get("name") if isinstance(function, Mapping) else None
    return name if isinstance(name, str) else None


def _tool(tool: object, place: str, limits: Limits) -> tuple[Tool, int]:
    if not isinstance(tool, Mapping):
        raise _error(f"{place} must be an object, got {_show(tool)}.")
    if tool.get("type") != "function":
        raise _error(f"{place}.type must be 'function', got {_show(tool.get('type'))}.")
    function = tool.get("function")
    if not isinstance(function, Mapping):
        raise _error(f"{place}.function must be an object, got {_show(function)}.")
    name = function.get("name")
    if not isinstance(name, str) or NAME.fullmatch(name) is None:
        raise _error(
            f"{place}.function.name must be 1 to 64 letters, digits, '_', '-' or '.', got {_show(name)}.")
    for key, kind, known in (("description", str, "a string"), ("strict", bool, "true or false")):
        if function.get(key) is not None and not isinstance(function[key], kind):
            raise _error(f"{place}.function.{key} must be {known}, got {_show(function[key])}.")
    strict = bool(function.get("strict"))
    schema, chars = _schema(function.get("parameters"), strict, f"{place}.function.parameters", limits)
    return Tool(name, schema, strict, tool), chars


def _schema(schema: object, strict: bool, place: str, limits: Limits) -> tuple[Mapping[str, Any], int]:
    if schema is None:
        return NOTHING, 0
    if not isinstance(schema, Mapping):
        raise _error(f"{place} must be a JSON schema, got {_show(schema)}.")
    if schema.get("type", "object") != "object":
        raise _error(f"{place}.type must be 'object', got {_show(schema['type'])}.")
    try:
        read_schema(dict(schema), limits)
    except SchemaError as error:
        raise _error(f"{place} cannot be used: {error}.") from None
    whole = {**ANYTHING, **schema}
    text = guided(whole, strict)
    problem = (_known_problem if len(text) <= _CACHED_CHARS else _problem)(text)
    if problem:
        raise _error(f"{place} cannot be used as a schema: {problem[:200]}")
    return whole, len(text)


def guided(schema: Mapping[str, Any], strict: bool) -> str:
    """A schema as JSON, with what llguidance has to know: spaces as in the texts that models are trained on, keywords that
    have no grammar passed over unless the tool is strict."""
    options = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True,
               "lenient": not strict}
    return json.dumps({**schema, "x-guidance": options}, ensure_ascii=False)


def _problem(text: str) -> str:
    """What is wrong with a schema, "" if nothing."""
    grammar = LLMatcher.grammar_from_json_schema(text)
    wrong, messages = with_room(len(text), lambda: LLMatcher.validate_grammar_with_warnings(grammar))
    return str(messages[0]) if wrong else ""


# Agents send the same tools with every request.
_known_problem = lru_cache(maxsize=1024)(_problem)


def _show(value: object) -> str:
    return f"{value!r:.200}"


def _error(message: str, param: str = "tools") -> RequestError:
    return RequestError(message, param)
