"""OutputParser: the text of one continuation becomes events: answer, reasoning, tool calls.

Owns the names of the formats, their choice from a chat template, and the order of the stages: closing control tokens,
reasoning, calls. The stages know the formats. Invariant: any way of cutting the text into pieces gives the same events
(joined, see events.join), in time linear in the text, and no text makes it raise.

A name that is not among the tools is a call like any other, as in vLLM: the client's code answers it best. Markers count
in the answer only, never inside JSON strings or reasoning.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

from octavo.errors import ConfigError
from octavo.server.tools.calls import ArgumentsParser, CallParser, HermesParser, ListParser, LlamaParser, MistralParser
from octavo.server.tools.events import Content, Event, join
from octavo.server.tools.markers import Ending
from octavo.server.tools.reasoning import FORMATS as REASONING_FORMATS
from octavo.server.tools.reasoning import ReasoningParser, detect_reasoning_format, thinking_open
from octavo.server.tools.xml_calls import QwenXmlParser

__all__ = [
    "REASONING_FORMATS", "TOOL_FORMATS", "OutputParser", "check_reasoning_format", "check_tool_format",
    "detect_reasoning_format", "detect_tool_format", "make_parser", "needs_special_tokens", "thinking_open",
]

# vLLM's names -> the marks without which a call is not seen.
TOOL_FORMATS: dict[str, tuple[str, ...]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3_json": (),
    "llama4_json": (),
    "mistral": ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"),
    "qwen3_coder": ("<tool_call>", "</tool_call>"),
    "qwen3_xml": ("<tool_call>", "</tool_call>"),
}
JSON = "json"  # what forced.py forces where the model has no style of its own; not for operators to choose


class OutputParser:
    """One continuation. Made by ``make_parser``."""

    def __init__(self, ending: Ending | None, reasoning: ReasoningParser | None, calls: CallParser | None) -> None:
        self._ending, self._reasoning, self._calls = ending, reasoning, calls

    def push(self, text: str) -> list[Event]:
        """Take more text; returns what it makes known, neighbours of a kind joined."""
        return join(self._push(text if self._ending is None else self._ending.push(text)))

    def finish(self) -> list[Event]:
        """What was held back: the text has ended.

        A call whose name is not known yet becomes content as it was written. One that was given out stays as it is and
        ends with ``complete=False`` if its arguments are cut off.
        """
        events = [] if self._ending is None else self._push(self._ending.finish())
        if self._reasoning is not None:
            events += self._answer(self._reasoning.finish())
        if self._calls is not None:
            events += self._calls.finish()
        return join(events)

    def _push(self, text: str) -> list[Event]:
        if not text:
            return []
        return self._answer([Content(text)] if self._reasoning is None else self._reasoning.push(text))

    def _answer(self, events: list[Event]) -> list[Event]:
        if self._calls is None:
            return events
        out: list[Event] = []
        for event in events:
            out += self._calls.push(event.text) if isinstance(event, Content) else [event]
        return out


def make_parser(tool_format: str | None, reasoning_format: str | None, tools: Iterable[Mapping[str, Any]] | None, *,
                thinking_open: bool | None, end_tokens: Sequence[str] = (), name: str | None = None) -> OutputParser:
    """A parser for one continuation.

    Args:
        tool_format: a name of TOOL_FORMATS, JSON, or None: calls are not looked for.
        reasoning_format: a name of REASONING_FORMATS, or None: everything is the answer.
        tools: the request's, as OpenAI writes them; None or empty (or tool_choice "none"): calls are not looked for.
        thinking_open: what the function of this name says about the prompt.
        end_tokens: texts of the model's end tokens, where ``needs_special_tokens`` has them decoded; they are dropped at
            the output's end.
        name: with JSON, the tool that the client named: the output is its arguments alone.

    Raises:
        ConfigError: an unknown format; the message lists those that exist.
    """
    calls = None
    if tool_format != JSON:
        check_tool_format(tool_format)
    check_reasoning_format(reasoning_format)
    if tool_format is not None and tools:
        calls = _call_parser(tool_format, tools, name)
    reasoning = None if reasoning_format is None else ReasoningParser(reasoning_format, thinking_open)
    return OutputParser(Ending(end_tokens) if end_tokens else None, reasoning, calls)


def _call_parser(tool_format: str, tools: Iterable[Mapping[str, Any]], name: str | None) -> CallParser:
    if tool_format == JSON:
        return ListParser() if name is None else ArgumentsParser(name)
    if tool_format == "hermes":
        return HermesParser()
    if tool_format == "mistral":
        return MistralParser()
    return LlamaParser() if tool_format.startswith("llama") else QwenXmlParser(tools)


def check_tool_format(name: str | None) -> None:
    """ConfigError unless the name is None or among TOOL_FORMATS."""
    _check("tool_call_parser", name, TOOL_FORMATS)


def check_reasoning_format(name: str | None) -> None:
    """ConfigError unless the name is None or among REASONING_FORMATS."""
    _check("reasoning_parser", name, REASONING_FORMATS)


def _check(option: str, name: str | None, known: Mapping[str, object]) -> None:
    if name is not None and name not in known:
        raise ConfigError(f"{option} must be one of {', '.join(sorted(known))}, got {name!r:.200}.", option)


def detect_tool_format(template_text: str) -> str | None:
    """The format in which a chat template has the model call tools; None if it knows none, or one that we do not."""
    if "tools" not in template_text or "<arg_key>" in template_text:
        return None
    if "<function=" in template_text and "<parameter=" in template_text:
        return "qwen3_coder"
    if "<tool_call>" in template_text:
        return "hermes"
    if "[TOOL_CALLS]" in template_text:
        return "mistral"
    if "<|python_tag|>" in template_text or ("<|start_header_id|>" in template_text and '"parameters"' in template_text):
        return "llama3_json"
    return None


def needs_special_tokens(tool_format: str | None, reasoning_format: str | None, special: Container[str]) -> bool:
    """Whether the text must be decoded with ``skip_special_tokens=False``, because a mark of the formats would be hidden.

    Args:
        special: texts of the vocabulary's special tokens.
    """
    marks = (*TOOL_FORMATS.get(tool_format or "", ()), *REASONING_FORMATS.get(reasoning_format or "", ()))
    return any(mark in special for mark in marks)
