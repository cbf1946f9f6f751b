"""SamplingParams: how the next token is chosen and when to stop; every rule about a value is checked here, nowhere else.

Owns the fields, their defaults and their ranges; it does not know the model (vocabulary size, model length and the KV
pool are checked by the engine when the request is added) or what a grammar means (text/grammar.py does). Invariant: a
SamplingParams that exists is valid.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from typing import Any, Literal, TypeVar

from octavo.absent import SAMPLING
from octavo.errors import RequestError

MAX_N = 128
MAX_STOP = 16
MAX_STOP_CHARS = 256
MAX_BIAS = 1024
MAX_SEED = 2**64 - 1
MAX_TEMPERATURE = 1e6  # beyond it every distribution is flat in float32
GREEDY_BELOW = 1e-5  # a temperature that float32 logits cannot be divided by: the best token wins in any case
REPETITION_RANGE = (1e-3, 1e3)
MAX_LENGTH_PENALTY = 5.0  # length ** penalty has to stay a float32

NUMBERS = ("n", "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k",
           "min_p", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "length_penalty")

LogitsProcessor = Callable[[list[int], Any], Any]
C = TypeVar("C", bound=type[Any])

CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object")


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """What the output has to look like; exactly one of the first five is given. Names as in vLLM.

    Args:
        json: a JSON schema, as text or as a mapping (which is copied).
        regex: the whole output matches it. choice: the output is one of these texts.
        grammar: a grammar in Lark's notation, as llguidance reads it, or in GBNF (the rules of ``root``).
        json_object: True asks for any JSON object.
        disable_any_whitespace: JSON without spaces and line breaks.
        disable_additional_properties: objects of the schema hold no properties but those that it names.
        whitespace_pattern: a regex for the space between the parts of JSON.

    Raises:
        RequestError: with ``param`` structured_outputs.
    """

    json: str | dict[str, Any] | None = field(default=None, hash=False)
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        if self.choice is not None:
            set_(self, "choice", _tuple("choice", self.choice, "structured_outputs"))
        if self.json_object is False:
            set_(self, "json_object", None)
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) != 1:
            got = " and ".join(given) or "none"
            raise _unstructured(f"structured_outputs needs exactly one of {', '.join(CONSTRAINTS)}, got {got}.")
        if isinstance(self.json, dict):
            set_(self, "json", _json_copy(self.json))
        elif self.json is not None and not isinstance(self.json, str):
            raise _unstructured(f"json must be a JSON schema, got {self.json!r:.200}.")
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise _unstructured(f"{name} must be a string, got {value!r:.200}.")
        for word in self.choice or ():
            if not isinstance(word, str):
                raise _unstructured(f"choice must hold strings, got {word!r:.200}.")
        if self.json_object is not None and self.json_object is not True:
            raise _unstructured(f"json_object must be true or false, got {self.json_object!r:.200}.")
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                raise _unstructured(f"{name} must be true or false, got {getattr(self, name)!r:.200}.")
        _check_options(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "StructuredOutputsParams":
        """Build from a mapping; an unknown name is a RequestError that names it."""
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise RequestError(f"{name!s:.200} is not a field of structured_outputs.", "structured_outputs",
                                   "unsupported_field")
        return cls(**values)


def _unstructured(message: str) -> RequestError:
    return RequestError(message, "structured_outputs")


def _check_options(p: StructuredOutputsParams) -> None:
    """Options that would have no effect are refused."""
    of_json = p.json is not None or p.json_object is not None
    for name in ("disable_any_whitespace", "whitespace_pattern"):
        if getattr(p, name) and not of_json:
            raise _unstructured(f"{name} belongs to json and json_object, got {getattr(p, name)!r:.200}.")
    if p.disable_additional_properties and p.json is None:
        raise _unstructured("disable_additional_properties belongs to json, got True.")
    if p.disable_any_whitespace and p.whitespace_pattern is not None:
        raise _unstructured("whitespace_pattern and disable_any_whitespace exclude each other.")


def _json_copy(value: dict[str, Any]) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise _unstructured(f"json must be a JSON schema, got {value!r:.200}.") from error


def _refuse_absent(values: Mapping[str, Any]) -> None:
    for name in SAMPLING:
        if name in values:
            raise RequestError(
                f"{name} is a sampling parameter of vLLM that Octavo does not have: {SAMPLING[name]}.", name,
                "unsupported_field") from None


def _says_what_stands_in_place(cls: C) -> C:
    """Let the constructor name what it lacks and vLLM has; Python's own error would not say what to write."""
    made = cls.__init__

    @wraps(made)
    def checked(self: Any, **values: Any) -> None:
        try:
            made(self, **values)
        except TypeError:
            _refuse_absent(values)
            raise

    cls.__init__ = checked
    return cls


@_says_what_stands_in_place
@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; names and meanings as in vLLM and the OpenAI API.

    Args:
        n: continuations to return, 1 to 128.
        best_of: continuations to compute; the n with the highest cumulative logprob are returned. None means n.
        presence_penalty: -2 to 2, subtracted once for every token that the output already holds.
        frequency_penalty: -2 to 2, subtracted for every occurrence in the output.
        repetition_penalty: 0.001 to 1000; logits of tokens in prompt or output are divided (positive) or multiplied
            (negative) by it.
        temperature: 0 to 1e6; 0 (and anything below 1e-5) is greedy, ties go to the lowest token id.
        top_p: (0, 1], nucleus mass. top_k: -1 or 0 switch it off, else >= 1. min_p: [0, 1], relative to the best token.
        seed: 0 to 2**64 - 1 (negative values are refused); None draws one from the engine's seed.
        stop: strings that end a continuation, at most 16 of at most 256 characters, none empty.
        stop_token_ids: ids that end it. ignore_eos: go on after the model's end token.
        include_stop_str_in_output: keep the stop string in the text.
        max_tokens: >= 1, or None for all that fits. min_tokens: no end token or stop token before so many.
        logprobs: None, or how many top alternatives per generated token (0: only the sampled one).
        prompt_logprobs: the same for prompt tokens.
        detokenize: False returns ids only (then stop strings are refused).
        skip_special_tokens, spaces_between_special_tokens: how ids become text.
        logit_bias: token id -> -100 to 100. allowed_token_ids: only these may be sampled.
        bad_words: strings that may not be generated.
        logits_processors: callables (output ids, logits [vocab]) -> logits; offline only.
        use_beam_search: width best_of (or n); needs temperature 0. length_penalty: -5 to 5, exponent of the length in the
            score.
        early_stopping: True, False or "never", as in Hugging Face's generate.
        structured_outputs: what the output has to look like. A grammar decides before others: bad_words, allowed_token_ids,
            min_tokens and ignore_eos hold as long as they leave it a token to go on with.

    Raises:
        RequestError: a value is out of range; the message names field and value, ``param`` the field. Or a name is of vLLM's
            and not Octavo's; the message says what stands in its place.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] = ()
    logits_processors: Sequence[LogitsProcessor] = ()
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    structured_outputs: StructuredOutputsParams | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__  # the one place where a frozen value is normalised: before anybody sees it
        if isinstance(self.stop, str):
            set_(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids", "bad_words", "logits_processors"):
            set_(self, name, _tuple(name, getattr(self, name)))
        if self.allowed_token_ids is not None:
            set_(self, "allowed_token_ids", _tuple("allowed_token_ids", self.allowed_token_ids))
        for name in NUMBERS:  # numpy's numbers are fine, and what travels on is Python's own
            if hasattr(getattr(self, name), "item"):
                set_(self, name, getattr(self, name).item())
        _check_numbers(self)
        if isinstance(self.logit_bias, Mapping):
            set_(self, "logit_bias", dict(self.logit_bias))
        if self.temperature < GREEDY_BELOW:
            set_(self, "temperature", 0.0)
        _check_lists(self)
        _check_together(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SamplingParams":
        """Build from a mapping; an unknown name is a RequestError that names it."""
        _refuse_absent(values)
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known:
                raise RequestError(f"{name} is not a sampling parameter.", name, "unsupported_field")
        return cls(**values)

    @property
    def width(self) -> int:
        """Sequences computed for the request: best_of where given, else n."""
        return self.n if self.best_of is None else self.best_of

    @property
    def greedy(self) -> bool:
        """True when the most likely token is always taken."""
        return self.temperature == 0.0

    def clone(self, **changes: Any) -> "SamplingParams":
        """A copy with other values, checked again."""
        return replace(self, **changes)


def _tuple(name: str, value: Any, param: str | None = None) -> tuple[Any, ...]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence | set | frozenset):
        raise RequestError(f"{name} must be a list, got {value!r:.200}.", param or name)
    return tuple(value)


def _integer(name: str, value: Any, low: int, high: int | None, hint: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise RequestError(f"{name} must be {hint}, got {value!r:.200}.", name)


def _number(name: str, value: Any, hint: str, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and _finite(value)
    if not good or value < low or value > high or (open_low and value == low):
        raise RequestError(f"{name} must be {hint}, got {value!r:.200}.", name)


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an int that no float holds
        return False


def _check_numbers(p: SamplingParams) -> None:
    _integer("n", p.n, 1, MAX_N, f"an integer from 1 to {MAX_N}")
    if p.best_of is not None:
        _integer("best_of", p.best_of, 1, MAX_N, f"an integer from 1 to {MAX_N}")
    for name in ("presence_penalty", "frequency_penalty"):
        _number(name, getattr(p, name), "in [-2, 2]", -2.0, 2.0)
    low, high = REPETITION_RANGE
    _number("repetition_penalty", p.repetition_penalty, f"in [{low}, {high}]", low, high)
    _number("temperature", p.temperature, f"in [0, {MAX_TEMPERATURE:g}]", 0.0, MAX_TEMPERATURE)
    _number("top_p", p.top_p, "in (0, 1]", 0.0, 1.0, open_low=True)
    _integer("top_k", p.top_k, -1, 2**31 - 1, "-1 (disable) or a positive integer")
    _number("min_p", p.min_p, "in [0, 1]", 0.0, 1.0)
    bound = MAX_LENGTH_PENALTY
    _number("length_penalty", p.length_penalty, f"in [{-bound:g}, {bound:g}]", -bound, bound)
    if p.seed is not None:
        _integer("seed", p.seed, 0, MAX_SEED, "an integer from 0 to 2**64 - 1")
    if p.max_tokens is not None:
        _integer("max_tokens", p.max_tokens, 1, 2**31 - 1, "a positive integer or None")
    _integer("min_tokens", p.min_tokens, 0, 2**31 - 1, "a non-negative integer")
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(p, name) is not None:
            _integer(name, getattr(p, name), 0, 2**31 - 1, "a non-negative integer or None")
    for name in ("ignore_eos", "include_stop_str_in_output", "detokenize", "skip_special_tokens",
                 "spaces_between_special_tokens", "use_beam_search"):
        if not isinstance(getattr(p, name), bool):
            raise RequestError(f"{name} must be true or false, got {getattr(p, name)!r:.200}.", name)
    if not (isinstance(p.early_stopping, bool) or p.early_stopping == "never"):
        raise RequestError(f'early_stopping must be true, false or "never", got {p.early_stopping!r:.200}.', "early_stopping")
    if not isinstance(p.structured_outputs, StructuredOutputsParams | None):
        raise _unstructured(f"structured_outputs must be StructuredOutputsParams, got {p.structured_outputs!r:.200}.")


def _check_lists(p: SamplingParams) -> None:
    if len(p.stop) > MAX_STOP:
        raise RequestError(f"stop must hold at most {MAX_STOP} strings, got {len(p.stop)}.", "stop")
    for name in ("stop", "bad_words"):
        for word in getattr(p, name):
            if not isinstance(word, str) or not word or len(word) > MAX_STOP_CHARS:
                raise RequestError(
                    f"{name} must hold strings of 1 to {MAX_STOP_CHARS} characters, got {word!r:.200}.", name)
    for name in ("stop_token_ids", "allowed_token_ids"):
        for token in getattr(p, name) or ():
            _integer(name, token, 0, 2**31 - 1, "a list of token ids")
    if len(p.bad_words) > MAX_BIAS:
        raise RequestError(f"bad_words must hold at most {MAX_BIAS} strings, got {len(p.bad_words)}.", "bad_words")
    if p.allowed_token_ids is not None and not p.allowed_token_ids:
        raise RequestError("allowed_token_ids must not be empty, got [].", "allowed_token_ids")
    if not isinstance(p.logit_bias, Mapping):
        raise RequestError(f"logit_bias must be a mapping, got {p.logit_bias!r:.200}.", "logit_bias")
    if len(p.logit_bias) > MAX_BIAS:
        raise RequestError(f"logit_bias must hold at most {MAX_BIAS} entries, got {len(p.logit_bias)}.", "logit_bias")
    for token, bias in p.logit_bias.items():
        _integer("logit_bias", token, 0, 2**31 - 1, "keyed by token ids")
        _number("logit_bias", bias, "in [-100, 100]", -100.0, 100.0)
    for processor in p.logits_processors:
        if not callable(processor):
            raise RequestError(f"logits_processors must hold callables, got {processor!r:.200}.", "logits_processors")


def _check_together(p: SamplingParams) -> None:
    if p.best_of is not None and p.best_of < p.n:
        raise RequestError(f"best_of must be at least n, got best_of={p.best_of} and n={p.n}.", "best_of")
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        raise RequestError(
            f"min_tokens must be at most max_tokens, got min_tokens={p.min_tokens} and max_tokens={p.max_tokens}.", "min_tokens")
    if p.stop and not p.detokenize:
        raise RequestError(f"stop needs detokenize, got stop={list(p.stop)!r:.200} and detokenize=False.", "stop")
    if p.use_beam_search:
        _check_beam(p)
    elif p.greedy and p.best_of is not None and p.best_of > 1 and p.best_of != p.n:
        raise RequestError(f"best_of beyond n needs a temperature above 0, got {p.best_of}.", "best_of")


def _check_beam(p: SamplingParams) -> None:
    if p.width < 2:
        raise RequestError(f"best_of (or n) must be at least 2 with beam search, got {p.width}.", "best_of")
    wanted = {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
              "repetition_penalty": 1.0, "logprobs": None, "min_tokens": 0}
    for name, value in wanted.items():
        if getattr(p, name) != value:
            raise RequestError(f"{name} must be {value} with beam search, got {getattr(p, name)}.", name)
    if p.top_k > 0:
        raise RequestError(f"top_k must be -1 with beam search, got {p.top_k}.", "top_k")
    for name in ("logits_processors", "logit_bias", "bad_words", "allowed_token_ids", "stop", "structured_outputs"):
        if getattr(p, name):
            raise RequestError(f"{name} cannot be combined with beam search, got {getattr(p, name)!r:.200}.", name)
