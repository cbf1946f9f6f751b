"""Taint: tells the control tokens that a chat template wrote from those that a message smuggles in.

Owns the marks around dangerous strings and the encoding of a text with untrusted parts; it does not know templates.
Invariant: a control token comes out only for a control string that lies wholly outside every mark.

How: everything in the input that is a control string, or could become one together with its neighbours, is put between
two marks that occur nowhere else. The template is rendered again with the marked input. If that text without the marks
is the text of the first rendering, the marks show to the character what is untrusted; the trusted control strings are
then replaced by aliases that only they can have, in a copy of the vocabulary that knows no control token by its name.
"""

import re
import secrets
from typing import Any

from octavo.errors import RequestError
from octavo.text.controls import Controls, Span, unite
from octavo.text.vocabulary import Tokenizer

# Keys whose values templates compare with words of their own: marked only where they hold a whole control string.
COMPARED = ("role", "type")


class Marker:
    """Puts marks around the dangerous parts of an input.

    Args:
        controls: what is dangerous. text: a text that the marks must not occur in. ascii: marks of letters and digits,
            for templates that escape everything else.

    Attributes:
        marked: whether anything was marked. whole: whether a whole control string was.
    """

    def __init__(self, controls: Controls, text: str, ascii: bool = False) -> None:
        self._controls = controls
        if ascii:
            nonce = secrets.token_hex(8)
            self._start, self._end = f"x{nonce}b", f"x{nonce}e"
        else:
            unused = (chr(code) for code in range(0xF0100, 0xFFFFD) if chr(code) not in text)
            self._start, self._end = next(unused), next(unused)
        self.marked = self.whole = False
        start, end = re.escape(self._start), re.escape(self._end)
        self._marks = re.compile(f"{start}|{end}")

    def mark(self, value: Any, key: str = "") -> Any:
        """A copy of plain JSON data with marks in its strings, and in keys that hold a whole control string."""
        if isinstance(value, str):
            return self._mark(value, key not in COMPARED)
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        if isinstance(value, dict):
            return {self._mark(name, False) if isinstance(name, str) else name: self.mark(item, str(name))
                    for name, item in value.items()}
        return value

    def _mark(self, text: str, parts: bool) -> str:
        whole = self._controls.whole(text)
        spans = unite(whole, self._controls.parts(text)) if parts else whole
        if not spans:
            return text
        self.marked = True
        self.whole = self.whole or bool(whole)
        pieces, at = [], 0
        for start, end in spans:
            pieces += [text[at:start], self._start, text[start:end], self._end]
            at = end
        return "".join([*pieces, text[at:]])

    def strip(self, text: str) -> tuple[str, list[Span]]:
        """The text without marks, and where in it the marked parts lie. A mark that lost its partner marks nothing."""
        pieces: list[str] = []
        spans: list[Span] = []
        size = at = 0
        opened = -1
        for match in self._marks.finditer(text):
            pieces.append(text[at : match.start()])
            size += match.start() - at
            at = match.end()
            if match.group() == self._start:
                opened = size
            else:
                if opened >= 0:
                    spans.append((opened, size))
                opened = -1
        return "".join([*pieces, text[at:]]), spans

    def trusted(self, text: str) -> list[str]:
        """The control strings of a text with marks; none is inside the marks unless ``whole``."""
        broken = self._marks.sub("\0", text)  # what the marks keep apart stays apart
        return [broken[start:end] for start, end in self._controls.find(broken)]


def encode_untrusted(tokenizer: Tokenizer, marker: Marker, text: str, marked: str) -> list[int] | None:
    """Ids of a rendered text in which only trusted control strings are control tokens.

    Args:
        text: rendered from the plain input. marked: from the marked one.

    Returns:
        None if the marks changed what the template wrote, so that nothing is known.
    """
    controls = tokenizer.controls
    bare, spans = marker.strip(marked)
    if bare != text:
        # Without a whole control string in the input, the same control strings in both mean that none was joined.
        seen = [text[start:end] for start, end in controls.find(text)]
        if marker.whole or seen != marker.trusted(marked):
            return None
        return tokenizer.encode(text, add_special_tokens=False)
    trusted: list[Span] = []
    at = 0
    for start, end in [*spans, (len(text), len(text))]:
        trusted += controls.find(text, at, start)
        at = end
    if trusted == controls.find(text):
        return tokenizer.encode(text, add_special_tokens=False)
    plain = tokenizer.plain
    if plain.holds_alias(text):
        raise RequestError("messages hold a string that is reserved.", "messages")
    pieces, at = [], 0
    for start, end in trusted:
        pieces += [text[at:start], plain.alias[text[start:end]]]
        at = end
    return plain.encode("".join([*pieces, text[at:]]))
