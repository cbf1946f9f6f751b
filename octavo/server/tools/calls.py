"""Tool calls that are JSON: the styles of Hermes, Mistral and Llama 3, and the plain forms that a grammar can force.

Owns what stands around the JSON of a call; the JSON itself is jsontext's. Invariant: every character of an output is
content or belongs to a call (its marks, the newlines beside them and separators included), and nothing that was given
out is taken back: a call whose text turns out wrong before its name is known becomes content as it was written, one that
does so later ends incomplete and the rest is content.
"""

import re
from collections.abc import Callable

from octavo.server.tools.events import CallArguments, CallEnd, CallStart, Content, Event
from octavo.server.tools.jsontext import WHITESPACE, CallObject, JsonValue, Status
from octavo.server.tools.markers import Frame, Markers, expect

_NAME = re.compile(r"[A-Za-z0-9_.\-]*")
MAX_NAME = 256

State = Callable[[str, int], int]


class CallParser:
    """What all styles share. A state takes text[pos:] and returns how far it came; what it cannot decide yet it holds.

    Args:
        markers: strings that begin a call inside content.
    """

    def __init__(self, *markers: str) -> None:
        self._markers = Markers(*markers)
        self._events: list[Event] = []
        self._frame = Frame()
        self._held = ""
        self._source: list[str] = []  # of a call that is not given out yet
        self._index = -1
        self._open = False  # a call is given out and has not ended
        self._call = CallObject(implied=True)
        self._arguments = JsonValue()
        self._then: State = self._content  # after the object of a call
        self._state: State = self._content

    def push(self, text: str) -> list[Event]:
        """Events of one more piece of the output."""
        text, self._held, pos = self._held + text, "", 0
        while pos < len(text):
            pos = self._state(text, pos)
        return self._taken()

    def finish(self) -> list[Event]:
        """Events of what waited: the output has ended."""
        if not self._open and self._state != self._closing:
            self._source.append(self._held)
        self._held = ""
        self._broken()
        if newlines := self._frame.finish():
            self._events.append(Content(newlines))
        return self._taken()

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events

    def _content(self, text: str, pos: int) -> int:
        start, end = self._markers.find(text, pos)
        self._say(text[pos:start])
        if start == end:
            return self._wait(text, start)
        self._source = [text[start:end]]
        self._state = self._marked(text[start:end])
        return end

    def _marked(self, marker: str) -> State:
        """The state after a marker."""
        raise NotImplementedError

    def _say(self, text: str) -> None:
        if shown := self._frame.push(text):
            self._events.append(Content(shown))

    def _wait(self, text: str, pos: int) -> int:
        self._held = text[pos:]
        return len(text)

    def _skip(self, text: str, pos: int) -> int:
        """Past one character of a call."""
        self._source.append(text[pos])
        return pos + 1

    def _give(self, name: str) -> None:
        self._frame.mark()
        self._source = []
        self._index += 1
        self._open = True
        self._events.append(CallStart(self._index, name))

    def _argue(self, fragment: str) -> None:
        if fragment:
            self._events.append(CallArguments(self._index, fragment))

    def _end(self, complete: bool) -> None:
        self._open = False
        self._events.append(CallEnd(self._index, complete))

    def _broken(self) -> None:
        """The text is no call, or no longer: go on as content."""
        if self._open:
            self._end(complete=False)
        source, self._source = "".join(self._source), []
        self._state = self._content
        self._say(source)

    def _object(self, implied: bool, then: State, text: str, pos: int) -> int:
        """A call's object begins at pos."""
        self._call, self._then, self._state = CallObject(implied), then, self._in_object
        return self._in_object(text, pos)

    def _in_object(self, text: str, pos: int) -> int:
        call, given = self._call, self._call.name is not None
        end = call.feed(text, pos)
        if not given:
            self._source.append(text[pos:end])
            if call.name is not None:
                self._give(call.name)
        if self._open:
            self._argue("".join(call.fragments))
            call.fragments.clear()
            if call.complete:
                self._end(complete=True)
        if call.status is Status.DONE:
            self._state = self._then
        elif call.status is Status.BAD:
            self._broken()
        return end

    def _bare(self, name: str) -> None:
        """A call's name is known, and its arguments alone follow."""
        self._give(name)
        self._arguments, self._state = JsonValue(), self._in_arguments

    def _in_arguments(self, text: str, pos: int) -> int:
        end = self._arguments.feed(text, pos)
        self._argue(text[pos:end])
        if self._arguments.status is Status.DONE:
            self._end(complete=True)
            self._state = self._content
        elif self._arguments.status is Status.BAD:
            self._broken()
        return end

    def _enter(self, text: str, pos: int) -> int:
        """After a marker: an object, or a list of them."""
        char = text[pos]
        if char == "{":
            return self._object(True, self._closing, text, pos)
        if char == "[":
            self._state = self._item
        elif char not in WHITESPACE:
            return self._other(text, pos)
        return self._skip(text, pos)

    def _other(self, text: str, pos: int) -> int:
        """After a marker: neither an object nor a list."""
        self._broken()
        return pos

    def _item(self, text: str, pos: int) -> int:
        if text[pos] == "{":
            return self._object(True, self._separator, text, pos)
        if text[pos] in WHITESPACE:
            return self._skip(text, pos)
        self._broken()
        return pos

    def _next(self, text: str, pos: int) -> int:
        """After a comma."""
        if text[pos] == "{":
            return self._object(True, self._separator, text, pos)
        if text[pos] in WHITESPACE:
            return pos + 1
        self._state = self._separator if text[pos] == "]" else self._content
        return pos

    def _separator(self, text: str, pos: int) -> int:
        char = text[pos]
        if char == ",":
            self._state = self._next
        elif char == "]":
            self._state = self._closing
        elif char not in WHITESPACE:
            self._state = self._content
            return pos
        return pos + 1

    def _closing(self, text: str, pos: int) -> int:
        """After the last call of a marker."""
        self._state = self._content
        return pos


class HermesParser(CallParser):
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number of them, with a list as an extra."""

    def __init__(self) -> None:
        super().__init__("<tool_call>")

    def _marked(self, marker: str) -> State:
        return self._enter

    def _closing(self, text: str, pos: int) -> int:
        if text[pos] in WHITESPACE:
            return pos + 1
        found = expect(text, pos, ("</tool_call>",))
        if found == "":
            return self._wait(text, pos)
        self._state = self._content
        return pos + len(found or "")


class MistralParser(CallParser):
    """``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`` and the newer ``[TOOL_CALLS]name[ARGS]{...}``."""

    def __init__(self) -> None:
        super().__init__("[TOOL_CALLS]")
        self._name = ""

    def _marked(self, marker: str) -> State:
        self._name = ""
        return self._enter

    def _other(self, text: str, pos: int) -> int:
        self._state = self._in_name
        return pos

    def _in_name(self, text: str, pos: int) -> int:
        found = _NAME.match(text, pos)
        end = min(pos if found is None else found.end(), pos + MAX_NAME - len(self._name))
        self._name += text[pos:end]
        self._source.append(text[pos:end])
        if end < len(text):
            if self._name and len(self._name) < MAX_NAME:
                self._state = self._named
            else:
                self._broken()
        return end

    def _named(self, text: str, pos: int) -> int:
        if text[pos] in WHITESPACE:
            return self._skip(text, pos)
        found = expect(text, pos, ("[ARGS]", "[CALL_ID]", "{"))
        if found is None:
            self._broken()
            return pos
        if found == "":
            return self._wait(text, pos)
        if found == "{":
            self._bare(self._name)
            return pos
        if found == "[CALL_ID]":  # the model's own id of the call; clients get ours
            self._state = self._in_id
        self._source.append(found)
        return pos + len(found)

    def _in_id(self, text: str, pos: int) -> int:
        if text[pos].isalnum():
            return self._skip(text, pos)
        self._state = self._named
        return pos


class LlamaParser(CallParser):
    """``{"name": ..., "parameters": {...}}``, several separated by ``;``, at the very beginning of the output only.

    ``<|python_tag|>`` may come first. An object without it is a call only if it has the keys of one.
    """

    def __init__(self) -> None:
        super().__init__()
        self._implied = False
        self._state = self._before

    def _before(self, text: str, pos: int) -> int:
        if text[pos] == "{":
            return self._object(self._implied, self._between, text, pos)
        if text[pos] in WHITESPACE:
            return self._skip(text, pos)
        found = None if self._implied else expect(text, pos, ("<|python_tag|>",))
        if found is None:
            self._broken()
            return pos
        if found == "":
            return self._wait(text, pos)
        self._implied = True
        self._source.append(found)
        return pos + len(found)

    def _between(self, text: str, pos: int) -> int:
        if text[pos] == "{":
            return self._object(self._implied, self._between, text, pos)
        if text[pos] not in WHITESPACE + ";":
            self._state = self._content
            return pos
        return pos + 1


class ListParser(CallParser):
    """``[{"name": ..., "parameters": {...}}, ...]`` and nothing else: what a grammar forces where no style is known."""

    def __init__(self) -> None:
        super().__init__()
        self._state = self._enter


class ArgumentsParser(CallParser):
    """One object, the arguments of the tool that the client named.

    Args:
        name: of the tool.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._state = self._begin

    def _begin(self, text: str, pos: int) -> int:
        if text[pos] in WHITESPACE:
            return self._skip(text, pos)
        if text[pos] != "{":
            self._broken()
            return pos
        self._bare(self._name)
        return pos
