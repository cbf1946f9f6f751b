"""Tokenizer: text to token ids and back, for every vocabulary that the ``tokenizers`` library can hold.

Owns encoding with and without control tokens, decoding, and what a model's files say about begin and end tokens; it
does not know chat templates (it only keeps their text), requests or stop strings. Invariant: with
``parse_special=False`` no text, however hostile, becomes a control token.
"""

import operator
import threading
from collections.abc import Sequence
from functools import cached_property

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from octavo.errors import RequestError
from octavo.text.controls import Controls
from octavo.text.facts import TokenizerFacts
from octavo.text.pieces import Kind, Pieces, TextStream
from octavo.text.plain import Plain


class Tokenizer:
    """One vocabulary. Safe to use from several threads.

    Args:
        backend: a ``tokenizers.Tokenizer``; truncation and padding are switched off in it.
        facts: begin and end tokens, chat templates.

    Attributes:
        vocab_size: 1 + the highest id, added tokens included.
        special_tokens, bos_token_id, eos_token_id, eos_token_ids, chat_templates: see TokenizerFacts.
        special_ids: control tokens; hidden by skip_special_tokens, never made from text when parse_special is off.
    """

    def __init__(self, backend: Backend, facts: TokenizerFacts | None = None) -> None:
        facts = facts or TokenizerFacts()
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.added: dict[int, AddedToken] = dict(backend.get_added_tokens_decoder())
        self.special_ids = frozenset(i for i, token in self.added.items() if token.special)
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.special_tokens, self.chat_templates = dict(facts.special_tokens), dict(facts.chat_templates)
        self.bos_token_id, self.origin = facts.bos_token_id, facts.origin
        self.eos_token_ids = tuple(dict.fromkeys(facts.eos_token_ids))
        self.eos_token_id = self.eos_token_ids[0] if self.eos_token_ids else None
        self._pieces = Pieces(backend, {i: token.content for i, token in self.added.items()}, self.special_ids)
        self._texts: dict[int, str] = {}
        self._plain: Plain | None = None
        self._controls: Controls | None = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.vocab_size

    def encode(
        self, text: str, add_special_tokens: bool = True, parse_special: bool = True, field: str = "prompt"
    ) -> list[int]:
        """Ids of a text.

        Args:
            add_special_tokens: put the begin (end) token that the model wants around a prompt.
            parse_special: True makes control tokens of strings such as ``<|im_end|>``; False takes them as plain text.
            field: what the text is, for the message of an error.

        Raises:
            RequestError: not a string, or not valid Unicode (a lone surrogate).
        """
        if not isinstance(text, str):
            raise RequestError(f"{field} must be a string, got {text!r:.200}.", field)
        try:
            if parse_special:
                # Of the library's ways only those for batches let other threads run meanwhile: a long text takes seconds.
                ids: list[int] = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
                return ids
            return self.plain.encode(text, add_special_tokens, field)
        except (TypeError, UnicodeError) as error:
            raise RequestError(f"{field} must be valid Unicode text, got {text!a:.200}.", field) from error

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[list[int]]:
        """``encode`` of several texts, in parallel where control tokens are parsed. Same errors."""
        if not parse_special or not all(isinstance(text, str) for text in texts):
            return [self.encode(text, add_special_tokens, parse_special) for text in texts]
        try:
            batch = self.backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeError):  # one of them is no Unicode: find it and say so
            return [self.encode(text, add_special_tokens) for text in texts]
        return [list(encoding.ids) for encoding in batch]

    def decode(
        self, ids: Sequence[int], skip_special_tokens: bool = True, spaces_between_special_tokens: bool = True,
        after: Sequence[int] = (),
    ) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD.

        Args:
            skip_special_tokens: leave control tokens out.
            spaces_between_special_tokens: False joins neighbouring control tokens without the space that some decoders
                put between all tokens (byte-level and SentencePiece decoders put none).
            after: ids that come before; with SentencePiece they decide about a leading space.

        Raises:
            RequestError: ids are no list, or one of them is no whole number, negative or not below vocab_size.
        """
        try:
            ids, after = list(ids), list(after)
        except TypeError as error:
            raise RequestError(f"token_ids must be a list of whole numbers, got {ids!r:.200}.", "token_ids") from error
        ids, after = [self._checked(token) for token in ids], [self._checked(token) for token in after]
        return self._pieces.decode(ids, skip_special_tokens, spaces_between_special_tokens, after)

    def decode_generated(self, ids: Sequence[int], skip_special: bool, spaces: bool, after: Sequence[int]) -> str:
        """``decode`` for sampled ids: one beyond the vocabulary (padding of the model's embedding) has no text."""
        return self._pieces.decode(ids, skip_special, spaces, after)

    def stream(self, skip_special: bool, spaces: bool, after: Sequence[int] = ()) -> TextStream:
        """A decoder that takes one id at a time; its texts together equal ``decode_generated``."""
        return self._pieces.stream(skip_special, spaces, after)

    def token_text(self, token: int) -> str:
        """The text of one token alone, control tokens shown, a space before a word kept; "" beyond the vocabulary."""
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self._pieces.make(token).decode("utf-8", "replace")
        return text

    def token_bytes(self, token: int) -> bytes:
        """The bytes of ``token_text``, which need not be whole characters."""
        return self._pieces.all[token]

    def pieces(self) -> list[bytes]:
        """The bytes of every id from 0 to vocab_size - 1 as they stand in a text, control tokens as they are written."""
        return [self._pieces.make(token) for token in range(self.vocab_size)]

    @cached_property
    def chars_per_token(self) -> int | None:
        """The most characters of a text that one token stands for, None where no number can be told. Blanks that a control
        token swallows are not counted. Made when first needed, a fraction of a second."""
        return self._pieces.longest(self.vocab_size)

    @property
    def kind(self) -> Kind:
        """How pieces make a text: "bytes" and "spaces" (SentencePiece) join them, "other" does something else."""
        return self._pieces.kind

    def id_to_piece(self, token: int) -> str:
        """The vocabulary's own spelling of an id, "" for an unused one; RequestError beyond the vocabulary."""
        return self.backend.id_to_token(self._checked(token)) or ""

    def token_to_id(self, piece: str) -> int | None:
        """Id of a piece or an added token, None if there is none."""
        found: int | None = self.backend.token_to_id(piece)
        return found

    def _checked(self, token: int) -> int:
        try:
            number = -1 if isinstance(token, bool) else operator.index(token)
        except TypeError:
            number = -1
        if 0 <= number < self.vocab_size:
            return number
        raise RequestError(f"token id {token!r:.200} is not in the vocabulary of {self.vocab_size} ids.", "token_ids")

    @property
    def controls(self) -> Controls:
        """The strings that would become control tokens; made when first needed."""
        with self._lock:
            if self._controls is None:
                special = {token.content for i, token in self.added.items() if i in self.special_ids}
                everything = {token.content for token in self.added.values()}
                words = {token.content for token in self.added.values() if token.single_word}
                self._controls = Controls(special, everything - special, words)
            return self._controls

    @property
    def plain(self) -> Plain:
        """The encoder that takes control tokens for text; made when first needed, a fraction of a second."""
        with self._lock:
            if self._plain is None:
                self._plain = Plain(self.backend, {i: self.added[i] for i in self.special_ids})
            return self._plain
