"""Detokenizer: the generated tokens of one sequence to text, piece by piece, up to a stop string.

Owns the order decode, match, cut, and the count of tokens that belong to the cut text; it does not know requests or
logprobs. Invariant: the chunks together are the text of all ids decoded at once, cut at the first stop string, whatever
the chunking; no chunk ends in half a character or in the beginning of a stop string that is completed later.
"""

from collections.abc import Iterable, Sequence

from octavo.params import SamplingParams
from octavo.text.stops import StopMatcher
from octavo.text.vocabulary import Tokenizer


class Detokenizer:
    """Text of one sequence.

    Args:
        tokenizer: the model's. params: stop, include_stop_str_in_output, min_tokens, special tokens.
        prompt_ids: the prompt; with SentencePiece it decides whether the text begins with a space.

    Attributes:
        stop: the stop string that ended the text, else None; then later tokens are ignored.
        num_tokens: tokens that belong to the text: all pushed, or up to the one that completed the stop string.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, prompt_ids: Sequence[int] = ()) -> None:
        self._stream = tokenizer.stream(params.skip_special_tokens, params.spaces_between_special_tokens, prompt_ids)
        self._matcher = StopMatcher(tuple(params.stop), params.include_stop_str_in_output) if params.stop else None
        self._min_tokens = params.min_tokens
        self.stop: str | None = None
        self.num_tokens = 0

    def push(self, token_ids: Iterable[int]) -> str:
        """New text that these tokens make certain. A stop string that is complete within min_tokens tokens is text."""
        chunks: list[str] = []
        for token in token_ids:
            if self.stop is not None:
                break
            self.num_tokens += 1
            chunks.append(self._match(self._stream.push(token)))
        return "".join(chunks)

    def finish(self) -> str:
        """The rest: text that waited for more, bytes of a character that never came as U+FFFD. Nothing after a stop."""
        if self.stop is not None or self.num_tokens == 0:
            return ""
        rest = self._match(self._stream.finish())
        if self.stop is None and self._matcher is not None:
            rest += self._matcher.finish()
        return rest

    def _match(self, text: str) -> str:
        if self._matcher is None or not text:
            return text
        shown = self._matcher.push(text, armed=self.num_tokens > self._min_tokens)
        self.stop = self._matcher.stop
        return shown
