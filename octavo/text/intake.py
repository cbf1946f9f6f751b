"""From what a caller typed to an EngineRequest: prompt forms, tokenising, end tokens, bad words, default parameters.

Owns the rules that are the same for LLM, LLMEngine and the server; it does not know the engine's limits (lengths and the
KV pool are checked by Engine.add). Invariant: a request that leaves here has integer ids and tokenised bad words, and no
text travels on to the engine.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from octavo.config import EngineConfig
from octavo.errors import ConfigError, RequestError
from octavo.messages import EngineRequest, Grammar
from octavo.models.source import ModelSource
from octavo.params import SamplingParams, StructuredOutputsParams
from octavo.text.grammar import check
from octavo.text.schema import DEFAULT, Limits
from octavo.text.vocabulary import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]

# Keys of generation_config.json that have a meaning here; the others steer transformers' own generate.
GENERATION_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request ready for the engine, and its prompt text (None when the caller gave ids)."""

    request: EngineRequest
    prompt: str | None


class Intake:
    """Turns prompts and parameters into engine requests for one model.

    Args:
        source: the model; its config and generation_config give end tokens and sampling defaults.
        config: generation_config, override_generation_config are read.
        tokenizer: None with skip_tokenizer_init; then prompts must be ids and texts are refused by name.
        limits: of structured_outputs.
    """

    def __init__(self, source: ModelSource, config: EngineConfig, tokenizer: Tokenizer | None,
                 limits: Limits = DEFAULT) -> None:
        self.tokenizer, self.limits = tokenizer, limits
        self.eos_token_ids = _end_tokens(source, tokenizer)
        self.defaults = _defaults(source, config)

    def default_params(self, max_tokens: int | None) -> SamplingParams:
        """The model's own sampling defaults, with the given max_tokens (None: all that fits)."""
        return SamplingParams(max_tokens=max_tokens, **self.defaults)

    def prepare(self, request_id: str, prompt: Prompt, params: SamplingParams, *, stream: bool = False,
                priority: int = 0, cache_salt: str = "", arrival: float | None = None) -> Prepared:
        """Tokenise and pack one request.

        Args:
            prompt: text, a list of ids, or a mapping with ``prompt`` or ``prompt_token_ids`` (both: the ids count).
            stream: whether tokens are wanted with every step; forced on when stop strings need them.
            arrival: monotonic seconds, default now.

        Raises:
            RequestError: the prompt has no form that is known, structured_outputs cannot be compiled, or text meets a model
                without tokenizer.
        """
        _check_kinds(request_id, params, priority, cache_salt, arrival)
        text, ids = self._read(prompt)
        if params.stop and self.tokenizer is None:
            raise RequestError(f"stop needs a tokenizer, got {list(params.stop)!r:.200} with skip_tokenizer_init.", "stop")
        request = EngineRequest(
            request_id=request_id, prompt_token_ids=ids, params=params, eos_token_ids=self.eos_token_ids,
            bad_word_ids=self._bad_words(params.bad_words), stream=stream or bool(params.stop), priority=priority,
            arrival=time.monotonic() if arrival is None else arrival, cache_salt=cache_salt,
            grammar=self._grammar(params.structured_outputs))
        return Prepared(request, text)

    def _read(self, prompt: Prompt) -> tuple[str | None, list[int]]:
        if isinstance(prompt, str):
            return prompt, self._encode(prompt)
        if isinstance(prompt, Mapping):
            unknown = set(prompt) - {"prompt", "prompt_token_ids"}
            if unknown:
                raise RequestError(f"prompt has the unknown key {sorted(map(str, unknown))[0]!r}.", "prompt")
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            if text is not None and not isinstance(text, str):
                raise RequestError(f"prompt must be a string, got {text!r:.200}.", "prompt")
            if ids is not None:
                return text, _ids(ids)
            if text is None:
                raise RequestError("a prompt mapping needs prompt or prompt_token_ids, got neither.", "prompt")
            return text, self._encode(text)
        return None, _ids(prompt)

    def _encode(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise RequestError(f"prompt must be token ids with skip_tokenizer_init, got the text {text!r:.200}.", "prompt")
        return self.tokenizer.encode(text)

    def _grammar(self, wanted: StructuredOutputsParams | None) -> Grammar | None:
        if wanted is None:
            return None
        if self.tokenizer is None:
            raise RequestError("structured_outputs needs a tokenizer, got one with skip_tokenizer_init.", "structured_outputs")
        return check(wanted, self.tokenizer, "structured_outputs", self.eos_token_ids, self.limits)

    def _bad_words(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """Ids of each word at the start of a text and after a space: tokenizers write these differently."""
        if not words:
            return ()
        if self.tokenizer is None:
            raise RequestError(f"bad_words needs a tokenizer, got {list(words)!r:.200} with skip_tokenizer_init.", "bad_words")
        found: dict[tuple[int, ...], None] = {}
        for word in words:
            for form in (word, " " + word.lstrip()):
                ids = tuple(self.tokenizer.encode(form, add_special_tokens=False, parse_special=False))
                if not ids:
                    raise RequestError(f"bad_words holds {word!r:.200}, which has no token.", "bad_words")
                found[ids] = None
        return tuple(found)


def _check_kinds(request_id: Any, params: Any, priority: Any, cache_salt: Any, arrival: Any) -> None:
    """What types cannot promise at run time; a wrong one is the caller's mistake and is named."""
    if not isinstance(request_id, str):
        raise RequestError(f"request_id must be a string, got {request_id!r:.200}.", "request_id")
    if not isinstance(params, SamplingParams):
        raise RequestError(f"sampling_params must be SamplingParams, got {params!r:.200}.", "sampling_params")
    if isinstance(priority, bool) or not isinstance(priority, int):
        raise RequestError(f"priority must be an integer, got {priority!r:.200}.", "priority")
    if not isinstance(cache_salt, str):
        raise RequestError(f"cache_salt must be a string, got {cache_salt!r:.200}.", "cache_salt")
    number = isinstance(arrival, (int, float)) and not isinstance(arrival, bool)
    if arrival is not None and not (number and math.isfinite(arrival)):
        raise RequestError(f"arrival_time must be a finite number of seconds, got {arrival!r:.200}.", "arrival_time")


def _ids(value: Any) -> list[int]:
    ids = value.tolist() if hasattr(value, "tolist") else value
    if not isinstance(ids, Sequence) or isinstance(ids, (bytes, str)):
        raise RequestError(f"prompt_token_ids must be a list of integers, got {value!r:.200}.", "prompt_token_ids")
    ids = list(ids)
    for token in ids:
        if type(token) is not int:
            raise RequestError(f"prompt_token_ids must hold integers, got {token!r:.200}.", "prompt_token_ids")
    return ids


def _end_tokens(source: ModelSource, tokenizer: Tokenizer | None) -> tuple[int, ...]:
    found: dict[int, None] = {}
    for holder in (source.generation_config, source.config):
        value = holder.get("eos_token_id")
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and not isinstance(token, bool):
                found[token] = None
    if tokenizer is not None:
        for token in tokenizer.eos_token_ids:
            found[token] = None
    return tuple(found)


def _defaults(source: ModelSource, config: EngineConfig) -> dict[str, Any]:
    given = dict(source.generation_config) if config.generation_config == "auto" else {}
    given = {name: given[name] for name in GENERATION_KEYS if given.get(name) is not None}
    known = {f.name for f in fields(SamplingParams)}
    for name, value in config.override_generation_config.items():
        if name not in known or name == "max_tokens":
            raise ConfigError(f"override_generation_config has the unknown key {name!r}.", "override_generation_config")
        given[name] = value
    try:
        SamplingParams(**given)
    except RequestError as error:
        raise ConfigError(f"generation config: {error}", "generation_config") from error
    return given
