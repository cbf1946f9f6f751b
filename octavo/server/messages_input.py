"""What a request of /v1/messages says: its schema, and the way from there to a conversation and to sampling.

Owns the fields and the blocks of the input; it does not know what an answer looks like. Invariant: each field has an effect, is
refused with its name, or is metadata or cache_control: nothing is known of users here, and every prompt's prefix is cached.
"""

from typing import Any

import msgspec

from octavo.errors import RequestError
from octavo.server.dialect import function_tool, named_choice, parts_of, string_of, text_part, texts_of, wrong
from octavo.server.prompting import Conversation, choose_template
from octavo.server.sampling_fields import JsonSchemaFormat, ResponseFormat, SamplingFields
from octavo.server.service import Service
from octavo.server.tools.parser import detect_reasoning_format

NAMES = {".function.parameters": ".input_schema", ".function": "", "stop": "stop_sequences", "response_format": "output_config",
         "reasoning_effort": "output_config.effort"}
"""Chat's names -> the client's; see ``translated``."""
SERVICE_TIERS = ("auto", "standard_only")
DISPLAYS = ("summarized", "omitted")
CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Thinking(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Whether the model reasons first.

    Attributes:
        type: enabled, adaptive or disabled. budget_tokens: not below what max_tokens allows, since only the model ends its
            reasoning. display: omitted leaves the reasoning out of the answer; summarized is as complete as no display.
    """

    type: str
    budget_tokens: int | None = None
    display: str | None = None


class OutputFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A schema that the answer follows. type: json_schema."""

    type: str
    schema: dict[str, Any]


class OutputConfig(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the output should be like. effort: of the reasoning, for the chat template."""

    effort: str | None = None
    format: OutputFormat | None = None


class Said(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The part of a body that makes the prompt; the whole body of count_tokens.

    Attributes:
        messages: of roles user, assistant and system; a last one of the assistant is continued.
    """

    messages: list[dict[str, Any]]
    model: str | None = None
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None


class MessagesRequest(Said, kw_only=True, forbid_unknown_fields=True):
    """The body. timeout is ours: seconds that the answer may take."""

    max_tokens: int
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop_sequences: list[str] | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    timeout: float | None = None


def sampling_fields(request: MessagesRequest) -> SamplingFields:
    """How to sample, in the words that all APIs share."""
    if request.service_tier is not None and request.service_tier not in SERVICE_TIERS:
        raise RequestError(f"service_tier must be auto or standard_only, got {request.service_tier!r:.200}.", "service_tier")
    return SamplingFields(
        model=request.model, stream=request.stream, temperature=request.temperature, top_p=request.top_p, top_k=request.top_k,
        stop=request.stop_sequences, response_format=_format(request.output_config), timeout=request.timeout)


def _format(config: OutputConfig | None) -> ResponseFormat | None:
    if config is None or config.format is None:
        return None
    if config.format.type != "json_schema":
        raise RequestError(
            f"output_config.format.type must be json_schema, got {config.format.type!r:.200}.", "output_config.format")
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(name="answer", schema=config.format.schema))


def conversation(service: Service, said: Said) -> Conversation:
    """What was said, as chat writes it."""
    if not said.messages:
        raise RequestError("messages must not be empty.", "messages")
    messages: list[dict[str, Any]] = []
    if said.system is not None:
        messages.append({"role": "system", "content": texts_of(said.system, ("text",), "system")})
    for number, message in enumerate(said.messages):
        _add(messages, message, f"messages[{number}]")
    continues = said.messages[-1].get("role") == "assistant"
    if continues and "tool_calls" in messages[-1]:
        raise RequestError("messages must not end with a tool_use: its tool_result is missing.", "messages")
    tools = _tools(said.tools)
    choice, parallel = _choice(said.tool_choice)
    return Conversation(
        messages=messages, tools=tools, tool_choice=choice, parallel_tool_calls=parallel,
        include_reasoning=said.thinking is None or said.thinking.display != "omitted",
        add_generation_prompt=not continues, continue_final_message=continues,
        template_kwargs=None if said.thinking is None else _thinking(service, said.thinking, tools),
        reasoning_effort=None if said.output_config is None else said.output_config.effort)


def check_budget(request: MessagesRequest) -> None:
    """Refuse a bound on the reasoning below that on the whole output."""
    budget = None if request.thinking is None else request.thinking.budget_tokens
    if budget is not None and budget < request.max_tokens - 1:
        raise RequestError(
            f"thinking.budget_tokens cannot be kept here, so it must be at least max_tokens - 1 ({request.max_tokens - 1}), got "
            f"{budget}; thinking of type adaptive needs none.", "thinking")


def _add(messages: list[dict[str, Any]], message: dict[str, Any], place: str) -> None:
    """One message becomes one or more of chat's; users' messages in a row become one."""
    role, content, place = message.get("role"), message.get("content"), f"{place}.content"
    if role == "assistant":
        messages.append(_assistant(content, place))
    elif role == "system":
        messages.append({"role": "system", "content": texts_of(content, ("text",), place)})
    elif role != "user":
        raise wrong(f"{place.removesuffix('.content')}.role must be user, assistant or system, got {role!r:.200}.", place)
    elif isinstance(content, str):
        _say(messages, content)
    else:
        for where, block in parts_of(content, ("text", "tool_result"), place):
            if block["type"] == "text":
                _say(messages, string_of(block, "text", where))
            else:
                messages.append(_result(block, where))


def _say(messages: list[dict[str, Any]], text: str) -> None:
    """A user's text, behind what the same user said before it."""
    if not messages or messages[-1]["role"] != "user":
        messages.append({"role": "user", "content": text})
        return
    before = messages[-1]["content"]
    parts = [text_part(before)] if isinstance(before, str) else before
    messages[-1]["content"] = [*parts, text_part(text)]


def _result(block: dict[str, Any], place: str) -> dict[str, Any]:
    content, failed = block.get("content"), block.get("is_error")
    if failed is not None and not isinstance(failed, bool):
        raise wrong(f"{place}.is_error must be true or false, got {failed!r:.200}.", place)
    text = "" if content is None else texts_of(content, ("text",), f"{place}.content")
    result = {"role": "tool", "tool_call_id": string_of(block, "tool_use_id", place), "content": text}
    return result | {"is_error": True} if failed else result


def _assistant(content: object, place: str) -> dict[str, Any]:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    texts, thoughts, calls = [], [], []
    for where, block in parts_of(content, ("text", "thinking", "tool_use"), place):
        if block["type"] == "text":
            texts.append(text_part(string_of(block, "text", where)))
        elif block["type"] == "thinking":
            thoughts.append(string_of(block, "thinking", where))
        else:
            arguments = block.get("input")
            if not isinstance(arguments, dict):
                raise wrong(f"{where}.input must be an object, got {arguments!r:.200}.", place)
            calls.append({"id": string_of(block, "id", where), "type": "function",
                          "function": {"name": string_of(block, "name", where), "arguments": arguments}})
    message: dict[str, Any] = {"role": "assistant", "content": texts or ""}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return message | {"tool_calls": calls} if calls else message


def _tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    for number, tool in enumerate(tools or ()):
        if tool.get("type") not in (None, "custom"):
            raise wrong(f"tools[{number}]: type {tool['type']!r:.80} is not supported here, only custom.", "tools")
        if tool.get("input_schema") is None:
            raise wrong(f"tools[{number}].input_schema is required.", "tools")
    return None if tools is None else [function_tool(tool, "input_schema") for tool in tools]


def _choice(choice: dict[str, Any] | None) -> tuple[str | dict[str, Any] | None, bool]:
    """(tool_choice as chat has it, whether there may be several calls)."""
    if choice is None:
        return None, True
    kind, alone = choice.get("type"), choice.get("disable_parallel_tool_use")
    if alone is not None and not isinstance(alone, bool):
        raise RequestError(f"tool_choice.disable_parallel_tool_use must be true or false, got {alone!r:.200}.", "tool_choice")
    if kind == "tool":
        return named_choice(string_of(choice, "name", "tool_choice")), not alone
    if not isinstance(kind, str) or kind not in CHOICES:
        raise RequestError(f"tool_choice.type must be auto, any, tool or none, got {kind!r:.200}.", "tool_choice")
    return CHOICES[kind], not alone


def _thinking(service: Service, thinking: Thinking, tools: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    """What the template is told of thinking; RequestError where the model cannot do as it is told."""
    if thinking.type not in ("enabled", "adaptive", "disabled"):
        raise RequestError(f"thinking.type must be enabled, adaptive or disabled, got {thinking.type!r:.200}.", "thinking")
    if thinking.display is not None and thinking.display not in DISPLAYS:
        raise RequestError(f"thinking.display must be {' or '.join(DISPLAYS)}, got {thinking.display!r:.200}.", "thinking")
    if thinking.type != "enabled" and thinking.budget_tokens is not None:
        raise RequestError("thinking.budget_tokens needs the type enabled.", "thinking")
    wanted = thinking.type != "disabled"
    source = choose_template(service, None).source(tools)
    if "enable_thinking" in source:
        return {"enable_thinking": wanted}
    if "reasoning_effort" in source:
        return None if wanted else {"reasoning_effort": "none"}
    named = service.server.reasoning_parser
    reasons = detect_reasoning_format(source) is not None if named is None else named != "none"
    if wanted != reasons:
        raise RequestError(
            f"thinking cannot be {thinking.type} here: this model always reasons." if reasons else
            f"thinking cannot be {thinking.type} here: this model does not reason.", "thinking")
    return None
