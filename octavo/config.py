"""EngineConfig: every option of the engine, frozen, validated once; CLI flags and docs are generated from its fields.

Owns names, defaults and ranges that need no model and no device; what depends on those (fitted model length, number of
blocks, dtype under "auto") is computed later and returned, never written back. Invariant: an EngineConfig that exists
holds values that are each legal, and an option we cannot honour has been refused by name.
"""

import argparse
import json
import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from typing import Any

from octavo.absent import option_instead
from octavo.errors import ConfigError

DTYPES = ("auto", "half", "float16", "bfloat16", "float", "float32")
KV_DTYPES = ("auto", "bfloat16", "float16", "float32", "fp8", "fp8_e4m3")
LOAD_FORMATS = ("auto", "safetensors", "pt", "gguf", "dummy")
BLOCK_SIZES = (8, 16, 32, 64, 128)
POLICIES = ("fcfs", "priority", "sjf")
ENVIRONMENT = ("OCTAVO_API_KEY", "OCTAVO_CACHE", "OCTAVO_CUDA_ARCHS", "OCTAVO_LOGGING_LEVEL")


def option(default: Any, help: str, *, choices: tuple[Any, ...] = (), flag: str = "", kind: Any = None) -> Any:
    """A config field with what its CLI flag needs: help, choices, short flag, kind of the value ("int", "json", "list")."""
    metadata = {"help": help, "choices": choices, "flag": flag, "kind": kind}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def human_int(text: str) -> int:
    """Parse 4096, 32k (1000s) or 32K (1024s), m/M and g/G likewise; argparse's error on anything else."""
    scale = {"k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}.get(text[-1:])
    try:
        return int(text) if scale is None else int(float(text[:-1]) * scale)
    except (ValueError, OverflowError):  # int() of nan, and of an infinity
        expected = "a whole number, or one such as 32k (times 1000) or 32K (times 1024)"
        raise argparse.ArgumentTypeError(f"must be {expected}, got {text!r:.200}") from None


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object; argparse's error on anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'must be a JSON object such as {{"key": 1}}, got {text!r:.200}')
    return found


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Options of one engine. ``EngineArgs`` is the same class under vLLM's name.

    Raises:
        ConfigError: a value is not legal, or not supported yet; the message names the option and the value.
    """

    model: str = field(metadata={"help": "local folder, GGUF file, hub id, or smollm2", "choices": (), "flag": "", "kind": None})
    tokenizer: str | None = option(None, "folder or hub id of the tokenizer; default: the model's")
    skip_tokenizer_init: bool = option(False, "token ids in and out, no tokenizer is loaded")
    revision: str | None = option(None, "branch, tag or commit of the hub repository")
    download_dir: str | None = option(None, "folder for hub downloads; default: the hub's own cache")
    trust_remote_code: bool = option(False, "refused: Octavo never runs code from a checkpoint")
    hf_overrides: Mapping[str, Any] = option({}, "values that replace entries of config.json", kind="json")
    load_format: str = option("auto", "where weights come from", choices=LOAD_FORMATS)
    dtype: str = option("auto", "type of weights and KV cache", choices=DTYPES)
    kv_cache_dtype: str = option(
        "auto", "type of the KV cache; auto: as the weights; fp8 (e4m3) on a GPU only", choices=KV_DTYPES)
    quantization: str | None = option(None, "refused until quantised kernels exist")
    device: str = option("auto", "where the model runs", choices=("auto", "cpu", "cuda"))
    seed: int = option(0, "root of the seeds of requests that bring none")
    max_model_len: int | None = option(
        None, "longest prompt + output in tokens; default: the model's, fitted to the KV pool", kind="int")
    block_size: int = option(16, "tokens of a KV block", choices=BLOCK_SIZES)
    gpu_memory_utilization: float = option(0.9, "share of the device's memory that weights, KV cache and workspace may take")
    kv_cache_memory_bytes: int | None = option(None, "size of the KV pool; overrides gpu_memory_utilization", kind="int")
    num_gpu_blocks_override: int | None = option(None, "number of KV blocks; overrides everything else", kind="int")
    swap_space: float = option(4.0, "GiB of host memory for swapped requests and evicted prefixes")
    enable_prefix_caching: bool = option(True, "reuse the KV of prompts that begin alike")
    max_num_seqs: int | None = option(None, "sequences that run at once; default 64 on a CPU, 1024 offline on a GPU", kind="int")
    max_num_batched_tokens: int | None = option(
        None, "tokens of one step; default 2048 on a CPU, 16384 offline on a GPU", kind="int")
    enable_chunked_prefill: bool = option(True, "compute long prompts in pieces between decodes")
    long_prefill_token_threshold: int = option(
        0, "most prompt tokens of one request in one step; 0: the step's budget", kind="int")
    scheduling_policy: str = option("fcfs", "order of the waiting queue", choices=POLICIES)
    preemption_mode: str = option(
        "auto", "what happens to a request that must give up its blocks", choices=("auto", "recompute", "swap"))
    async_scheduling: bool | None = option(None, "plan a step before the last one's tokens are known; default: on a GPU")
    enforce_eager: bool = option(False, "no CUDA graphs: launch every kernel by itself (nothing to switch off on a CPU)")
    batch_invariant: bool = option(False, "bit-identical answers whatever else runs; on a CPU only so far")
    tensor_parallel_size: int = option(1, "GPUs that share each layer; more than 1 is refused until it exists", flag="-tp")
    pipeline_parallel_size: int = option(1, "groups of layers; more than 1 is refused until it exists", flag="-pp")
    generation_config: str = option(
        "auto", "auto: sampling defaults from the model; vllm or octavo: none of them", choices=("auto", "vllm", "octavo"))
    override_generation_config: Mapping[str, Any] = option({}, "sampling defaults that win over the model's", kind="json")
    chat_template: str | None = option(None, "file or text of a chat template that replaces the model's")
    max_logprobs: int = option(20, "most top alternatives that a request may ask for")
    logprobs_mode: str = option(
        "raw_logprobs", "distribution that logprobs describe", choices=("raw_logprobs", "processed_logprobs"))
    disable_log_stats: bool = option(False, "no line of statistics every 10 s")
    debug_checksums: bool = option(False, "compare checksums of host and device rows in every step")

    def __post_init__(self) -> None:
        for f in fields(self):
            check_field(f, getattr(self, f.name))
        _check_ranges(self)
        _check_refused(self)

    def replace(self, **changes: Any) -> "EngineConfig":
        """A copy with other values, validated again."""
        return replace(self, **changes)

    @classmethod
    def from_kwargs(cls, **values: Any) -> "EngineConfig":
        """Build from keyword arguments; also takes torch's dtypes, and None for the default seed, as vLLM does.

        An unknown name is a ConfigError that says what stands in its place, or what name is nearest.
        """
        known = {f.name for f in fields(cls)}
        for name in values:
            if name not in known and (instead := option_instead(name)):
                raise ConfigError(f"{name} is an option of vLLM that Octavo does not have: {instead}.", name)
            if name not in known:
                raise ConfigError(f"unknown option {name!r}{nearest(name, known)}.", name)
        if values.get("seed", 0) is None:
            del values["seed"]
        if type(values.get("dtype")).__module__ == "torch":
            values["dtype"] = str(values["dtype"]).removeprefix("torch.")
        return cls(**values)

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser, *, model: str = "option") -> argparse.ArgumentParser:
        """Add a flag per field. ``model``: "option" for ``--model``, "positional" for a positional argument."""
        for f in fields(cls):
            add_flag(parser, f, model)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> "EngineConfig":
        """Build from the namespace of a parser that ``add_cli_args`` filled; other names in it are left alone."""
        return cls(**{f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)})


def nearest(name: str, known: set[str]) -> str:
    """" (did you mean X?)" for a misspelt name, else ""."""
    import difflib

    short = {other.removeprefix("OCTAVO_"): other for other in known}  # what all variables share says nothing
    match = difflib.get_close_matches(name.removeprefix("OCTAVO_"), short, 1)
    return f" (did you mean {short[match[0]]}?)" if match else ""


def unknown_environment(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Names of OCTAVO_* variables that nothing reads: most likely misspelt, so callers warn about them."""
    return sorted(name for name in environ if name.startswith("OCTAVO_") and name not in ENVIRONMENT)


def check_field(f: "Field[Any]", value: Any) -> None:
    """ConfigError unless a value has the declared type of its field and is among the choices."""
    declared = str(f.type)
    if value is None and "None" in declared:
        return
    expected: dict[str, tuple[type, ...]] = {
        "tuple": (tuple,), "Mapping": (Mapping,), "bool": (bool,), "int": (int,), "float": (int, float),
        "str": (str, os.PathLike)}
    kinds = next(kinds for key, kinds in expected.items() if key in declared.replace("<class '", ""))
    wrong_bool = isinstance(value, bool) and bool not in kinds
    if not isinstance(value, kinds) or wrong_bool or (isinstance(value, float) and not math.isfinite(value)):
        raise ConfigError(f"{f.name} must be of type {getattr(f.type, '__name__', declared)}, got {value!r}.", f.name)
    choices = f.metadata["choices"]
    if choices and value not in choices:
        listed = ", ".join(map(str, choices))
        raise ConfigError(f"{f.name} must be one of {listed}, got {value!r}.", f.name)


def _check_ranges(c: EngineConfig) -> None:
    def need(name: str, good: bool, hint: str) -> None:
        if not good:
            raise ConfigError(f"{name} must be {hint}, got {getattr(c, name)!r}.", name)

    need("model", bool(str(c.model)), "a folder, a file or a name")
    need("seed", 0 <= c.seed < 2**64, "from 0 to 2**64 - 1")
    need("gpu_memory_utilization", 0.0 < c.gpu_memory_utilization <= 1.0, "in (0, 1]")
    need("swap_space", 0.0 <= c.swap_space < 2**20, "a number of GiB, 0 or more")
    for name in ("max_model_len", "kv_cache_memory_bytes", "num_gpu_blocks_override", "max_num_seqs", "max_num_batched_tokens",
                 "tensor_parallel_size", "pipeline_parallel_size"):
        need(name, getattr(c, name) is None or getattr(c, name) >= 1, "at least 1")
    for name in ("long_prefill_token_threshold", "max_logprobs"):
        need(name, getattr(c, name) >= 0, "0 or more")
    if c.max_num_seqs is not None and c.max_num_batched_tokens is not None and c.max_num_batched_tokens < c.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({c.max_num_batched_tokens}) must be at least max_num_seqs ({c.max_num_seqs}): "
            "every running sequence computes a token in a step.", "max_num_batched_tokens")


def _check_refused(c: EngineConfig) -> None:
    if c.long_prefill_token_threshold and not c.enable_chunked_prefill:
        raise ConfigError(
            f"long_prefill_token_threshold ({c.long_prefill_token_threshold}) needs enable_chunked_prefill, which is off.",
            "long_prefill_token_threshold")
    if c.tokenizer is not None and c.skip_tokenizer_init:
        raise ConfigError(f"tokenizer {c.tokenizer!r} is given, but skip_tokenizer_init loads none.", "tokenizer")
    if c.trust_remote_code:
        raise ConfigError("trust_remote_code is refused: Octavo never runs code from a checkpoint.", "trust_remote_code")
    if c.quantization is not None:
        raise ConfigError(f"quantization {c.quantization!r} is not supported yet.", "quantization")
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(c, name) > 1:
            raise ConfigError(f"{name} greater than 1 is not supported yet, got {getattr(c, name)}.", name)


def add_flag(parser: argparse.ArgumentParser, f: "Field[Any]", model: str = "") -> None:
    """Add the flag of a field to a parser; ``model``: see ``EngineConfig.add_cli_args``."""
    meta, flag = f.metadata, "--" + f.name.replace("_", "-")
    default = None if f.default is MISSING else f.default
    if f.name == "model" and model == "positional":
        parser.add_argument("model", help=meta["help"])
    elif f.name == "model":
        parser.add_argument(flag, required=True, help=meta["help"])
    elif "bool" in str(f.type):
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=default, help=meta["help"])
    elif meta["kind"] == "list":
        parser.add_argument(flag, nargs="+", action="extend", default=None, help=meta["help"])
    elif meta["kind"] == "json":
        parser.add_argument(flag, type=json_object, default={}, metavar="JSON", help=meta["help"])
    else:
        kinds = {"int": int, "float": float, "str": str}
        kind = human_int if meta["kind"] == "int" else next(k for key, k in kinds.items() if key in str(f.type))
        names = [flag, *([meta["flag"]] if meta["flag"] else [])]
        parser.add_argument(*names, type=kind, default=default, choices=meta["choices"] or None, help=meta["help"])


EngineArgs = EngineConfig
