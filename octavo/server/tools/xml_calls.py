"""Tool calls of the Qwen3-Coder style: parameters as tagged text, which becomes JSON here.

Owns the tags and how a parameter's text becomes a JSON value by its schema; what all styles share is calls'. Invariant:
the arguments are JSON whatever the text holds; a text that does not fit its type is passed on as a string.

    <tool_call>
    <function=name>
    <parameter=key>
    value
    </parameter>
    </function>
    </tool_call>

``<tool_call>`` may be missing, as the models sometimes forget it. A value loses one newline at each end, and ends also
where a line begins with the next tag. One that can only be a string is given out as it comes.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from octavo.server.tools.calls import MAX_NAME, CallParser, State
from octavo.server.tools.events import Event
from octavo.server.tools.jsontext import WHITESPACE, is_json, is_number
from octavo.server.tools.markers import Markers, expect

FUNCTION, PARAMETER = "<function=", "<parameter="
_VALUE_ENDS = Markers("</parameter>", "\n</parameter>", "\n<parameter=", "\n</function>")
_STRING = frozenset(("string",))
MAX_REFERENCES = 8


class QwenXmlParser(CallParser):
    """The style above.

    Args:
        tools: as the client gave them; a function that is not among them gets strings.
    """

    def __init__(self, tools: Iterable[Mapping[str, Any]] = ()) -> None:
        super().__init__("<tool_call>", FUNCTION)
        self._schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        self._tag = ""  # a function's name or a parameter's key so far
        self._schema: Mapping[str, Any] = {}
        self._types = _STRING
        self._first = False  # the value's first character comes
        self._first_parameter = False
        self._value: list[str] = []

    def finish(self) -> list[Event]:
        """As CallParser's. The text of a value that was cut off is given out."""
        if self._open and self._state == self._in_value:
            self._value_text(self._held)
            self._held = ""
            self._argue("" if self._types == _STRING else json.dumps("".join(self._value), ensure_ascii=False)[:-1])
        return super().finish()

    def _marked(self, marker: str) -> State:
        self._tag = ""
        return self._in_function if marker == FUNCTION else self._function

    def _function(self, text: str, pos: int) -> int:
        """After ``<tool_call>``."""
        if text[pos] in WHITESPACE:
            return self._skip(text, pos)
        found = expect(text, pos, (FUNCTION,))
        if found is None:
            self._broken()
            return pos
        if found == "":
            return self._wait(text, pos)
        self._source.append(found)
        self._state = self._marked(FUNCTION)
        return pos + len(found)

    def _in_function(self, text: str, pos: int) -> int:
        char = text[pos]
        if char != ">":
            if char in "<\n" or len(self._tag) == MAX_NAME:
                self._broken()
                return pos
            self._tag += char
            return self._skip(text, pos)
        name = self._tag.strip()
        if not name:
            self._broken()
            return pos
        self._give(name)
        self._argue("{")
        self._schema, self._first_parameter = self._schemas.get(name, {}), True
        self._state = self._parameters
        return pos + 1

    def _parameters(self, text: str, pos: int) -> int:
        """Between parameters."""
        if text[pos] in WHITESPACE:
            return pos + 1
        found = expect(text, pos, (PARAMETER, "</function>", "</tool_call>"))
        if found == "":
            return self._wait(text, pos)
        if found is None:
            self._broken()
            return pos
        if found == PARAMETER:
            self._tag, self._state = "", self._in_key
            return pos + len(found)
        self._argue("}")
        self._end(complete=True)
        self._state = self._closing
        return pos + (len(found) if found == "</function>" else 0)

    def _in_key(self, text: str, pos: int) -> int:
        char = text[pos]
        if char != ">":
            if char in "<\n" or len(self._tag) == MAX_NAME:
                self._broken()
                return pos
            self._tag += char
            return pos + 1
        key = self._tag.strip()
        self._argue(("" if self._first_parameter else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
        self._first_parameter, self._first, self._value = False, True, []
        self._types = value_types(self._schema, key)
        if self._types == _STRING:
            self._argue('"')
        self._state = self._in_value
        return pos + 1

    def _in_value(self, text: str, pos: int) -> int:
        if self._first and text[pos] == "\n":
            self._first = False
            return pos + 1
        self._first = False
        start, end = _VALUE_ENDS.find(text, pos)
        self._value_text(text[pos:start])
        if start == end:
            return self._wait(text, start)
        self._argue('"' if self._types == _STRING else json_value("".join(self._value), self._types))
        self._value = []
        self._state = self._parameters
        return end if text[start:end].endswith("</parameter>") else start

    def _value_text(self, text: str) -> None:
        if self._types == _STRING:
            self._argue(json.dumps(text, ensure_ascii=False)[1:-1])
        else:
            self._value.append(text)

    def _closing(self, text: str, pos: int) -> int:
        """After a call: another one without a new mark, or the end of the mark."""
        if text[pos] in WHITESPACE:
            return pos + 1
        found = expect(text, pos, ("</tool_call>", FUNCTION))
        if found == "":
            return self._wait(text, pos)
        if found == FUNCTION:
            self._source = [found]
            self._state = self._marked(FUNCTION)
        else:
            self._state = self._content
        return pos + len(found or "")


def value_types(schema: Mapping[str, Any], key: str) -> frozenset[str]:
    """JSON types that a parameter may have; {"string"} where the schema does not say."""
    properties = schema.get("properties")
    found: set[str] = set()
    if isinstance(properties, Mapping) and key in properties:
        _collect(schema, properties[key], found, MAX_REFERENCES)
    return frozenset(found) or _STRING


def _collect(root: Mapping[str, Any], schema: Any, found: set[str], depth: int) -> None:
    if not isinstance(schema, Mapping) or depth == 0:
        return
    kind = schema.get("type")
    listed = [kind] if isinstance(kind, str) else kind if isinstance(kind, list) else []
    found.update(item for item in listed if isinstance(item, str))
    if not listed:
        values = schema["enum"] if isinstance(schema.get("enum"), list) else [schema["const"]] if "const" in schema else []
        found.update(_type_of(value) for value in values)
    for name in ("anyOf", "oneOf", "allOf"):
        for choice in schema[name] if isinstance(schema.get(name), list) else []:
            _collect(root, choice, found, depth - 1)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/"):
        target: Any = root
        for part in reference[2:].split("/"):
            target = target.get(part) if isinstance(target, Mapping) else None
        _collect(root, target, found, depth - 1)


def _type_of(value: Any) -> str:
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (dict, "object"),
                       (list, "array")):
        if isinstance(value, kind):
            return name
    return "null"


def json_value(text: str, types: frozenset[str]) -> str:
    """The JSON text of a parameter: its own where it is of one of the types, else a string of it."""
    word = text.strip(WHITESPACE)
    lowered = word.lower()
    if "null" in types and lowered in ("null", "none"):
        return "null"
    if "boolean" in types and lowered in ("true", "false"):
        return lowered
    if types & {"integer", "number"} and is_number(word):
        return word
    brackets = ("{" if "object" in types else "") + ("[" if "array" in types else "")
    return word if is_json(word, brackets) else json.dumps(text, ensure_ascii=False)
