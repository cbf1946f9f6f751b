"""Logprobs in the shapes of OpenAI's two APIs and of vLLM's prompt_logprobs.

Owns names of tokens, their bytes and offsets; it does not know chunks. Invariant: a list of logprobs has one entry per
token, in order, and JSON can hold each number (a logit of minus infinity has no logarithm that it could).
"""

from collections.abc import Sequence

import msgspec

from octavo.outputs import Logprob, PositionLogprobs
from octavo.text.pieces import TextStream
from octavo.text.vocabulary import Tokenizer

FLOOR = -9999.0


class TopLogprob(msgspec.Struct):
    """A token that was likely at a position. bytes: its own, which need not be whole characters."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The token of a position, and the most likely ones there, the best first."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct):
    """One entry per token of a choice or a chunk."""

    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(msgspec.Struct):
    """Four lists, one entry per token of a choice or a chunk.

    Attributes:
        text_offset: characters of the choice's text (with echo: of prompt and text) before a token; a token that holds only
            a part of a character has the offset of that character.
        token_logprobs, top_logprobs: null for the first token of an echoed prompt.
    """

    text_offset: list[int] = []
    token_logprobs: list[float | None] = []
    tokens: list[str] = []
    top_logprobs: list[dict[str, float] | None] = []

    def extend(self, other: "CompletionLogprobs") -> None:
        """Put the entries of later tokens behind these."""
        self.text_offset += other.text_offset
        self.token_logprobs += other.token_logprobs
        self.tokens += other.tokens
        self.top_logprobs += other.top_logprobs


class PromptLogprob(msgspec.Struct):
    """vLLM's entry of a prompt position."""

    logprob: float
    rank: int | None
    decoded_token: str | None


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class TokenNames:
    """How tokens are called in an answer.

    Args:
        as_ids: "token_id:5" instead of the token's text (return_tokens_as_token_ids).
    """

    def __init__(self, tokenizer: Tokenizer, as_ids: bool) -> None:
        self._tokenizer, self._as_ids = tokenizer, as_ids
        self._bytes_of: dict[int, list[int]] = {}

    def name(self, token: int) -> str:
        """The name of one token."""
        return f"token_id:{token}" if self._as_ids else self._tokenizer.token_text(token)

    def chat(self, positions: Sequence[PositionLogprobs], token_ids: Sequence[int], top: int) -> ChatLogprobs:
        """OpenAI's chat shape; ``top``: how many alternatives were asked for."""
        return ChatLogprobs([self._entry(position, token, top)
                             for position, token in zip(positions, token_ids, strict=True)])

    def _entry(self, position: PositionLogprobs, token: int, top: int) -> TokenLogprob:
        best = [TopLogprob(self.name(other), finite(entry), self._bytes(other)) for other, entry in likeliest(position, top)]
        return TokenLogprob(self.name(token), finite(position[token]), self._bytes(token), best)

    def _bytes(self, token: int) -> list[int]:
        known = self._bytes_of.get(token)
        if known is None:
            known = self._bytes_of[token] = list(self._tokenizer.token_bytes(token))
        return known

    def completion(self, positions: Sequence[PositionLogprobs | None], token_ids: Sequence[int], top: int,
                   offsets: list[int]) -> CompletionLogprobs:
        """OpenAI's completions shape: ``top`` alternatives and the token itself, so top + 1 entries at most."""
        found = CompletionLogprobs(offsets, [], [], [])
        for position, token in zip(positions, token_ids, strict=True):
            found.tokens.append(self.name(token))
            found.token_logprobs.append(None if position is None else finite(position[token]))
            found.top_logprobs.append(None if position is None else self._named(position, token, top))
        return found

    def _named(self, position: PositionLogprobs, token: int, top: int) -> dict[str, float]:
        named = {self.name(token): finite(position[token])}
        for other, entry in likeliest(position, top):
            named.setdefault(self.name(other), finite(entry))  # pieces of characters may share a name
        return named


def likeliest(position: PositionLogprobs, top: int) -> list[tuple[int, Logprob]]:
    """The ``top`` most likely tokens of a position, the best first."""
    found = [(token, entry) for token, entry in position.items() if entry.rank is not None and entry.rank <= top]
    return sorted(found, key=lambda pair: pair[1].rank or 0)


def finite(entry: Logprob) -> float:
    """A logprob as JSON can hold it."""
    return max(entry.logprob, FLOOR)


def prompt_entries(positions: Sequence[PositionLogprobs | None], token_ids: Sequence[int], top: int) -> PromptLogprobs:
    """vLLM's prompt_logprobs: per position the token itself and the ``top`` best, by id."""
    found: PromptLogprobs = []
    for position, token in zip(positions, token_ids, strict=True):
        if position is None:
            found.append(None)
            continue
        listed = {token: position[token]} | dict(likeliest(position, top))
        found.append({str(other): PromptLogprob(finite(entry), entry.rank, entry.decoded_token)
                      for other, entry in listed.items()})
    return found


class Offsets:
    """Where tokens begin in a text that is decoded one by one.

    Args:
        stream: decodes as the text was decoded. start: characters before it.
    """

    def __init__(self, stream: TextStream, start: int) -> None:
        self._stream, self._at = stream, start

    def take(self, token_ids: Sequence[int]) -> list[int]:
        """The offsets of more tokens, none below 0."""
        found = []
        for token in token_ids:
            found.append(max(self._at, 0))
            self._at += len(self._stream.push(token))
        return found
