"""Token ids to text: the bytes of every piece, and a decoder that takes one token at a time.

Owns the meaning of a tokenizer's decoder (byte-level, SentencePiece with byte fallback, anything else); it does not
know stop strings or requests. Invariant: feeding ids one by one gives the same text as decoding them at once, and a
character is given out only when all of its bytes are there.

For the two common kinds of decoder a piece is a fixed string of bytes and a text is their concatenation, read as
UTF-8 with U+FFFD for what is broken. The tokenizers library replaces a whole run of fallback bytes when one of them
is broken; we replace the broken ones only, because the start of a run has been given out before its end is known.
"""

import codecs
import json
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol

Kind = Literal["bytes", "spaces", "other"]

# How many ids of the context decide about what follows: a UTF-8 character has at most 4 bytes, so at most 4 pieces.
CONTEXT_TOKENS = 4
# An "other" decoder may end in U+FFFD for good; after so many tokens it is believed.
PATIENCE = 8
# Normalizers that take no character away; normal forms may join some to one.
LENGTHENING = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "ByteLevel"})


class TextStream(Protocol):
    """Decodes one token after the other."""

    def push(self, token: int) -> str:
        """Text that is complete once this token is known."""

    def finish(self) -> str:
        """What is left, broken characters as U+FFFD."""


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-in of every byte in a byte-level vocabulary, and its inverse."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


BYTE_OF = _byte_alphabet()


class _Table(dict[int, bytes]):
    """id -> bytes, filled when first asked for; hidden ids give nothing."""

    def __init__(self, pieces: "Pieces", hidden: frozenset[int]) -> None:
        super().__init__()
        self._pieces, self._hidden = pieces, hidden

    def __missing__(self, token: int) -> bytes:
        data = self[token] = b"" if token in self._hidden else self._pieces.make(token)
        return data


class Pieces:
    """The pieces of one vocabulary.

    Args:
        backend: a ``tokenizers.Tokenizer``.
        added: id -> content of the added tokens. special: those that skip_special_tokens hides.
    """

    def __init__(self, backend: Any, added: dict[int, str], special: frozenset[int]) -> None:
        self.backend, self.added, self.special = backend, added, special
        self.kind: Kind = "other"
        self.space, self.fallback = "", False
        # What happens to the space that the encoder put before a text: "strip" one, or all of the "first" piece.
        self.lead: Literal["keep", "strip", "first"] = "keep"
        self._read_decoder()
        self.shown, self.all = _Table(self, special), _Table(self, frozenset())

    def _read_decoder(self) -> None:
        decoder = self.backend.decoder
        state: dict[str, Any] = {} if decoder is None else json.loads(decoder.__getstate__())
        parts = state.get("decoders", [state])
        names = [part.get("type") for part in parts]
        if names == ["ByteLevel"]:
            self.kind = "bytes"
        elif set(names) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"} and len(set(names)) == len(names):
            known = dict(zip(names, parts, strict=True))
            self.fallback = "ByteFallback" in known
            if "Metaspace" in known and not {"Replace", "Strip"} & set(names):
                self.space = known["Metaspace"]["replacement"]
                self.lead = "keep" if known["Metaspace"].get("prepend_scheme") == "never" else "first"
                self.kind = "spaces"
            elif "Replace" in known and "Metaspace" not in known:
                self._read_replace(known)

    def _read_replace(self, known: dict[str, Any]) -> None:
        replace, strip = known["Replace"], known.get("Strip")
        if replace.get("content") == " " and set(replace["pattern"]) == {"String"} and (
            strip is None or (strip["content"], strip["start"], strip["stop"]) == (" ", 1, 0)
        ):
            self.space, self.kind = replace["pattern"]["String"], "spaces"
            self.lead = "keep" if strip is None else "strip"

    def make(self, token: int) -> bytes:
        """Bytes of one piece; an id that the vocabulary lacks (padding of the model's embedding) has none."""
        if token in self.added:
            return self.added[token].encode()
        try:
            piece = self.backend.id_to_token(token)
        except OverflowError:
            piece = None
        if piece is None:
            return b""
        if self.kind == "bytes":
            try:
                return bytes([BYTE_OF[char] for char in piece])
            except KeyError:
                return str(piece).encode()
        if self.fallback and len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes.fromhex(piece[3:5])
        return str(piece).replace(self.space, " ").encode() if self.space else str(piece).encode()

    def longest(self, vocab_size: int) -> int | None:
        """The most characters that a token stands for; None where a run of characters of any length may become one token.

        Normal forms join characters to one, so a piece counts as what it may have been made of.
        """
        spelt = BYTE_OF if self.kind == "bytes" else [f"<0x{byte:02X}>" for byte in range(256)]
        every_byte = all(self.backend.token_to_id(piece) is not None for piece in spelt) and (
            self.kind == "bytes" or getattr(self.backend.model, "byte_fallback", False))
        if self.kind == "other" or not every_byte or not _keeps_length(self.backend.normalizer):
            return None
        texts = (self.make(token).decode("utf-8", "replace") for token in range(vocab_size))
        return max(len(unicodedata.normalize("NFKD", text)) for text in texts)

    def table(self, skip_special: bool) -> _Table:
        """id -> bytes with or without the special tokens."""
        return self.shown if skip_special else self.all

    def stream(self, skip_special: bool, spaces: bool, after: Sequence[int] = ()) -> TextStream:
        """A decoder of what follows ``after``. spaces: keep an "other" decoder's spaces between control tokens."""
        if self.kind == "other":
            return _WindowStream(self, skip_special, spaces, after)
        return _ByteStream(self, skip_special, after)

    def decode(self, ids: Sequence[int], skip_special: bool, spaces: bool, after: Sequence[int] = ()) -> str:
        """Text of ``ids`` where they follow ``after``."""
        if not ids:
            return ""  # even where the context ends within a character
        if self.kind == "other":
            return _decode_other(self, ids, skip_special, spaces, after)
        table = self.table(skip_special)
        pending, at_start = context(table, after)
        if at_start and self.lead == "first":
            stream = _ByteStream(self, skip_special, after)
            return "".join(map(stream.push, ids)) + stream.finish()
        text = (pending + b"".join(map(table.__getitem__, ids))).decode("utf-8", "replace")
        return text[1:] if at_start and self.lead == "strip" and text.startswith(" ") else text


def _keeps_length(normalizer: Any) -> bool:
    """Whether nothing that it does makes a text shorter but the joining of characters to one."""
    state: dict[str, Any] = {} if normalizer is None else json.loads(normalizer.__getstate__())
    for part in state.get("normalizers", [state] if state else []):
        old = part.get("pattern", {}).get("String", "") if part["type"] == "Replace" else None
        if part["type"] not in LENGTHENING and not (old and len(part["content"]) >= len(old)):
            return False
    return True


def context(table: _Table, after: Sequence[int]) -> tuple[bytes, bool]:
    """What the ids before a text mean for it: bytes of a character that they began, and whether they hold no text."""
    tail: list[bytes] = []
    for token in reversed(after):
        data = table[token]
        if data:
            tail.append(data)
            if len(tail) == CONTEXT_TOKENS:
                break
    data = b"".join(reversed(tail))
    cut = 0
    while cut < min(len(data), 3) and data[cut] & 0xC0 == 0x80:
        cut += 1  # the end of a character whose start lies further back
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data[cut:])
    return decoder.getstate()[0], not tail


class _ByteStream:
    def __init__(self, pieces: Pieces, skip_special: bool, after: Sequence[int]) -> None:
        self._table = pieces.table(skip_special)
        pending, at_start = context(self._table, after)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(pending)
        self._lead = pieces.lead if at_start else "keep"

    def push(self, token: int) -> str:
        data = self._table[token]
        if self._lead == "first" and data:
            data, self._lead = data.replace(b" ", b""), "keep"
        text = self._decoder.decode(data)
        if self._lead == "strip" and text:
            self._lead = "keep"
            return text.removeprefix(" ")
        return text

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def _decode_other(pieces: Pieces, ids: Sequence[int], skip: bool, spaces: bool, after: Sequence[int]) -> str:
    tail = list(after[-CONTEXT_TOKENS:])
    before = _join_other(pieces, tail, skip, spaces)
    return _join_other(pieces, [*tail, *ids], skip, spaces)[len(before) :]


def _join_other(pieces: Pieces, ids: Iterable[int], skip: bool, spaces: bool) -> str:
    ids = list(ids)
    if skip or spaces:
        return str(pieces.backend.decode(ids, skip_special_tokens=skip))
    runs: list[list[int]] = []
    for token in ids:  # a special token stands alone, and nothing is put between two of them
        if runs and token not in pieces.special and runs[-1][-1] not in pieces.special:
            runs[-1].append(token)
        else:
            runs.append([token])
    texts = [str(pieces.backend.decode(run, skip_special_tokens=False)) for run in runs]
    for i in range(1, len(runs)):
        if not (runs[i][0] in pieces.special and runs[i - 1][0] in pieces.special):
            texts[i] = " " + texts[i]
    return "".join(texts)


class _WindowStream:
    """For decoders that are no concatenation: decodes a short window again and gives out how it grew."""

    def __init__(self, pieces: Pieces, skip_special: bool, spaces: bool, after: Sequence[int]) -> None:
        self._pieces, self._skip, self._spaces = pieces, skip_special, spaces
        self._ids = list(after[-CONTEXT_TOKENS:])
        self._read = len(self._ids)  # ids whose text has been given out

    def _window(self, end: int | None = None) -> str:
        return _join_other(self._pieces, self._ids[:end], self._skip, self._spaces)

    def push(self, token: int) -> str:
        self._ids.append(token)
        before, now = self._window(self._read), self._window()
        if len(now) <= len(before) or (now.endswith("\ufffd") and len(self._ids) - self._read < PATIENCE):
            return ""
        return self._emit(before, now)

    def _emit(self, before: str, now: str) -> str:
        keep = max(0, self._read - CONTEXT_TOKENS)
        del self._ids[:keep]
        self._read = len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        before, now = self._window(self._read), self._window()
        return self._emit(before, now) if len(now) > len(before) else ""
