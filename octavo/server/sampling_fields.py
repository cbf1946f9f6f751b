"""The fields that all generating APIs share, and what they mean: one JSON object to SamplingParams and an Ask.

Owns names, types and the way from a field to a parameter; it does not know routes or what an answer looks like. Null counts
as absent everywhere. Invariant: each field here has an effect, is refused with its name, or stands under ``NO_EFFECT``;
ranges that SamplingParams checks are not checked again.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from octavo.errors import RequestError
from octavo.params import SamplingParams, StructuredOutputsParams
from octavo.server.config import ServerConfig
from octavo.server.service import Ask, Service
from octavo.text.grammar import check
from octavo.text.vocabulary import Tokenizer

NO_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key", "store", "service_tier")
SERVICE_TIERS = ("auto", "default")
# Fields that are parameters under the same name.
SAME = ("frequency_penalty", "presence_penalty", "n", "best_of", "seed", "temperature", "top_p", "top_k", "min_p",
        "repetition_penalty", "length_penalty", "use_beam_search", "early_stopping", "stop_token_ids",
        "include_stop_str_in_output", "ignore_eos", "min_tokens", "skip_special_tokens", "spaces_between_special_tokens",
        "allowed_token_ids", "bad_words")
# What a model's generation config says about sampling means nothing to beams.
BEAM_DEFAULTS = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}
MAX_ID_CHARS = 256
HEAD_CHARS = 16
"""Of a text with more characters than this for each token that fits, as many are tokenised first: too many, if it is text."""


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a stream holds beside its text.

    Attributes:
        include_usage: one more chunk at the end. continuous_usage_stats: usage in every chunk too.
        include_obfuscation: without effect.
    """

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchemaFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A schema with a name; ``strict`` and ``description`` change nothing: the schema is always kept to."""

    name: str
    schema: dict[str, Any] | bool | None = None
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """OpenAI's way to ask for JSON. type: text, json_object, json_schema."""

    type: str
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's way to constrain an output: exactly one of json, regex, choice, grammar, json_object."""

    json: dict[str, Any] | bool | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: str | None = None


class ParamFields(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields that become SamplingParams, which says what they mean and how far they go; and ``timeout``, seconds."""

    n: int | None = None
    best_of: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    early_stopping: bool | str | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    structured_outputs: StructuredOutputs | None = None
    timeout: float | None = None


class SamplingFields(ParamFields, kw_only=True, forbid_unknown_fields=True):
    """What OpenAI's APIs and vLLM's versions of them have beside these. ``NO_EFFECT`` lists what is accepted and does nothing.

    Attributes:
        prompt_logprobs: not with stream. truncate_prompt_tokens: see ``truncated``.
        add_special_tokens: by default true for texts, false for conversations.
        guided_json, guided_regex, guided_choice, guided_grammar: older names of structured_outputs.
        return_tokens_as_token_ids: logprobs name tokens "token_id:5".
        cache_salt: keeps the prefix cache apart. request_id: takes part in the answer's id.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None
    add_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: str | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    store: bool | None = None
    service_tier: str | None = None


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a request, tokenised.

    Attributes:
        texts: None for a prompt that was given as ids.
    """

    texts: list[str | None]
    ids: list[list[int]]


def need_tokenizer(service: Service) -> Tokenizer:
    """The model's tokenizer; RequestError where the operator left it out."""
    tokenizer = service.intake.tokenizer
    if tokenizer is None:
        raise RequestError("This server runs without a tokenizer, so it takes and gives no text.")
    return tokenizer


def to_params(fields: ParamFields, service: Service, *, max_tokens: int | None, structured: StructuredOutputsParams | None,
              logprobs: int | None = None, prompt_logprobs: int | None = None) -> SamplingParams:
    """The sampling parameters of a request: what it says, else what the model's generation config says.

    Args:
        max_tokens, logprobs, prompt_logprobs, structured: as SamplingParams has them; each API has its own ways to ask.

    Raises:
        RequestError: a value is out of range, or two fields contradict each other.
    """
    changes: dict[str, Any] = {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs, "structured_outputs": structured}
    if fields.use_beam_search:
        changes.update(BEAM_DEFAULTS)
    for name in SAME:
        if (value := getattr(fields, name)) is not None:
            changes[name] = value
    if fields.stop is not None:
        changes["stop"] = (fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop)
    if fields.logit_bias is not None:
        changes["logit_bias"] = {_token_id(key): bias for key, bias in fields.logit_bias.items()}
    params = service.intake.default_params(max_tokens).clone(**changes)
    _check_limits(params, service.server)
    return params


def check_fields(fields: SamplingFields) -> None:
    """Refuse what contradicts itself about streaming, a client's id that cannot be echoed, and tiers that do not exist."""
    options = fields.stream_options
    if options is not None and not fields.stream:
        raise RequestError("stream_options needs stream to be true.", "stream_options")
    if options is not None and options.continuous_usage_stats and not options.include_usage:
        raise RequestError("stream_options: continuous_usage_stats needs include_usage.", "stream_options")
    if fields.stream and fields.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs cannot be combined with stream.", "prompt_logprobs")
    if fields.service_tier is not None and fields.service_tier not in SERVICE_TIERS:
        raise RequestError(f"service_tier must be auto or default, got {fields.service_tier!r:.200}.", "service_tier")
    name = fields.request_id
    if name is not None and not (0 < len(name) <= MAX_ID_CHARS and name.isascii() and name.isprintable()):
        raise RequestError(
            f"request_id must have 1 to {MAX_ID_CHARS} printable ASCII characters, got {name!r:.200}.", "request_id")


def usage_wishes(fields: SamplingFields, server: ServerConfig) -> tuple[bool, bool]:
    """(a stream ends with usage, every chunk has it)."""
    options = fields.stream_options
    continuous = options is not None and bool(options.continuous_usage_stats)
    return server.enable_force_include_usage or (options is not None and bool(options.include_usage)), continuous


def constraint(fields: SamplingFields, service: Service) -> StructuredOutputsParams | None:
    """What the output must look like: response_format, structured_outputs or one of its older names.

    Raises:
        RequestError: two of them, or one that cannot be used; ``param`` is the client's own name for it.
    """
    guided = {name: value for name in GUIDED if (value := getattr(fields, name)) is not None}
    given: list[tuple[str, dict[str, Any]]] = [(name, {GUIDED[name]: value}) for name, value in guided.items()]
    if fields.response_format is not None and (wanted := _format(fields.response_format)):
        given.append(("response_format", wanted))
    if fields.structured_outputs is not None:
        given.append(("structured_outputs", msgspec.structs.asdict(fields.structured_outputs)))
    if len(given) > 1:
        raise RequestError(f"{given[1][0]} cannot be combined with {given[0][0]}.", given[1][0])
    return _structured(*given[0], service) if given else None


def plain_constraint(fields: ParamFields, service: Service) -> StructuredOutputsParams | None:
    """The same where only structured_outputs exists."""
    wanted = fields.structured_outputs
    return None if wanted is None else _structured("structured_outputs", msgspec.structs.asdict(wanted), service)


def _structured(name: str, values: Mapping[str, Any], service: Service) -> StructuredOutputsParams:
    known = {key: value for key, value in values.items() if value is not None}
    if isinstance(known.get("json"), bool):  # a schema that allows everything, or nothing
        known["json"] = "true" if known["json"] else "false"
    try:
        wanted = StructuredOutputsParams(**known)
    except RequestError as error:
        raise RequestError(str(error), name, error.code) from None
    check(wanted, need_tokenizer(service), name, service.intake.eos_token_ids, service.intake.limits)
    return wanted


def make_asks(prompts: Prompts, params: SamplingParams, service: Service, key_salt: str, *, explicit_max: bool,
              fields: SamplingFields | None = None, scored: int = 1) -> list[Ask]:
    """One Ask per prompt.

    Args:
        key_salt: keeps the prefix cache of this client's key apart; the request's own salt joins it.
        explicit_max: the client named max_tokens. fields: priority and cache_salt, where the API has them.
        scored: how often the answer holds a prompt's logprobs.

    Raises:
        RequestError: there are too many sequences, or could be too many logprobs.
    """
    sequences, most = len(prompts.ids) * params.width, service.server.max_sequences
    if sequences > most:
        raise RequestError(f"a request may have {most} sequences (prompts times n), got {sequences}.", "n")
    _check_logprobs(prompts, params, service, scored)
    salt, priority = key_salt, 0
    if fields is not None:
        salt, priority = _salted(key_salt, fields.cache_salt), fields.priority or 0
    return [Ask({"prompt": text, "prompt_token_ids": ids}, params, explicit_max, priority, salt)
            for text, ids in zip(prompts.texts, prompts.ids, strict=True)]


def _check_logprobs(prompts: Prompts, params: SamplingParams, service: Service, scored: int) -> None:
    """Refuse what could have more logprobs than an answer may hold: each is kept until the answer is whole."""
    most, room = service.server.max_logprob_entries, _room(service)

    def per_token(asked: int | None) -> int:  # more alternatives than max_logprobs are refused elsewhere
        return 0 if asked is None else min(asked, service.config.max_logprobs) + 1

    of_prompts = sum(map(len, prompts.ids)) * scored * per_token(params.prompt_logprobs)
    rooms = [max(0, room - len(ids)) for ids in prompts.ids]
    tokens = sum(rooms if params.max_tokens is None else [min(params.max_tokens, free) for free in rooms])
    of_outputs = tokens * params.width * per_token(params.logprobs)
    if of_prompts + of_outputs > most:
        name = "prompt_logprobs" if params.logprobs is None else "logprobs"
        raise RequestError(f"{name}: the answer could hold {of_prompts + of_outputs} of them, and {most} are allowed here; ask "
                           "for fewer alternatives, or for fewer or shorter continuations.", name)


def _room(service: Service) -> int:
    """Tokens that a prompt and its continuation may have together."""
    info = service.info
    return min(info.max_model_len, info.num_blocks * info.block_size)


def _salted(key_salt: str, own: str | None) -> str:
    """The salt of the prefix cache: of the client's key, and of the request."""
    if own is not None and not 0 < len(own) <= MAX_ID_CHARS:
        raise RequestError(f"cache_salt must have 1 to {MAX_ID_CHARS} characters, got {len(own)}.", "cache_salt")
    return key_salt if own is None else f"{key_salt}\0{own}"  # no key's salt holds a zero, so no pair is another's


def truncated(prompts: Prompts, keep: int | None, max_tokens: int | None, service: Service) -> Prompts:
    """Prompts of which only the last ``keep`` ids are left; a prompt that was cut has no text any more.

    Args:
        keep: None cuts nothing; -1 keeps what leaves room for max_tokens, or for one token where that is open.
    """
    if keep is None:
        return prompts
    if keep == -1:
        keep = max(1, _room(service) - (max_tokens or 1))
    if keep < 1:
        raise RequestError(
            f"truncate_prompt_tokens must be -1 or a positive integer, got {keep!r:.200}.", "truncate_prompt_tokens")
    return Prompts([text if len(ids) <= keep else None for text, ids in zip(prompts.texts, prompts.ids, strict=True)],
                   [ids[-keep:] for ids in prompts.ids])


def check_length(text: str, keep: int | None, service: Service) -> None:
    """Refuse a text that cannot fit however it is tokenised, before that takes seconds.

    Args:
        keep: truncate_prompt_tokens; a prompt that is to be cut may be as long as it will.

    Raises:
        RequestError: with the code context_length_exceeded.
    """
    longest, tokenizer = _room(service), need_tokenizer(service)
    if keep is not None or len(text) <= longest:
        return
    chars = tokenizer.chars_per_token
    too_long = chars is not None and len(text) > longest * chars
    if not too_long and len(text) > HEAD_CHARS * longest:
        # The rest could join the last of these tokens; that it halved their number is out of the question.
        too_long = len(tokenizer.encode(text[: HEAD_CHARS * longest])) > 2 * longest
    if too_long:
        raise RequestError(f"prompt has {len(text)} characters, which make more than {longest} tokens, and no more can fit.",
                           "prompt", "context_length_exceeded")


def check_count(messages: Sequence[object], keep: int | None, service: Service) -> None:
    """As ``check_length``, before the text is there: refuse more messages than tokens fit, since each is one at least."""
    longest = _room(service)
    if keep is None and len(messages) > longest:
        raise RequestError(f"messages has {len(messages)} entries, which make more than {longest} tokens, and no more can fit.",
                           "messages", "context_length_exceeded")


def check_timeout(timeout: float | None) -> float | None:
    """Seconds above 0."""
    if timeout is not None and not (math.isfinite(timeout) and timeout > 0.0):
        raise RequestError(f"timeout must be seconds above 0, got {timeout!r:.200}.", "timeout")
    return timeout


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) <= 10):
        raise RequestError(f"logit_bias must be keyed by token ids, got {key!r:.200}.", "logit_bias")
    return int(key)


def _format(wanted: ResponseFormat) -> dict[str, Any]:
    if wanted.type != "json_schema" and wanted.json_schema is not None:
        raise RequestError("response_format: json_schema needs the type json_schema.", "response_format")
    if wanted.type == "text":
        return {}
    if wanted.type == "json_object":
        return {"json_object": True}
    if wanted.type != "json_schema":
        raise RequestError(
            f"response_format: type must be text, json_object or json_schema, got {wanted.type!r:.200}.", "response_format")
    if wanted.json_schema is None:
        raise RequestError("response_format: json_schema is missing.", "response_format")
    # Without a schema, OpenAI's clients mean any object.
    return {"json_object": True} if wanted.json_schema.schema is None else {"json": wanted.json_schema.schema}


def _check_limits(params: SamplingParams, server: ServerConfig) -> None:
    for name, size, most in (("n", params.n, server.max_n), ("best_of", params.width, server.max_n),
                             ("stop", len(params.stop), server.max_stop),
                             ("logit_bias", len(params.logit_bias), server.max_logit_bias),
                             ("bad_words", len(params.bad_words), server.max_logit_bias)):
        if size > most:
            raise RequestError(f"{name} may be at most {most} here, got {size}.", name)
    for name in ("stop", "bad_words"):
        longest = max(map(len, getattr(params, name)), default=0)
        if longest > server.max_stop_chars:
            raise RequestError(f"{name} may have at most {server.max_stop_chars} characters here, got {longest}.", name)
