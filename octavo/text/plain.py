"""Plain: an encoder for which control tokens are plain text.

Owns a second copy of a vocabulary and the aliases by which a chat template still reaches the control tokens; it does
not know templates. Invariant: without an alias in the text no control token comes out.
"""

import re
import secrets
from collections.abc import Mapping

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from octavo.errors import RequestError


def _unknown(backend: Backend, state: str) -> int | None:
    piece = getattr(backend.model, "unk_token", None)
    if isinstance(piece, str):
        found: int | None = backend.token_to_id(piece)
        return found
    number = re.search(r'(?<!\\)"unk_id":\s*(\d+)', state)
    return None if number is None else int(number[1])


class Plain:
    """A second copy of a vocabulary in which control tokens cannot be written, except by a secret alias of each.

    The copy has ``encode_special_tokens`` on: its added-token matcher skips every special token. So that a chat
    template can still make them, each has an alias, a string with a random part that no text holds, with the same
    matching rules. A text with aliases is cut into sections at exactly the places where the original would cut it.
    """

    def __init__(self, backend: Backend, special: Mapping[int, AddedToken]) -> None:
        state = backend.to_str()
        self._copy = Backend.from_str(state)
        # Words that the vocabulary lacks may become its unknown token, which controls nothing.
        self._special = frozenset(special) - {_unknown(backend, state)}
        self._copy.encode_special_tokens = True
        self._nonce = "\U000f0000" + secrets.token_hex(8)
        self.alias: dict[str, str] = {}
        self._original: dict[int, int] = {}
        for number, token_id in enumerate(sorted(special)):
            token = special[token_id]
            alias = f"{self._nonce}.{number}\U000f0001"
            rules = {"lstrip": token.lstrip, "rstrip": token.rstrip, "normalized": token.normalized}
            self._copy.add_tokens([AddedToken(alias, special=False, single_word=False, **rules)])
            self.alias[token.content] = alias
            number_of: int = self._copy.token_to_id(alias)  # type: ignore[assignment]  # just added
            self._original[number_of] = token_id

    def encode(self, text: str, add_special_tokens: bool = False, field: str = "prompt") -> list[int]:
        """Ids of a text in which only aliases are control tokens; ``field`` names the text in an error."""
        # A batch of one, because then other threads run meanwhile.
        ids: list[int] = self._copy.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        if self._special.isdisjoint(ids):
            return self._resolve(ids)
        encoding = self._copy.encode_batch([text], add_special_tokens=add_special_tokens)[0]  # the slow one counts offsets
        mask = encoding.special_tokens_mask
        forged = [i for i, token in enumerate(ids) if token in self._special and not mask[i]]
        if not forged:
            return self._resolve(ids)
        # The vocabulary itself spells a control token (a unigram or word model): cut its text in two.
        start, end = encoding.offsets[forged[0]]
        middle = (start + end) // 2
        if not start < middle < end:
            piece = text[start:end]
            raise RequestError(f"{field}: this vocabulary cannot write {piece!r:.200} as plain text.", field)
        size = len(ids)
        head = next((i for i in range(size) if not mask[i]), size)
        tail = next((i for i in range(size) if not mask[size - 1 - i]), 0)
        inner = self.encode(text[:middle], field=field) + self.encode(text[middle:], field=field)
        return ids[:head] + inner + (ids[size - tail :] if tail else [])

    def _resolve(self, ids: list[int]) -> list[int]:
        if not self._original or max(ids, default=0) < min(self._original):
            return ids
        return [self._original.get(token, token) for token in ids]

    def holds_alias(self, text: str) -> bool:
        """Whether a text holds the secret; no text of a client does."""
        return self._nonce in text
