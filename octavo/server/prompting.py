"""Prompting: a conversation as a client writes it becomes the text and the ids that the model reads.

Owns what may stand in a message, which template is used, and its variables; it does not know sampling or answers. Invariant:
what a template does not know is refused by name and never dropped.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from octavo.errors import ConfigError, RequestError
from octavo.server.sampling_fields import need_tokenizer
from octavo.server.service import Service
from octavo.text.chat import ChatTemplate, chat_prompt
from octavo.text.vocabulary import Tokenizer

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")


@dataclass(slots=True, kw_only=True)
class Conversation:
    """What a client says of a turn beside how to sample it.

    Attributes:
        messages: as OpenAI writes them. tools, tool_choice: the same, not yet checked.
        include_reasoning: False drops the reasoning from the events.
        echo: with a final message that is continued, the answer begins with it.
        chat_template, template_kwargs, documents, reasoning_effort: what the template may see.
    """

    messages: list[dict[str, Any]]
    tools: object = None
    tool_choice: object = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    echo: bool = False
    chat_template: str | None = None
    template_kwargs: Mapping[str, Any] | None = None
    documents: list[dict[str, Any]] | None = None
    reasoning_effort: str | None = None


def choose_template(service: Service, given: str | None) -> ChatTemplate:
    """The model's template, or where the operator trusts clients, the request's."""
    if given is not None:
        if not service.server.trust_request_chat_template:
            raise RequestError("chat_template is taken only by a server with --trust-request-chat-template.", "chat_template")
        try:
            return ChatTemplate(given, need_tokenizer(service).special_tokens, "chat_template")
        except ConfigError as error:
            raise RequestError(str(error), "chat_template") from None
    if service.template is None:
        raise RequestError("This model has no chat template; use /v1/completions, or give one with --chat-template.", "messages")
    return service.template


def render(template: ChatTemplate, tokenizer: Tokenizer, conversation: Conversation, tools: list[dict[str, Any]] | None,
           add_special_tokens: bool, content_format: str, look: Callable[[str], None] | None = None) -> tuple[str, list[int]]:
    """The prompt's text and ids; ``look`` as for ``chat_prompt``."""
    messages = [_message(message, number, content_format) for number, message in enumerate(conversation.messages)]
    source = template.source(tools)
    variables: dict[str, Any] = {}
    if conversation.documents is not None:
        if "documents" not in source:
            raise RequestError("This model's chat template knows no documents.", "documents")
        variables["documents"] = conversation.documents
    if conversation.reasoning_effort is not None:
        variables.update(_effort(conversation.reasoning_effort, source))
    variables.update(conversation.template_kwargs or {})
    generates = conversation.add_generation_prompt
    text, ids = chat_prompt(
        template, tokenizer, messages, tools, generates, conversation.continue_final_message, look, **variables)
    return text, surrounded(tokenizer, ids) if add_special_tokens else ids


def surrounded(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Ids with the tokens that the tokenizer puts around a text."""
    bare, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    before = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:before] + ids + whole[before + len(bare) :]


def echo_text(conversation: Conversation) -> str:
    """What the answer begins with: the final message, where it is the assistant's and the client wants it back."""
    last = conversation.messages[-1] if conversation.messages else {}
    if not conversation.echo or last.get("role") != "assistant":
        return ""
    content = last.get("content")
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content if isinstance(content, str) else ""


def _effort(effort: str, source: str) -> dict[str, Any]:
    if effort not in EFFORTS:
        raise RequestError(f"reasoning_effort must be one of {', '.join(EFFORTS)}, got {effort!r:.200}.", "reasoning_effort")
    if "reasoning_effort" in source:
        return {"reasoning_effort": effort}
    if "enable_thinking" in source:  # a switch is all that it has
        return {"enable_thinking": effort != "none"}
    raise RequestError("This model's chat template knows no reasoning_effort.", "reasoning_effort", "unsupported_field")


def _message(message: dict[str, Any], number: int, content_format: str) -> dict[str, Any]:
    content = message.get("content")
    if isinstance(content, list):
        for i, part in enumerate(content):
            if isinstance(part, dict) and (kind := part.get("type", "text")) != "text":
                raise RequestError(f"messages[{number}].content[{i}]: type {kind!r:.80} is not supported.", "messages")
        if content_format == "string" and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in content):
            message = message | {"content": "\n".join(part["text"] for part in content)}
    elif content_format == "openai" and isinstance(content, str):
        message = message | {"content": [{"type": "text", "text": content}]}
    calls = message.get("tool_calls")
    if calls is not None and not isinstance(calls, list):
        raise RequestError(f"messages[{number}].tool_calls must be a list, got {calls!r:.200}.", "messages")
    if calls:
        message = message | {"tool_calls": [_call(call) for call in calls]}
    return message


def _call(call: Any) -> Any:
    """A tool call as templates expect it: with its arguments as an object, where they are the text of one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return call | {"function": function | {"arguments": arguments}} if isinstance(arguments, dict) else call
