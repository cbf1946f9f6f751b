"""What a request of /v1/responses says: its schema, and the way from there to a conversation and to sampling.

Owns the fields and the items of the input; it does not know what an answer looks like. Invariant: each field has an effect, is
refused with its name, or stands under ``NO_EFFECT`` of sampling_fields.
"""

from typing import Any

import msgspec

from octavo.errors import RequestError
from octavo.server.dialect import function_tool, named_choice, parts_of, string_of, texts_of, wrong
from octavo.server.prompting import Conversation
from octavo.server.sampling_fields import JsonSchemaFormat, ResponseFormat, SamplingFields, StreamOptions, StructuredOutputs

NAMES = {".function": "", "max_tokens": "max_output_tokens", "reasoning_effort": "reasoning.effort", "logprobs": "top_logprobs",
         "response_format": "text.format", "messages": "input", "prompt": "input"}
"""Chat's names -> the client's; see ``translated``."""
# Fields of SamplingFields that keep their names.
SAME = ("model", "stream", "temperature", "top_p", "service_tier", "frequency_penalty", "presence_penalty", "repetition_penalty",
        "top_k", "min_p", "seed", "stop", "stop_token_ids", "include_stop_str_in_output", "ignore_eos", "min_tokens",
        "skip_special_tokens", "logit_bias", "structured_outputs", "cache_salt", "priority", "request_id", "timeout")
LOGPROBS = "message.output_text.logprobs"
# Encrypted reasoning is what clients send back where a server keeps nothing; the reasoning here can be sent back as it is.
INCLUDABLE = (LOGPROBS, "reasoning.encrypted_content")
ROLES = ("user", "assistant", "system", "developer")


class TextFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """text, json_object, or json_schema with the rest."""

    type: str
    name: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None
    description: str | None = None


class TextOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What the text must look like. verbosity: medium, since no model here has a switch for it."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ReasoningOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """How to reason. effort: for the chat template. The others: the one value that says what happens anyway."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None
    context: str | None = None
    mode: str | None = None


class ResponsesStreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """include_obfuscation: without effect."""

    include_obfuscation: bool | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body: OpenAI's fields, then those of vLLM's that SamplingFields explains.

    Attributes:
        input: a text, or items: messages, function calls and their outputs, reasoning.
        instructions: a system message before them. max_output_tokens: None fills what fits.
        previous_response_id, conversation, background: refused, since nothing is kept here.
        truncation: disabled.
    """

    input: str | list[dict[str, Any]]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    truncation: str | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    previous_response_id: str | None = None
    conversation: str | dict[str, Any] | None = None
    background: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None
    service_tier: str | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    structured_outputs: StructuredOutputs | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    cache_salt: str | None = None
    priority: int | None = None
    request_id: str | None = None
    timeout: float | None = None


def check_request(request: ResponsesRequest) -> None:
    """Refuse what this server does not do."""
    for name in ("previous_response_id", "conversation"):
        if getattr(request, name) is not None:
            raise RequestError(f"{name}: this server keeps nothing between requests; send everything as input.", name)
    if request.background:
        raise RequestError("background must be false: this server keeps no responses.", "background")
    for name in request.include or ():
        if name not in INCLUDABLE:
            raise RequestError(f"include may hold {' and '.join(INCLUDABLE)}, got {name!r:.200}.", "include")
    text, reasoning = request.text or TextOptions(), request.reasoning or ReasoningOptions()
    _only("truncation", request.truncation, "disabled")
    _only("text.verbosity", text.verbosity, "medium")
    _only("reasoning.summary", reasoning.summary, "auto")
    _only("reasoning.generate_summary", reasoning.generate_summary, "auto")
    _only("reasoning.context", reasoning.context, "auto")
    _only("reasoning.mode", reasoning.mode, "standard")


def _only(name: str, value: str | None, known: str) -> None:
    if value is not None and value != known:
        raise RequestError(f"{name} must be {known}, got {value!r:.200}.", name)


def top_logprobs(request: ResponsesRequest) -> int | None:
    """How many alternatives come with each token; None: not even the token's own logprob."""
    top = request.top_logprobs or 0
    if top < 0:
        raise RequestError(f"top_logprobs must be 0 or more, got {top}.", "top_logprobs")
    return top if top or LOGPROBS in (request.include or ()) else None


def sampling_fields(request: ResponsesRequest) -> SamplingFields:
    """How to sample, in the words that all APIs share."""
    options = request.stream_options
    return SamplingFields(
        **{name: getattr(request, name) for name in SAME}, response_format=_format(request.text),
        stream_options=None if options is None else StreamOptions(include_obfuscation=options.include_obfuscation))


def _format(text: TextOptions | None) -> ResponseFormat | None:
    if text is None or text.format is None:
        return None
    wanted = text.format
    if wanted.type != "json_schema":
        for name in ("name", "schema", "strict", "description"):
            if getattr(wanted, name) is not None:
                raise RequestError(f"text.format.{name} needs the type json_schema.", "text.format")
        return ResponseFormat(type=wanted.type)
    if wanted.schema is None or wanted.name is None:
        raise RequestError("text.format: a json_schema needs a name and a schema.", "text.format")
    return ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(
        name=wanted.name, schema=wanted.schema, strict=wanted.strict, description=wanted.description))


def conversation(request: ResponsesRequest) -> Conversation:
    """What was said, as chat writes it."""
    transcript = _Transcript()
    if request.instructions is not None:
        transcript.messages.append({"role": "system", "content": request.instructions})
    if isinstance(request.input, str):
        transcript.messages.append({"role": "user", "content": request.input})
    else:
        for number, item in enumerate(request.input):
            transcript.add(item, f"input[{number}]")
    return Conversation(
        messages=transcript.messages, tools=_tools(request.tools), tool_choice=_choice(request.tool_choice),
        parallel_tool_calls=request.parallel_tool_calls is not False, template_kwargs=request.chat_template_kwargs,
        reasoning_effort=None if request.reasoning is None else request.reasoning.effort)


class _Transcript:
    """Chat's messages out of items: an answer's reasoning, text and calls are one message there."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self._answer: dict[str, Any] | None = None
        self._holds: set[str] = set()

    def add(self, item: dict[str, Any], place: str) -> None:
        match item.get("type") or "message":
            case "message":
                self._message(item, place)
            case "reasoning":
                self._open("reasoning", "text", "calls")["reasoning_content"] = _reasoning(item, place)
            case "function_call":
                function = {"name": string_of(item, "name", place), "arguments": string_of(item, "arguments", place)}
                self._open("calls").setdefault("tool_calls", []).append(
                    {"id": string_of(item, "call_id", place), "type": "function", "function": function})
            case "function_call_output":
                self._answer = None
                self.messages.append({
                    "role": "tool", "tool_call_id": string_of(item, "call_id", place),
                    "content": texts_of(item.get("output"), ("input_text",), f"{place}.output")})
            case kind:
                raise wrong(f"{place}: type {kind!r:.80} is not supported here, only message, reasoning, function_call and "
                            "function_call_output.", place)

    def _message(self, item: dict[str, Any], place: str) -> None:
        role = item.get("role")
        if role not in ROLES:
            raise wrong(f"{place}.role must be one of {', '.join(ROLES)}, got {role!r:.200}.", place)
        content = texts_of(item.get("content"), ("input_text", "output_text"), f"{place}.content")
        if role == "assistant":
            self._open("text", "calls")["content"] = content
        else:
            self._answer = None
            self.messages.append({"role": role, "content": content})

    def _open(self, part: str, *later: str) -> dict[str, Any]:
        """The answer to put a part into; a new one where the last holds such a part already (but for calls), or a later one."""
        taken = {*later} if part == "calls" else {part, *later}
        if self._answer is None or self._holds & taken:
            self._answer, self._holds = {"role": "assistant", "content": ""}, set()
            self.messages.append(self._answer)
        self._holds.add(part)
        return self._answer


def _reasoning(item: dict[str, Any], place: str) -> str:
    if item.get("encrypted_content") is not None:
        raise wrong(f"{place}.encrypted_content cannot be read here.", place)
    name, kind = ("content", "reasoning_text") if item.get("content") else ("summary", "summary_text")
    parts = parts_of(item.get(name), (kind,), f"{place}.{name}")
    return "\n".join(string_of(part, "text", where) for where, part in parts)


def _tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    for number, tool in enumerate(tools or ()):
        if tool.get("type") != "function":
            raise wrong(f"tools[{number}]: type {tool.get('type')!r:.80} is not supported here, only function.", "tools")
    return None if tools is None else [function_tool(tool, "parameters") for tool in tools]


def _choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return named_choice(choice.get("name"))
    if choice in (None, "none", "auto", "required"):
        return choice
    raise RequestError(
        f"tool_choice must be none, auto, required or {{'type': 'function', 'name': ...}}, got {choice!r:.200}.", "tool_choice")
