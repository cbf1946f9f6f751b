"""Grammars: from what a caller asks of an output to a text that every engine compiles, or a sentence that says why not.

Owns the five kinds of constraint and their bounds; it does not know requests, engines or tokens (matcher.py does the
matching). Every kind becomes a grammar in Lark's notation and is compiled once, here, within the bounds, before it may go to
an engine. Tokens are not forced into a tokenizer's own spelling: any pieces that make the text may make it.

Invariant: what ``check`` returns compiles, within milliseconds to a second, and allows at least one output.
"""

import json
import re
import sys
import threading
from collections import OrderedDict
from typing import Any

import numpy as np

from octavo.errors import RequestError
from octavo.messages import Grammar
from octavo.params import StructuredOutputsParams
from octavo.text.matcher import compile_grammar
from octavo.text.schema import DEFAULT, Limits, SchemaError, check_bounds, read_schema, relax
from octavo.text.vocabulary import Tokenizer

MAX_GRAMMAR_BYTES = 64 * 1024
MAX_ECHO = 200
"""Characters of a message of the library, which repeats what it was given."""
ENTRY_BYTES = 1024
"""What is remembered of a constraint beside its text, about."""

HEADER = '%llguidance {"no_forcing": true}\n'
# A model that has lost its way can put out white space for ever; this much is more than any indentation needs.
WHITESPACE = r"[\x20\x0A\x0D\x09]{1,128}"
_OPTIONS = re.compile(r"^[ \t]*%llguidance\s*(?=\{)", re.MULTILINE)
_LARK = re.compile(r"^\s*(%llguidance\b|%import\b|[?!]*start\s*(\[[^\]\n]*\]|\.\d+)?\s*:)", re.MULTILINE)


class GrammarError(ValueError):
    """A constraint that cannot be used; the message says why."""


def check(params: StructuredOutputsParams, tokenizer: Tokenizer, param: str, end_ids: tuple[int, ...] | None = None,
          limits: Limits = DEFAULT) -> Grammar:
    """Compile a constraint once and return its grammar.

    The first call for a tokenizer takes up to a second more; calls from several threads are fine.

    Args:
        param: what the caller called it, for the error. end_ids: the model's end tokens, default the tokenizer's.

    Raises:
        RequestError: it is malformed, too large, too complex, or asks for something that cannot be enforced.
    """
    end_ids = tokenizer.eos_token_ids if end_ids is None else end_ids
    try:
        if tokenizer.kind == "other" or not any(token < tokenizer.vocab_size for token in end_ids):
            raise GrammarError("this model's tokenizer does not support it: it has no end token, or an unknown decoder")
        grammar = _normalise(params, limits)
        if not _checked.seen((grammar, tokenizer, end_ids)):
            _try(grammar, tokenizer, end_ids)
            _checked.add((grammar, tokenizer, end_ids), ENTRY_BYTES + sys.getsizeof(grammar.text), limits.cache_bytes)
    except (GrammarError, SchemaError) as error:
        raise RequestError(f"{param} cannot be used: {error}", param) from error
    return grammar


def _normalise(params: StructuredOutputsParams, limits: Limits) -> Grammar:
    if params.json is not None:
        schema = relax(read_schema(params.json, limits), closed=params.disable_additional_properties)
        return Grammar("json", _json(schema, params, limits))
    if params.json_object is not None:
        return Grammar("json_object", _json({"type": "object"}, params, limits))
    if params.regex is not None:
        _bound("the regex", params.regex, limits.regex_bytes)
        return Grammar("regex", f"{HEADER}start: /{_in_slashes(params.regex)}/")
    if params.choice is not None:
        if not params.choice or not all(params.choice):
            raise GrammarError("choice must hold at least one text, and no empty one")
        words = "|".join(_literal(word) for word in params.choice)
        _bound("choice", words, MAX_GRAMMAR_BYTES)
        return Grammar("choice", f"{HEADER}start: /(?:{words})/")
    assert params.grammar is not None
    _bound("the grammar", params.grammar, max(MAX_GRAMMAR_BYTES, limits.schema_bytes))  # it may hold schemas
    return Grammar("grammar", _lark(params.grammar, limits))


def _json(schema: dict[str, Any], params: StructuredOutputsParams, limits: Limits) -> str:
    options: dict[str, Any] = {"whitespace_pattern": WHITESPACE}
    if params.disable_any_whitespace:
        options = {"whitespace_flexible": False}
    elif params.whitespace_pattern is not None:
        _bound("whitespace_pattern", params.whitespace_pattern, limits.regex_bytes)
        options = {"whitespace_pattern": params.whitespace_pattern}
    return f"{HEADER}start: %json {json.dumps({**schema, 'x-guidance': options})}"


def _lark(text: str, limits: Limits) -> str:
    """A grammar as the caller wrote it, in Lark's notation and without forced tokens."""
    if not _LARK.search(text):
        text = _from_gbnf(text)
    for place in re.finditer(r"%json\s*(?=\{)", text):
        try:
            block, _ = json.JSONDecoder().raw_decode(text, place.end())
        except RecursionError as error:
            raise SchemaError("a %json block is nested too deep") from error
        except ValueError:
            continue  # a %json in a comment or a string; a block that is broken will not compile
        check_bounds(block, limits)
    found = _OPTIONS.search(text)
    if found is None:
        return HEADER + text
    try:
        options, end = json.JSONDecoder().raw_decode(text, found.end())
    except (ValueError, RecursionError) as error:
        raise GrammarError("the options after %llguidance are not valid JSON") from error
    return f"{text[: found.end()]}{json.dumps({**options, 'no_forcing': True})}{text[end:]}"


def _from_gbnf(text: str) -> str:
    from llguidance.gbnf_to_lark import gbnf_to_lark  # heavy, see matcher.py

    try:
        return str(gbnf_to_lark(text))
    except Exception as error:  # the converter's own types, among them plain Exception
        raise GrammarError(f"the grammar has no start rule of Lark, and is no GBNF: {error!s:.200}") from error


def _try(grammar: Grammar, tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> None:
    """Compile and take the first step, as an engine would."""
    matcher = compile_grammar(grammar.text, tokenizer, end_ids)
    words = np.zeros(-(-tokenizer.vocab_size // 32), np.int32)
    if matcher.error or not matcher(np.zeros(0, np.int32), words):
        raise GrammarError(_clip(_readable(matcher.error)))
    bits = words.view(np.uint32)
    for token in end_ids:  # an output of nothing is no output
        if token < tokenizer.vocab_size:
            bits[token // 32] &= ~np.uint32(1 << token % 32)
    if not bits.any():
        raise GrammarError("it allows no text at all")


def _clip(text: str) -> str:
    """At most MAX_ECHO characters of a message."""
    return text if len(text) <= MAX_ECHO else text[: MAX_ECHO - 4] + " ..."


def _readable(error: str) -> str:
    error = error.removeprefix("failed to compile JSON schema: ")
    if error.startswith("Unimplemented keys: "):
        keys = ", ".join(re.findall(r'"([^"]*)"', error))
        return f"the schema uses {keys}, which cannot be enforced"
    if error.startswith("oneOf constraints"):
        return "the alternatives of a oneOf are not known to exclude each other; use anyOf"
    if error.startswith("NoExtension"):
        return "no text can satisfy it"
    return error


def _bound(what: str, text: str, limit: int) -> None:
    if not text.strip():
        raise GrammarError(f"{what} is blank")
    try:
        size = len(text.encode())
    except UnicodeError as error:
        raise GrammarError(f"{what} is no valid Unicode") from error
    if size > limit:
        raise GrammarError(f"{what} has {size} bytes, at most {limit} are allowed")


def _in_slashes(regex: str) -> str:
    from llguidance import regex_to_lark  # heavy, see matcher.py

    return str(regex_to_lark(regex, "d"))  # \d is 0 to 9, as whoever reads the number will expect


def _literal(word: str) -> str:
    """A text as a regex that Lark reads between slashes."""
    return "".join(char if char.isalnum() else f"\\u{{{ord(char):x}}}" for char in word)


class _Checked:
    """Constraints that have been found good, the last used ones, up to a number of bytes."""

    def __init__(self) -> None:
        self._sizes: OrderedDict[Any, int] = OrderedDict()
        self._bytes, self._lock = 0, threading.Lock()

    def __len__(self) -> int:
        return len(self._sizes)

    def seen(self, key: Any) -> bool:
        with self._lock:
            if key in self._sizes:
                self._sizes.move_to_end(key)
            return key in self._sizes

    def add(self, key: Any, size: int, max_bytes: int) -> None:
        with self._lock:
            self._bytes += size - self._sizes.pop(key, 0)
            self._sizes[key] = size
            while self._bytes > max_bytes:
                self._bytes -= self._sizes.popitem(last=False)[1]


_checked = _Checked()


def num_checked() -> int:
    """Constraints that are known to be good."""
    return len(_checked)
