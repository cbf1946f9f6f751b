"""ChatTemplate: messages to the text that the model was trained on, and to ids with hostile content kept harmless.

Owns what goes into a template (roles, plain data, reasoning fields, a final message to be continued) and which part of
its output is trusted; it does not know HTTP. Invariants: the rendered text is byte for byte what transformers renders;
only the template makes control tokens, never a message; without control-token strings in the messages the ids are those
of the rendered text.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from octavo.config import EngineConfig
from octavo.errors import ConfigError, RequestError
from octavo.text.taint import Marker, encode_untrusted
from octavo.text.template import compile_template, run
from octavo.text.vocabulary import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
RESERVED = ("messages", "tools", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message")
# Names under which clients pass a message's reasoning; templates read the first, some the second.
REASONING = ("reasoning_content", "thinking", "reasoning")
CONTINUE_MARK = "CONTINUE_FINAL_MESSAGE_TAG "
MAX_DEPTH = 128
READS_TEXT = re.compile(r"""\.text\b|['"]text['"]""")

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]


class ChatTemplate:
    """A model's chat template, or its set of named ones.

    Args:
        templates: text, or name -> text; "tool_use" is taken when tools are given, else "default".
        special_tokens: variables such as ``bos_token`` and their text.
        origin: for messages.

    Raises:
        ModelError: a template is no valid Jinja. RequestError: it is no string.
    """

    def __init__(self, templates: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None,
                 origin: str = "chat template") -> None:
        listed = templates if isinstance(templates, Mapping) else {"default": templates}
        if not all(isinstance(text, str) for text in [*listed, *listed.values()]):
            raise RequestError(f"chat_template must be a string, got {templates!r:.200}.", "chat_template")
        self.templates = dict(listed)
        self.special_tokens, self.origin = dict(special_tokens or {}), origin
        for text in self.templates.values():
            compile_template(text, origin)

    def source(self, tools: Tools | None = None) -> str:
        """The text of the template that would be used."""
        name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        if name not in self.templates:
            listed = ", ".join(sorted(self.templates))
            raise RequestError(
                f"{self.origin} has no default among its templates ({listed}); name one.", "chat_template")
        return self.templates[name]

    def render(self, messages: Messages, tools: Tools | None = None, add_generation_prompt: bool = True,
               continue_final_message: bool | str = False, /, **kwargs: Any) -> str:
        """The prompt text. All but the template's variables go by position, so that these may have any name.

        Args:
            messages: dicts with role (system, developer, user, assistant, tool) and content (a string, or parts); other
                keys go to the template. developer becomes system where the template does not know it.
            tools: JSON schemas of functions.
            add_generation_prompt: end with the header of the model's answer.
            continue_final_message: leave the last message open for the model to go on; a string names its field.
            kwargs: more variables of the template.

        Raises:
            RequestError: messages have no form that is known, or the template refuses them (in its own words).
        """
        chat = self._inputs(messages, tools, add_generation_prompt, continue_final_message, kwargs)
        return self._render(chat)

    def _inputs(self, messages: Messages, tools: Tools | None, add_generation_prompt: bool,
                continue_final_message: bool | str, kwargs: Mapping[str, Any]) -> "_Chat":
        for name in kwargs:
            if name in RESERVED:
                raise RequestError(f"chat_template_kwargs may not name {name}.", "chat_template_kwargs")
        for field, given, kinds, known in (
                ("add_generation_prompt", add_generation_prompt, bool, "true or false"),
                ("continue_final_message", continue_final_message, (bool, str), "true, false or a field's name")):
            if not isinstance(given, kinds):
                raise RequestError(f"{field} must be {known}, got {given!r:.200}.", field)
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "continue_final_message cannot be combined with add_generation_prompt.", "continue_final_message")
        text = self.source(tools)
        plain_tools = None if tools is None else [_object(tool, "tools") for tool in _list(tools, "tools")]
        chat = [_message(message, text) for message in _list(messages, "messages")]
        if not chat:
            raise RequestError("messages must not be empty, got [].", "messages")
        variables = {"documents": None, **plain(kwargs, "chat_template_kwargs")}
        return _Chat(text, chat, plain_tools, variables, add_generation_prompt, continue_final_message)

    def _render(self, chat: "_Chat") -> str:
        messages = [_with_reasoning(message) for message in chat.messages]
        wanted = _leave_open(messages, chat.open_field, chat.text) if chat.open_field else ""
        variables = {
            **self.special_tokens, "messages": messages, "tools": chat.tools,
            "add_generation_prompt": chat.add_generation_prompt, **chat.variables}
        size = _size(messages) + _size(chat.tools) + _size(chat.variables)
        rendered = run(compile_template(chat.text, self.origin), variables, size)
        return _cut_open(rendered, wanted) if chat.open_field else rendered


def chat_prompt(template: ChatTemplate, tokenizer: Tokenizer, messages: Messages, tools: Tools | None = None,
                add_generation_prompt: bool = True, continue_final_message: bool | str = False,
                look: Callable[[str], None] | None = None, /, **kwargs: Any) -> tuple[str, list[int]]:
    """The prompt text and its ids; arguments and errors as ``ChatTemplate.render``, and ``look`` sees the text before it is
    tokenised and may refuse it.

    Strings such as ``<|im_end|>`` inside anything the client sent (contents, names, arguments, tool schemas, kwargs)
    are encoded as plain text. RequestError if a template treats them so that they cannot be told from its own.
    """
    chat = template._inputs(messages, tools, add_generation_prompt, continue_final_message, kwargs)
    text = template._render(chat)
    if look is not None:
        look(text)
    for ascii_marks in (False, True):
        marker = Marker(tokenizer.controls, text, ascii_marks)
        marked = _Chat(
            chat.text, marker.mark(chat.messages), marker.mark(chat.tools), marker.mark(chat.variables),
            chat.add_generation_prompt, chat.open_field)
        if not marker.marked:
            return text, tokenizer.encode(text, add_special_tokens=False)
        ids = encode_untrusted(tokenizer, marker, text, template._render(marked))
        if ids is not None:
            return text, ids
    raise RequestError(
        "messages hold control-token strings that the chat template does not leave as they are, so they cannot be kept "
        "apart from its own.", "messages")


def load_chat_template(tokenizer: Tokenizer, config: EngineConfig) -> ChatTemplate | None:
    """The template to use: ``config.chat_template`` (text, a file, or a name among the model's), else the model's.

    Returns None for a model without any. Raises ModelError for broken ones, ConfigError for a file that is not there.
    """
    given = config.chat_template
    if given is None:
        if not tokenizer.chat_templates:
            return None
        return ChatTemplate(tokenizer.chat_templates, tokenizer.special_tokens, f"{tokenizer.origin}: chat template")
    if given in tokenizer.chat_templates:
        return ChatTemplate(tokenizer.chat_templates[given], tokenizer.special_tokens, f"chat template {given!r:.80}")
    if "{" in given or "\n" in given:
        return ChatTemplate(given, tokenizer.special_tokens, "the given chat_template")
    path = Path(given).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"chat_template {given!r:.200} is no template text and no readable file.", "chat_template") from error
    return ChatTemplate(text, tokenizer.special_tokens, str(path))


class _Chat:
    """Checked input of one rendering."""

    __slots__ = ("add_generation_prompt", "messages", "open_field", "text", "tools", "variables")

    def __init__(self, text: str, messages: list[dict[str, Any]], tools: list[Any] | None,
                 variables: dict[str, Any], add_generation_prompt: bool, open_field: bool | str) -> None:
        self.text, self.messages, self.tools, self.variables = text, messages, tools, variables
        self.add_generation_prompt = add_generation_prompt
        self.open_field = "content" if open_field is True else open_field or ""


def plain(value: Any, field: str, depth: int = 0) -> Any:
    """A copy in plain JSON types, which is all that a template may see; RequestError for anything else."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > MAX_DEPTH:
        raise RequestError(f"{field} must not be nested deeper than {MAX_DEPTH}.", field)
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise RequestError(f"{field} must have strings for keys, got {key!r:.200}.", field)
        return {plain(key, field, depth + 1): plain(item, field, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, field, depth + 1) for item in value]
    for kind in (str, int, float):  # a subclass, such as an enum: its value without its methods
        if isinstance(value, kind):
            return kind(str.__str__(value) if kind is str else value)
    raise RequestError(f"{field} must hold plain JSON values, got {type(value).__name__}.", field)


def _list(value: Any, field: str) -> Sequence[Any]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise RequestError(f"{field} must be a list, got {value!r:.200}.", field)
    return value


def _object(value: Any, field: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise RequestError(f"{field} must hold objects, got {value!r:.200}.", field)
    found: dict[str, Any] = plain(value, field)
    return found


def _message(value: Any, template: str) -> dict[str, Any]:
    # None counts as absent: templates would write it out.
    message = {key: item for key, item in _object(value, "messages").items() if item is not None}
    role = message.get("role")
    if role not in ROLES:
        raise RequestError(f"messages: role must be one of {', '.join(ROLES)}, got {role!r:.200}.", "messages")
    if "content" not in message and not message.get("tool_calls"):
        raise RequestError(f"messages: content is missing in a message of role {role}.", "messages")
    # Beside tool calls there need not be any, and templates that know none would stumble over what is not there.
    content = message.setdefault("content", "")
    parts = content if isinstance(content, list) else []
    if not isinstance(content, (str, list)) or not all(isinstance(part, dict) for part in parts):
        raise RequestError(f"messages: content must be a string or a list of parts, got {content!r:.200}.", "messages")
    if isinstance(content, list):
        message["content"] = _parts(parts, template)
    if role == "developer" and "developer" not in template:
        message["role"] = "system"
    return message


def _parts(parts: list[dict[str, Any]], template: str) -> Any:
    """Content parts for a template: as they are if it reads their text, else as one string."""
    for part in parts:
        kind = part.get("type", "text")
        if kind == "text":
            if not isinstance(part.get("text"), str):
                raise RequestError(
                    f"messages: a content part of type 'text' must have a string as text, got {part!r:.200}.", "messages")
        elif f"'{kind}'" not in template and f'"{kind}"' not in template:
            raise RequestError(f"messages: content part of type {kind!r:.80} is not supported.", "messages")
    # A template that tells parts apart, but takes the text of none, would write them as Python does, or drop them.
    if READS_TEXT.search(template) or any(part.get("type", "text") != "text" for part in parts):
        return parts
    return "\n".join(part["text"] for part in parts)


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    given = next((message[name] for name in REASONING if message.get(name) is not None), None)
    return dict(message) if given is None else {"thinking": given, **message, "reasoning_content": given}


def _leave_open(messages: list[dict[str, Any]], field: str, template: str) -> str:
    """Put a mark behind the final message (in place); returns its text."""
    last = messages[-1] = dict(messages[-1])
    value = last.get(field)
    if value is None:
        raise RequestError(f"continue_final_message: the final message has no {field!r:.80}.", "continue_final_message")
    names = [name for name in REASONING if last.get(name) == value] if field in REASONING else [field]
    if not any(name in template for name in names):
        raise RequestError(
            f"continue_final_message: the chat template knows no field {field!r:.80}.", "continue_final_message")
    if isinstance(value, str):
        for name in names:
            last[name] = value + CONTINUE_MARK
        return value
    parts = [dict(part) for part in value] if isinstance(value, list) else []
    for part in reversed(parts):
        if isinstance(part.get("text"), str):
            text: str = part["text"]
            part["text"] = text + CONTINUE_MARK
            last[field] = parts
            return text
    raise RequestError("continue_final_message: the final message holds no text.", "continue_final_message")


def _cut_open(rendered: str, wanted: str) -> str:
    mark = CONTINUE_MARK.strip()
    if wanted.strip() not in rendered or mark not in rendered:
        raise RequestError(
            "continue_final_message: the chat template does not write the final message as it is.",
            "continue_final_message")
    at = rendered.rindex(mark)
    # A template that trims has taken the mark's space, and so any space at the end of the message.
    return rendered[:at] if rendered.startswith(CONTINUE_MARK, at) else rendered[:at].rstrip()


def _size(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(8 + _size(key) + _size(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(8 + _size(item) for item in value)
    return 8
