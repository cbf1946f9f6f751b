"""Command-line flags: those of SamplingParams, and how the engine's are shown in a command's help.

Owns how a sampling field is spelt on the command line and the groups of --help; ranges stay in SamplingParams and
EngineConfig, and flags that only vLLM has in absent.py. Invariant: only sampling flags that were given appear among the
changes, so the model's own defaults (generation_config.json) hold for all others.
"""

import argparse
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from octavo.absent import REFUSED as ELSEWHERE
from octavo.config import EngineConfig, human_int, json_object
from octavo.errors import ModelError, RequestError
from octavo.params import SamplingParams, StructuredOutputsParams

# Options of which this version accepts only the default; they exist so that a wish for them is refused by name.
REFUSED = frozenset({"--trust-remote-code", "--quantization", "--tensor-parallel-size", "--pipeline-parallel-size"})

# Fields that make no sense where one answer is streamed to a person.
NOT_IN_CHAT = frozenset({"n", "best_of", "use_beam_search", "length_penalty", "early_stopping", "logprobs",
                         "prompt_logprobs", "detokenize"})


@dataclass(frozen=True)
class _Flag:
    """How one field is read: a value of ``kind``, a switch (``bool``), or a flag that may be repeated (``many``)."""

    help: str
    kind: Callable[[str], Any]
    many: bool = False


def _early_stopping(text: str) -> bool | str:
    return {"true": True, "false": False}.get(text.lower(), text)


def _bias(text: str) -> dict[int, float]:
    """{"id": bias} as JSON; JSON keys are strings, the ids inside them are read here."""
    try:
        return {int(token): bias for token, bias in json_object(text).items()}
    except ValueError:
        raise argparse.ArgumentTypeError(f"must have token ids as keys, got {text!r:.200}") from None


def _structured(text: str) -> StructuredOutputsParams:
    try:
        return StructuredOutputsParams.from_dict(json_object(text))
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


FLAGS: Mapping[str, _Flag] = {
    "n": _Flag("continuations per prompt", int),
    "best_of": _Flag("continuations to compute, of which the n best are kept", int),
    "presence_penalty": _Flag("-2 to 2, once per token that the output holds", float),
    "frequency_penalty": _Flag("-2 to 2, for every occurrence in the output", float),
    "repetition_penalty": _Flag("above 1: tokens of prompt and output become less likely", float),
    "temperature": _Flag("0 is greedy", float),
    "top_p": _Flag("nucleus mass, (0, 1]", float),
    "top_k": _Flag("most likely tokens to choose from; -1: all", int),
    "min_p": _Flag("least probability relative to the best token, [0, 1]", float),
    "stop": _Flag("string that ends a continuation", str, many=True),
    "stop_token_ids": _Flag("token id that ends a continuation", int, many=True),
    "ignore_eos": _Flag("go on after the model's end token", bool),
    "include_stop_str_in_output": _Flag("keep the stop string in the text", bool),
    "max_tokens": _Flag("most tokens per continuation; default: all that fits", human_int),
    "min_tokens": _Flag("no end before so many tokens", int),
    "logprobs": _Flag("top alternatives to report per token; 0: the sampled one only", int),
    "prompt_logprobs": _Flag("the same for prompt tokens", int),
    "detokenize": _Flag("turn ids into text", bool),
    "skip_special_tokens": _Flag("leave special tokens out of the text", bool),
    "spaces_between_special_tokens": _Flag("put spaces between special tokens in the text", bool),
    "logit_bias": _Flag('JSON {"token id": bias}, bias from -100 to 100', _bias),
    "allowed_token_ids": _Flag("token id that may be sampled; others may not", int, many=True),
    "bad_words": _Flag("string that may not be generated", str, many=True),
    "use_beam_search": _Flag("beam search of width best_of (or n); needs --temperature 0", bool),
    "length_penalty": _Flag("exponent of the length in a beam's score", float),
    "early_stopping": _Flag("end of a beam search: true, false or never", _early_stopping),
    "structured_outputs": _Flag(
        'what the output looks like: JSON {"json": schema}, {"regex": ...}, {"choice": [...]}, ...', _structured),
}


class _EngineGroups:
    """Stands for the parser in EngineConfig.add_cli_args: the model stays in front, flags go into two groups."""

    def __init__(self, parser: argparse.ArgumentParser, optional: bool) -> None:
        self.parser = parser
        self.optional = optional
        self.engine = parser.add_argument_group("engine")
        self.refused = parser.add_argument_group("not supported yet (everything but the default is refused by name)")

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        """Add an option of the engine where it belongs."""
        if names[0] == "model" and self.optional:
            options["nargs"] = "?"
        if names[0] == "--model" and self.optional:
            options["required"] = False
        if names[0] in ("model", "--model"):
            return self.parser.add_argument(*names, **options)
        return (self.refused if names[0] in REFUSED else self.engine).add_argument(*names, **options)


def add_engine_args(parser: Any, *, model: str = "option", optional: bool = False) -> None:
    """Add a flag per field of EngineConfig, in groups of their own; call it last, so that they come last in --help.

    Flags of vLLM's that Octavo does not have are refused by name from now on.

    Args:
        parser: of the command. model: "option" or "positional". optional: the command can do without a model.
    """
    parser.elsewhere = ELSEWHERE
    groups: Any = _EngineGroups(parser, optional)
    EngineConfig.add_cli_args(groups, model=model)


def add_sampling_args(parser: argparse.ArgumentParser, without: frozenset[str] = frozenset()) -> None:
    """Add a flag per sampling field, less ``without``; ``--sampling-seed`` is a request's, --seed the engine's."""
    group = parser.add_argument_group("sampling (a flag that is not given leaves the model's own default)")
    given: dict[str, Any] = {"default": argparse.SUPPRESS}
    for name, flag in FLAGS.items():
        if name in without:
            continue
        spelt, dest = "--" + name.replace("_", "-"), "sampling_" + name
        if flag.kind is bool:
            group.add_argument(spelt, dest=dest, action=argparse.BooleanOptionalAction, help=flag.help, **given)
        else:
            action, more = ("append", " (may be repeated)") if flag.many else ("store", "")
            kind = flag.kind
            group.add_argument(spelt, dest=dest, type=kind, action=action, metavar=_metavar(kind),
                               help=flag.help + more, **given)
    group.add_argument("--sampling-seed", dest="sampling_seed", type=int, metavar="INT",
                       help="seed of every request; default: drawn from --seed", **given)


def _metavar(kind: Callable[[str], Any]) -> str:
    names: dict[Any, str] = {int: "INT", human_int: "INT", float: "NUMBER", str: "TEXT", _bias: "JSON", _structured: "JSON"}
    return names.get(kind, "VALUE")


def sampling_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling fields that the command line gave, by field name."""
    prefix = "sampling_"
    return {name.removeprefix(prefix): value for name, value in vars(args).items() if name.startswith(prefix)}


def with_changes(defaults: SamplingParams, changes: Mapping[str, Any]) -> SamplingParams:
    """The defaults with the command line's values; with beam search the model's own random choices do not count."""
    beam = changes.get("use_beam_search", False)
    if beam and "temperature" not in changes:
        raise RequestError("temperature must be 0 when using beam search: give --temperature 0.", "temperature")
    if beam:  # a model's own top_p or top_k is a default, not a wish: beam search has no use for it
        neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        changes = {**neutral, **changes}
    return defaults.clone(**changes)


def engine_options(config: EngineConfig) -> dict[str, Any]:
    """The config as keyword arguments of LLM."""
    return {f.name: getattr(config, f.name) for f in fields(config)}


def changed(args: argparse.Namespace, config: type[Any], names: Collection[str] | None = None) -> dict[str, Any]:
    """The fields of a config class whose flags the command line gave another value than the default; ``names``: of these."""
    found = {}
    for f in fields(config):
        default = f.default_factory() if f.default_factory is not MISSING else None if f.default is MISSING else f.default
        value = getattr(args, f.name, None)
        if (names is None or f.name in names) and value not in (default, None):
            found[f.name] = value
    return found


def words_of(changes: Mapping[str, Any]) -> list[str]:
    """Fields as the words of a command line that ``add_flag`` reads back."""
    words: list[str] = []
    for name, value in changes.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list | tuple):
            words += [word for item in value for word in (f"--{flag}", str(item))]
        else:
            words.append(f"--{flag}={json.dumps(value) if isinstance(value, Mapping) else value}")
    return words


def with_hint(error: ModelError, config: EngineConfig) -> ModelError:
    """The error; for a folder with config.json that lacks the rest, with the flags that do without, unless it names them."""
    folder = Path(config.model).expanduser()
    if not (folder / "config.json").is_file() or "skip_tokenizer_init" in str(error) or "load_format" in str(error):
        return error
    flags = []
    if config.load_format != "dummy" and not _holds(folder, "*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf"):
        flags.append("--load-format dummy (weights are made up)")
    bare = not _holds(folder, "tokenizer*", "vocab.json", "*.gguf")
    if bare and not config.skip_tokenizer_init and config.tokenizer is None:
        flags.append('--skip-tokenizer-init (prompts are then {"prompt_token_ids": [...]}, one per line of --input)')
    return ModelError(f"{error} To do without: {' and '.join(flags)}.", error.param) if flags else error


def _holds(folder: Path, *patterns: str) -> bool:
    return any(True for pattern in patterns for _ in folder.glob(pattern))
