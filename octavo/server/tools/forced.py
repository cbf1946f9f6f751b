"""Grammars that make a model call tools, in the style that it was trained on.

Owns the text of these grammars (llguidance's Lark) and which parser reads what they let through; it does not know
requests or the engine. Invariant: what a grammar lets through, the parser of the same format reads as complete calls to
the given tools, with arguments that follow their schemas.

Each tool's schema stays a root of its own, so that its references hold. Strings in the Qwen XML style have no JSON to
carry pattern or format: these two are not forced there.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from octavo.server.tools.definitions import Tool, ToolChoice, guided
from octavo.server.tools.parser import JSON
from octavo.server.tools.reasoning import FORMATS, begins_inside
from octavo.server.tools.xml_calls import value_types

# Text of a parameter up to its end; the three strings are where the parser sees an end.
_NO_END = r"~/(?s:.*)(<\/parameter>|\n<parameter=|\n<\/function>)(?s:.*)/"
_VALUE_END = '"\\n</parameter>\\n"'
_LENGTH_LIMIT = 1000  # bounds of a string's length beyond it make an automaton that is too large to be worth it


@dataclass(frozen=True, slots=True)
class Forced:
    """What to ask of the engine, and the arguments for ``make_parser``.

    Attributes:
        grammar: Lark for llguidance.
        tool_format: of the output; None: it calls nothing.
        name: the tool whose bare arguments the output is, or None.
    """

    grammar: str
    tool_format: str | None
    name: str | None = None


def force_calls(choice: ToolChoice, tools: Sequence[Tool], tool_format: str | None, *, parallel: bool,
                special: Mapping[str, int], reasoning_format: str | None = None,
                thinking_open: bool | None = None, answer: str | None = None) -> Forced | None:
    """The grammar that a tool_choice needs, or an answer after reasoning or beside calls; None where the model is free, or
    where the answer's own grammar is all.

    Args:
        tool_format: the model's own, or None: a plain JSON form is forced (not under auto).
        parallel: more than one call is allowed.
        special: text -> id of the vocabulary's special tokens, which a grammar has to name by id.
        reasoning_format, thinking_open: as for ``make_parser``; the reasoning itself stays free.
        answer: what an output must be that calls nothing, as the right side of a rule.
    """
    free = choice.mode == "auto"
    calling = bool(tools) and choice.mode != "none" and not (free and tool_format is None)
    if answer is None and (not calling or (free and parallel and not any(tool.strict for tool in tools))):
        return None
    if not calling and reasoning_format is None:
        return None
    write = _Writer(special)
    bare = choice.name if calling and tool_format is None else None
    several = parallel and choice.mode != "named"
    chosen = [tool for tool in tools if choice.name in (None, tool.name)]
    if not calling:
        body = write.rule(answer or "")
    elif tool_format is None:
        body = write.arguments(chosen[0]) if bare else write.listed(chosen, "parameters", several)
    else:
        style = "llama" if tool_format.startswith("llama") else "xml" if tool_format.startswith("qwen") else tool_format
        body = getattr(write, style)(chosen, several, free and answer is None)
        if free and answer is not None:
            body = f"{body} | {write.rule(answer)}"
    if reasoning_format is not None:
        body = write.thinking(reasoning_format, thinking_open) + f" ({body})"
    return Forced(f"start: {body}\n" + "".join(write.rules), (tool_format or JSON) if calling else None, bare)


class _Writer:
    """Writes expressions; the rules that they refer to gather in ``rules``."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        self.rules: list[str] = []

    def hermes(self, tools: Sequence[Tool], several: bool, free: bool) -> str:
        rest = f'"\\n" ({self._calls(tools, "arguments")}) "\\n" {self._mark("</tool_call>")}'
        return self._marked("<tool_call>", rest, several, free)

    def xml(self, tools: Sequence[Tool], several: bool, free: bool) -> str:
        functions = self._any(self._xml_function(tool) for tool in tools)
        rest = f'"\\n" ({functions}) "\\n" {self._mark("</tool_call>")}'
        return self._marked("<tool_call>", rest, several, free)

    def mistral(self, tools: Sequence[Tool], several: bool, free: bool) -> str:
        if "[ARGS]" in self._special:  # vocabularies that have it use the newer style
            rest = self._any(f"{_literal(tool.name)} {self._mark('[ARGS]')} {self.arguments(tool)}" for tool in tools)
            return self._marked("[TOOL_CALLS]", f"({rest})", several, free, between="")
        return self._marked("[TOOL_CALLS]", f'" " {self.listed(tools, "arguments", several)}', False, free)

    def llama(self, tools: Sequence[Tool], several: bool, free: bool) -> str:
        calls = self._repeated(f"({self._calls(tools, 'parameters')})", '"; "', several)
        if not free:
            return calls
        tag = f"{self._mark('<|python_tag|>')}? " if "<|python_tag|>" in self._special else ""
        self.rules.append("LLAMA_TEXT: /[^{\\s](?s:.*)/\n")
        return f"{tag}{calls} | LLAMA_TEXT?"

    def listed(self, tools: Sequence[Tool], key: str, several: bool) -> str:
        return '"[" ' + self._repeated(f"({self._calls(tools, key)})", '", "', several) + ' "]"'

    def arguments(self, tool: Tool) -> str:
        return self._json(tool.schema, tool.strict)

    def thinking(self, reasoning_format: str, thinking_open: bool | None) -> str:
        start, end = FORMATS[reasoning_format]
        text = self._until(end)
        gap = "/\\n{0,2}/"
        if begins_inside(reasoning_format, thinking_open):
            return f"{text} {gap}"
        return f"({self._mark(start)} {text} {gap})?"

    def _marked(self, marker: str, rest: str, several: bool, free: bool, between: str = '"\\n"') -> str:
        """Calls that a marker begins; where the model is free, with any text around them."""
        if not free:
            return self._repeated(f"{self._mark(marker)} {rest}", between, several)
        text = self.rule("/(?s:.*)/")
        begun = self._until(marker)
        return f"({begun} {rest})* {text}" if several else f"{begun} {rest} | {text}"

    def _until(self, marker: str) -> str:
        """Any text, and the marker where it comes first."""
        if marker in self._special:
            return f"/(?s:.*)/ {self._mark(marker)}"
        return self.rule(f"/(?s:.*){_regex(marker)}/", "[lazy]")

    def _mark(self, marker: str) -> str:
        token = self._special.get(marker)
        return _literal(marker) if token is None else f"<[{token}]>"

    def _calls(self, tools: Sequence[Tool], key: str) -> str:
        choices = []
        for tool in tools:
            head = _literal(f'{{"name": "{tool.name}", "{key}": ')
            choices.append(f"{head} {self.arguments(tool)} " + _literal("}"))
        return self._any(choices)

    def _xml_function(self, tool: Tool) -> str:
        parts = [_literal(f"<function={tool.name}>\n")]
        properties = tool.schema.get("properties")
        required = tool.schema.get("required")
        needed = required if isinstance(required, list) else []
        if isinstance(properties, Mapping):
            for key, schema in properties.items():
                if re.search(r"[<>\n]", key) is None and key.strip() == key != "":
                    value = f"({_literal(f'<parameter={key}>' + chr(10))} {self._xml_value(tool, key, schema)})"
                    parts.append(value if key in needed else f"{value}?")
        elif tool.schema.get("additionalProperties") is not False:
            parts.append(f'("<parameter=" /[^<>\\s]{{1,64}}/ ">\\n" {self._text({})})*')
        return " ".join([*parts, _literal("</function>")])

    def _xml_value(self, tool: Tool, key: str, schema: Any) -> str:
        if "string" not in value_types(tool.schema, key):
            roots = {name: tool.schema[name] for name in ("$defs", "definitions") if name in tool.schema}
            return f"{self._json({**roots, **schema}, tool.strict)} {_VALUE_END}"
        values = schema.get("enum", [schema["const"]] if "const" in schema else None) if isinstance(schema, Mapping) else None
        if isinstance(values, list) and values and all(isinstance(value, str) and "<" not in value for value in values):
            return f"({self._any(map(_literal, values))}) {_VALUE_END}"
        return self._text(schema if isinstance(schema, Mapping) else {})

    def _text(self, schema: Mapping[str, Any]) -> str:
        """A string and the end of its parameter, in one terminal because the two could not be told apart otherwise."""
        low, high = schema.get("minLength"), schema.get("maxLength")
        low = low if isinstance(low, int) and low <= _LENGTH_LIMIT else 0
        span = f"{{{low},{high}}}" if isinstance(high, int) and high <= _LENGTH_LIMIT else f"{{{low},}}"
        name = f"VALUE_{len(self.rules)}"
        self.rules.append(f"{name}: (/(?s:.{span})/ & {_NO_END}) {_VALUE_END}\n")
        return name

    def _json(self, schema: Mapping[str, Any], strict: bool) -> str:
        return self.rule(f"%json {guided(schema, strict)}")

    def rule(self, body: str, options: str = "") -> str:
        name = f"rule_{len(self.rules)}"
        self.rules.append(f"{name}{options}: {body}\n")
        return name

    def _repeated(self, item: str, between: str, several: bool) -> str:
        return f"{item} ({between} {item})*" if several else item

    def _any(self, choices: Iterable[str]) -> str:
        return self.rule(" | ".join(choices))


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _regex(text: str) -> str:
    return re.sub(r"([][.^$*+?(){}|\\/])", r"\\\1", text)
