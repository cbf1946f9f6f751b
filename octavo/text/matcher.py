"""Matcher: which tokens may come next where an output has to follow a grammar. The only door to llguidance.

Owns the vocabulary in llguidance's form, the limits of its automata and one sequence's way through a grammar; it does not
know what callers may ask for (grammar.py does), rows or logits.

A lexer is shared, with its lock and its limits, by the copies of a matcher. So copies are for the continuations of one
request, and every request compiles its own: a millisecond or so, for which no request can wait on or fail by another's.
Invariant: whatever a grammar does, an error is an answer here and no exception.
"""

import concurrent.futures
import re
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from octavo.log import get_logger
from octavo.plan import Int32
from octavo.text.vocabulary import Tokenizer

_log = get_logger(__name__)
_vocabularies: "weakref.WeakKeyDictionary[Tokenizer, dict[tuple[int, ...], Any]]" = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_stack_lock = threading.Lock()

SHALLOW = 1024
"""Characters of a grammar for which any stack is large enough."""
LEAST_STACK, STACK_PER_CHAR = 16 << 20, 4 << 10
"""Bytes. Rules one in the other, with brackets in brackets, take up to 1 KiB per character."""
T = TypeVar("T")


class Matcher:
    """One sequence's place in a grammar. Not safe for use from several threads at once.

    Attributes:
        error: why it can say nothing more, "" while it can.
    """

    def __init__(self, native: Any, end_ids: frozenset[int], num_words: int) -> None:
        self._native, self._ends = native, end_ids
        self._bits = np.zeros(num_words, np.int32)
        self._taken = 0
        self.error = ""

    @classmethod
    def failed(cls, error: str) -> "Matcher":
        """One that has nothing to say but its error."""
        matcher = cls(None, frozenset(), 0)
        matcher.error = error
        return matcher

    def copy(self) -> "Matcher":
        """Another sequence at the same place."""
        other = Matcher(self._native.deep_copy(), self._ends, len(self._bits))
        other._taken, other.error = self._taken, self.error
        return other

    def __call__(self, output: Int32, words: Int32) -> bool:
        """Say which tokens may follow.

        Args:
            output: int32, all that the sequence has generated; what is new since the last call is taken in.
            words: int32 [ceil(vocabulary / 32)], gets bit ``i % 32`` of word ``i // 32`` for every token i that may follow;
                end tokens may where the grammar is complete, and all of them.

        Returns:
            False when the matcher has failed, see ``error``; ``words`` then say nothing.
        """
        if self.error:
            return False
        try:
            if len(output) and int(output[-1]) in self._ends:  # planned ahead: nobody reads what comes after the end
                words[:] = -1
                return True
            return self._advance(output) and self._fill(words)
        except BaseException as error:  # a panic of the library is no Exception, and must not end the engine
            self.error = f"{type(error).__name__}: {error}"
            _log.exception("llguidance failed")
            return False

    def _advance(self, output: Int32) -> bool:
        if len(output) < self._taken:
            self._native.reset()
            self._taken = 0
        fresh = output[self._taken :].tolist()
        self._taken = len(output)
        return not fresh or bool(self._native.consume_tokens(fresh)) or self._failed()

    def _fill(self, words: Int32) -> bool:
        self._native.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        if self._native.is_error():
            return self._failed()
        count = min(len(words), len(self._bits))  # either vocabulary may have ids that the other lacks
        words[:count] = self._bits[:count]
        words[count:] = 0
        return bool(words.any()) or self._failed("no token may follow")

    def _failed(self, reason: str = "") -> bool:
        self.error = reason or _plain(self._native.get_error())
        return False


def compile_grammar(text: str, tokenizer: Tokenizer, end_ids: Sequence[int]) -> Matcher:
    """A matcher at the beginning of a grammar in Lark's notation; it has an ``error`` when the grammar cannot be used.

    Args:
        end_ids: the model's end tokens. Those that the tokenizer lacks are never allowed.
    """
    from llguidance import LLMatcher, LLParserLimits  # its import costs a tenth of a second, and few requests need it

    # Compiling takes well below a second, a mask at most some tens of milliseconds, an automaton some tens of megabytes; what
    # needs more ends with an error. Ordinary schemas use a hundredth of this.
    limits = LLParserLimits(
        max_items_in_row=8_000, initial_lexer_fuel=1_000_000, step_lexer_fuel=100_000, step_max_items=10_000,
        max_lexer_states=20_000, max_grammar_size=200_000, precompute_large_lexemes=True, verbose_errors=False)
    vocabulary = _vocabulary(tokenizer, tuple(end_ids))
    native = with_room(len(text), lambda: LLMatcher(vocabulary, text, log_level=0, limits=limits))
    matcher = Matcher(native, frozenset(end_ids), -(-vocabulary.vocab_size // 32))
    if native.is_error():
        matcher.error = _plain(native.get_error())
    return matcher


def with_room(size: int, work: Callable[[], T]) -> T:
    """Do work that goes as deep as a text of ``size`` characters may nest, on a stack that is large enough.

    The library follows the rules of a grammar from one to the next and has no limit for that: a chain of some thousand of them,
    which 64 KiB can hold, overruns the stack of an ordinary thread and ends the process. Only what is used of a stack costs.
    """
    if size <= SHALLOW:
        return work()
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # a panic of the library is no Exception
            done.set_exception(error)

    with _stack_lock:  # the size is one for all threads that begin; another one that happens to begin now does not mind
        before = threading.stack_size(max(LEAST_STACK, STACK_PER_CHAR * size))
        try:
            threading.Thread(target=run, name="octavo-grammar", daemon=True).start()
        finally:
            threading.stack_size(before)
    return done.result()


def _vocabulary(tokenizer: Tokenizer, end_ids: tuple[int, ...]) -> Any:
    """The vocabulary in llguidance's form, made once per tokenizer: up to a second for the largest."""
    with _lock:
        known = _vocabularies.setdefault(tokenizer, {})
        if end_ids not in known:
            from llguidance import LLTokenizer

            pieces: Any = _Pieces(tokenizer, end_ids)
            known[end_ids] = LLTokenizer(pieces, eos_token=_ends(tokenizer, end_ids))
        return known[end_ids]


def _ends(tokenizer: Tokenizer, end_ids: Sequence[int]) -> list[int]:
    return [token for token in end_ids if token < tokenizer.vocab_size]


class _Pieces:
    """What llguidance asks of a tokenizer. The bytes are those that our own decoder gives, so that what it allows is what
    the caller will read."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, end_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = _ends(tokenizer, end_ids)[0]
        self.tokens = tokenizer.pieces()
        self.special_token_ids = sorted(tokenizer.special_ids)

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        return self._tokenizer.encode(text, add_special_tokens=False, parse_special=False)


def _plain(message: str) -> str:
    """What went wrong, without the drawings around it and the position in a text that the caller has not written."""
    lines = message.strip().splitlines()
    first = re.sub(r"^(at )?\d+\(\d+\): |; following special tokens.*", "", lines[0]) if lines else "unknown"
    return " ".join([first, *(line for line in lines[1:] if line.startswith("error: "))])
