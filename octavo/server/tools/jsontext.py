"""JSON that arrives in pieces: is it valid so far, and where does it end.

Owns a strict machine for one value and one for the object around a call (name and arguments); it does not know markers.
Invariant: every character is looked at once, and what was let through can be completed to a text that ``json.loads``
takes.
"""

import json
import re
from enum import Enum

WHITESPACE = " \t\r\n"
MAX_DEPTH = 128  # deeper than any schema, less than what readers of JSON refuse
MAX_NUMBER = 1000  # characters; some readers refuse longer ones
NAMES = ("name",)
ARGUMENTS = ("arguments", "parameters")

_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_DIGITS = re.compile(r"[0-9+\-.eE]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_SPACE = re.compile(r"[ \t\r\n]*")
_LITERALS = {"t": "true", "f": "false", "n": "null"}


class Status(Enum):
    MORE = "more"
    DONE = "done"
    BAD = "bad"


class _At(Enum):
    VALUE = "a value"
    ITEM = "a value or ]"
    FIELD = "a key or }"
    KEY = "a key"
    COLON = "a colon"
    NEXT = "a comma or the end"
    STRING = "inside a string"
    ESCAPE = "after a backslash"
    HEX = "inside \\u"
    NUMBER = "inside a number"
    LITERAL = "inside true, false or null"


class JsonValue:
    """One value. Whitespace before it is taken, what follows it is not.

    Attributes:
        status: MORE, DONE or BAD; ``feed`` may be called while it is MORE.
    """

    def __init__(self) -> None:
        self.status = Status.MORE
        self._at = _At.VALUE
        self._stack: list[str] = []  # the brackets that will close what is open
        self._key = False  # the string is a key
        self._token = ""  # of a number or literal, what came before this piece
        self._hex = 0

    def feed(self, text: str, pos: int) -> int:
        """Take text[pos:]; returns where it stopped: its end, the end of the value, or the first wrong character."""
        size = len(text)
        while pos < size and self.status is Status.MORE:
            at = self._at
            if at is _At.STRING:
                pos = _match(_PLAIN, text, pos)
                if pos < size:
                    pos = self._in_string(text[pos], pos)
            elif at is _At.NUMBER:
                pos = self._number(text, pos)
            elif at is _At.ESCAPE or at is _At.HEX or at is _At.LITERAL:
                pos = self._inside(text[pos], pos)
            else:
                pos = _match(_SPACE, text, pos)
                if pos < size:
                    pos = self._structure(text[pos], pos)
        return pos

    def _in_string(self, char: str, pos: int) -> int:
        if char == "\\":
            self._at = _At.ESCAPE
        elif char != '"':
            return self._bad(pos)
        elif self._key:
            self._at = _At.COLON
        else:
            self._closed()
        return pos + 1

    def _inside(self, char: str, pos: int) -> int:
        if self._at is _At.ESCAPE:
            if char not in '"\\/bfnrtu':
                return self._bad(pos)
            self._at, self._hex = (_At.HEX, 4) if char == "u" else (_At.STRING, 0)
        elif self._at is _At.HEX:
            if char not in "0123456789abcdefABCDEF":
                return self._bad(pos)
            self._hex -= 1
            if not self._hex:
                self._at = _At.STRING
        else:
            literal = _LITERALS[self._token[0]]
            if literal[len(self._token)] != char:
                return self._bad(pos)
            self._token += char
            if self._token == literal:
                self._closed()
        return pos + 1

    def _number(self, text: str, pos: int) -> int:
        end = min(_match(_DIGITS, text, pos), pos + MAX_NUMBER - len(self._token))
        self._token += text[pos:end]
        if end == len(text):
            return end
        if _NUMBER.fullmatch(self._token) is None or len(self._token) == MAX_NUMBER:
            return self._bad(end)
        self._closed()
        return end

    def _structure(self, char: str, pos: int) -> int:
        at = self._at
        if at is _At.NEXT:
            if char == ",":
                self._at = _At.KEY if self._stack[-1] == "}" else _At.VALUE
            elif char == self._stack[-1]:
                self._stack.pop()
                self._closed()
            else:
                return self._bad(pos)
        elif at is _At.COLON:
            if char != ":":
                return self._bad(pos)
            self._at = _At.VALUE
        elif at is _At.KEY or at is _At.FIELD:
            if char == '"':
                self._at, self._key = _At.STRING, True
            elif char == "}" and at is _At.FIELD:
                self._stack.pop()
                self._closed()
            else:
                return self._bad(pos)
        elif char == "]" and at is _At.ITEM:
            self._stack.pop()
            self._closed()
        else:
            return self._begin(char, pos)
        return pos + 1

    def _begin(self, char: str, pos: int) -> int:
        if char in "{[":
            if len(self._stack) == MAX_DEPTH:
                return self._bad(pos)
            self._stack.append("}" if char == "{" else "]")
            self._at = _At.FIELD if char == "{" else _At.ITEM
        elif char == '"':
            self._at, self._key = _At.STRING, False
        elif char in "-0123456789":
            self._at, self._token = _At.NUMBER, char
        elif char in _LITERALS:
            self._at, self._token = _At.LITERAL, char
        else:
            return self._bad(pos)
        return pos + 1

    def _closed(self) -> None:
        if self._stack:
            self._at = _At.NEXT
        else:
            self.status = Status.DONE

    def _bad(self, pos: int) -> int:
        self.status = Status.BAD
        return pos


class CallObject:
    """The object ``{"name": ..., "arguments": {...}}`` of one call; "parameters" means the same, other keys are passed over.

    Of a key that comes twice the first counts. Arguments may also be null or, where ``implied``, missing (then they are
    ``{}``), or a string that holds the text of an object.

    Args:
        implied: a marker says that this is a call. Without one, other keys than those of a call make it BAD at once.

    Attributes:
        status: as JsonValue's. DONE and BAD may come after the call is complete; what follows it decides that only.
        name: once it is known that this is a call to it.
        fragments: argument text that is ready; the reader takes it away.
        complete: name and arguments are all there.
    """

    def __init__(self, implied: bool) -> None:
        self.status = Status.MORE
        self.name: str | None = None
        self.fragments: list[str] = []
        self.complete = False
        self._implied = implied
        self._expects = "{"
        self._role = ""  # of the value that is being read: "key", "name", "arguments", "other"
        self._value: JsonValue | None = None
        self._kept: list[str] = []  # of a key or a name, its text so far
        self._key = ""
        self._name: str | None = None
        self._arguments: list[str] | None = None  # text that waits for the name, or for its own end
        self._streams = False  # the arguments are an object
        self._ended = False  # the arguments are all there

    def feed(self, text: str, pos: int) -> int:
        """As JsonValue.feed."""
        while pos < len(text) and self.status is Status.MORE:
            if self._value is not None:
                pos = self._read(self._value, text, pos)
            elif text[pos] in WHITESPACE:
                pos = _match(_SPACE, text, pos)
            else:
                pos = self._between(text[pos], pos)
        return pos

    def _between(self, char: str, pos: int) -> int:
        expects = self._expects
        if expects == ":":
            if char != ":":
                return self._bad(pos)
            return self._values(pos + 1)
        if expects == "value":
            return self._first(char, pos)
        if char == "}" and expects in ('"}', ",}"):
            self._close()
        elif char == '"' and expects in ('"', '"}'):
            self._role, self._value, self._kept = "key", JsonValue(), []
            return pos
        elif char == expects[0] and char in "{,":
            self._expects = '"}' if char == "{" else '"'
        else:
            return self._bad(pos)
        return pos + 1

    def _values(self, pos: int) -> int:
        self._expects = "value"
        if self._key in NAMES and self._name is None:
            self._role = "name"
        elif self._key in ARGUMENTS and self._arguments is None:
            self._role = "arguments"
        else:
            self._role = "other"
        return pos

    def _first(self, char: str, pos: int) -> int:
        """The first character of a value says whether it can be what it should."""
        if (self._role == "name" and char != '"') or (self._role == "arguments" and char not in '{"n'):
            return self._bad(pos)
        self._value, self._kept = JsonValue(), []
        if self._role == "arguments":
            self._arguments, self._streams = [], char == "{"
            if self._streams:
                self.name = self._name
        return pos

    def _read(self, value: JsonValue, text: str, pos: int) -> int:
        end = value.feed(text, pos)
        if self._role == "arguments" and self._arguments is not None:
            self._arguments.append(text[pos:end])
        elif self._role != "other":
            self._kept.append(text[pos:end])
        if value.status is Status.BAD:
            self.status = Status.BAD
        elif value.status is Status.DONE:
            self._value = None
            if not self._take():
                self.status = Status.BAD
        self._release()
        return end

    def _take(self) -> bool:
        """A key or value is complete; False if it cannot be part of a call."""
        if self._role == "key":
            self._key, self._expects = json.loads("".join(self._kept)), ":"
            return self._implied or self._key in (*NAMES, *ARGUMENTS, "type", "id")
        self._expects = ",}"
        if self._role == "name":
            self._name = json.loads("".join(self._kept))
            if not self._name or not _is_unicode(self._name):
                return False
        elif self._role == "arguments":
            self._ended = True
            if not self._streams:
                text = object_text(json.loads("".join(self._arguments or ())))
                if text is None:
                    return False
                self._arguments = [text]
        if self._ended:
            self.name = self._name
        return True

    def _release(self) -> None:
        """Once the name is given out, arguments are as they come."""
        if self.name is not None and self._arguments is not None:
            self.fragments += self._arguments
            self._arguments = []
            self.complete = self._ended

    def _close(self) -> None:
        if self._arguments is None and self._implied:
            self._arguments, self._ended, self.name = ["{}"], True, self._name
            self._release()
        self.status = Status.DONE if self.complete else Status.BAD

    def _bad(self, pos: int) -> int:
        self.status = Status.BAD
        return pos


def object_text(value: object) -> str | None:
    """Arguments that are no object: null means none, a string may hold the text of an object; None for anything else."""
    if value is None:
        return "{}"
    if not isinstance(value, str):
        return None
    text = value.strip(WHITESPACE)
    return text if is_json(text, "{") and _is_unicode(text) else None


def is_json(text: str, brackets: str) -> bool:
    """Whether a whole text is one valid JSON value that begins with one of the brackets."""
    if not text or text[0] not in brackets:
        return False
    value = JsonValue()
    return value.feed(text, 0) == len(text) and value.status is Status.DONE


def is_number(text: str) -> bool:
    """Whether a text is a JSON number."""
    return len(text) < MAX_NUMBER and _NUMBER.fullmatch(text) is not None


def _is_unicode(text: str) -> bool:
    """Escapes can name half a character, which no answer could be written with."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _match(regex: re.Pattern[str], text: str, pos: int) -> int:
    found = regex.match(text, pos)
    return pos if found is None else found.end()
