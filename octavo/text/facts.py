"""TokenizerFacts: what the files beside a vocabulary say about it, and the frame of begin and end tokens.

Owns one record and the post-processor that both readers of vocabularies (folder, GGUF) make; it knows neither files nor
text. Invariant: plain data, made once when a model is loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import processors


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What the files say.

    Attributes:
        special_tokens: variable of the chat template -> text, such as ``bos_token`` -> ``<s>``.
        eos_token_ids: the tokenizer's own end token first, then those of the model's other files.
        chat_templates: name ("default", "tool_use", ...) -> template text; empty without any.
        origin: file or folder, for messages.
    """

    special_tokens: Mapping[str, str] = field(default_factory=dict)
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    origin: str = ""


def frame(begin: Sequence[tuple[str, int]], end: Sequence[tuple[str, int]]) -> Any:
    """A post-processor that puts (text, id) tokens before and after a prompt."""
    # Named by number: the library's notation splits at spaces and colons, which a token's text may hold.
    notation = " ".join([*(f"#{token}" for _, token in begin), "$A", *(f"#{token}" for _, token in end)])
    tokens = [{"id": f"#{token}", "ids": [token], "tokens": [text]} for text, token in {*begin, *end}]
    return processors.TemplateProcessing(single=notation, special_tokens=tokens)
