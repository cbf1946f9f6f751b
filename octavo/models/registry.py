"""Registry: the architecture string of a config.json -> the family module that understands it.

Owns the list of architectures and the checks that hold for every family's spec. It does not know what a family does,
and loads only the module of the family that is asked for. Invariant: what ``spec`` returns is a network that the
decoder can build; everything else was refused by a ModelError that names the entry of the config.
"""

import importlib
import math
import re
from typing import Any, Protocol, cast

from octavo.errors import ModelError
from octavo.models.names import Name
from octavo.models.spec import DecoderSpec

FAMILIES: dict[str, str] = {
    "GPT2LMHeadModel": "gpt2",
    "GPTNeoXForCausalLM": "neox",
    "Gemma2ForCausalLM": "gemma",
    "Gemma3ForCausalLM": "gemma",
    "Gemma3ForConditionalGeneration": "gemma",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "OPTForCausalLM": "opt",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen",
    "Qwen3ForCausalLM": "qwen",
    "SmolLM3ForCausalLM": "smollm3",
}
# Kinds of networks that do not exist here yet: what the name of an architecture says of them, and entries of a config that do.
ABSENT = (
    ("a mixture of experts", re.compile("moe|mixtral|experts", re.IGNORECASE),
     ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")),
    ("a draft for speculative decoding", re.compile("eagle|medusa|speculator|drafter|mtp", re.IGNORECASE),
     ("speculators_config", "speculators_model_type")),
)


class Family(Protocol):
    """What a family module offers."""

    ARCHITECTURES: tuple[str, ...]
    NAMES: tuple[Name, ...]
    IGNORED: tuple[str, ...]

    def spec(self, config: dict[str, Any]) -> DecoderSpec:
        """The network that a config.json describes."""


def architecture_of(config: dict[str, Any]) -> str:
    """The architecture that a config names; ModelError if it names none that is known."""
    named = config.get("architectures")
    if not isinstance(named, list) or not named or not all(isinstance(n, str) for n in named):
        raise ModelError(f"config.json must name the model in 'architectures', got {named!r}.", "architectures")
    for name in named:
        if name in FAMILIES:
            return str(name)
    words = ", ".join(named)
    for kind, names, entries in ABSENT:
        if any(names.search(name) for name in named) or any(config.get(entry) for entry in entries):
            raise ModelError(f"architecture {words} is {kind}, which does not exist in Octavo yet.", "architectures")
    known = ", ".join(sorted(FAMILIES))
    raise ModelError(f"architecture {words} is not known; known are {known}.", "architectures")


def family_of(config: dict[str, Any]) -> Family:
    """The module of the family, imported now; ModelError for an architecture that is not known."""
    return cast(Family, importlib.import_module(f"octavo.models.{FAMILIES[architecture_of(config)]}"))


def spec(config: dict[str, Any]) -> DecoderSpec:
    """The network that a config describes; ModelError for what is unknown, missing, of a wrong type or impossible."""
    architecture = architecture_of(config)
    for entry in ("quantization_config", "compression_config"):  # the second is an older name that compressed-tensors wrote
        if quantised := config.get(entry):
            method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
            text = f"the checkpoint is quantised ({method}); only plain weights and GGUF are supported."
            raise ModelError(text, entry)
    if "speculators_config" in config:
        text = f"architecture {architecture} with speculators_config is {ABSENT[1][0]}, which does not exist in Octavo yet."
        raise ModelError(text, "speculators_config")
    try:
        found = family_of(config).spec(config)
    except KeyError as error:
        raise ModelError(f"config of {architecture} lacks {error}.", str(error.args[0])) from error
    except (TypeError, ValueError, ArithmeticError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"config of {architecture} cannot be understood: {error}.") from error
    _check(found, architecture)
    return found


def _check(s: DecoderSpec, architecture: str) -> None:
    """What every decoder needs, whatever its family."""

    def need(good: bool, text: str) -> None:
        if not good:
            raise ModelError(f"config of {architecture} is not possible: {text}.")

    for size in ("vocab_size", "hidden", "num_heads", "num_kv_heads", "head_dim", "intermediate", "max_len"):
        # The upper bound is far beyond any network and keeps a mistyped config from asking for terabytes.
        need(type(getattr(s, size)) is int and 0 < getattr(s, size) < 2**28, f"{size} is {getattr(s, size)!r}")
    need(len(s.layers) > 0, "it has no layers")
    for size in ("positions", "embedding_dim"):
        need(0 <= getattr(s, size) < 2**28, f"{size} is {getattr(s, size)!r}")
    epsilon = "the norms' epsilon (rms_norm_eps, layer_norm_eps or layer_norm_epsilon)"
    need(0 <= s.norm_eps < 1, f"{epsilon} is {s.norm_eps!r}")
    need(s.num_heads % s.num_kv_heads == 0, f"{s.num_heads} heads cannot share {s.num_kv_heads} key-value heads")
    need(s.embedding_rows >= s.vocab_size, f"{s.vocab_size} tokens do not fit {s.embedding_rows} embedding rows")
    for layer in s.layers:
        need(0 <= layer.window < 2**31, f"a window is {layer.window}")
        need(layer.rope is None or 0 <= layer.rope < len(s.ropes), "a layer points at a rope table that is not there")
    for rope in s.ropes:
        even = rope.rotary_dim % 2 == 0
        need(even and 0 < rope.rotary_dim <= s.head_dim, f"{rope.rotary_dim} of {s.head_dim} dims rotate")
        need(math.isfinite(rope.base) and rope.base > 0, f"the rope base (rope_theta) is {rope.base!r}")
        need(math.isfinite(rope.factor) and rope.factor > 0, f"the rope factor is {rope.factor!r}")
        stretched = rope.scaling not in ("none", "linear")
        length = rope.original_max_len
        need(0 <= length < 2**31 and (length > 0 or not stretched), f"the rope's original length is {length}")
        low, high = rope.low_freq_factor, rope.high_freq_factor
        need(0 < low < high, f"the rope's low_freq_factor is {low!r} and its high_freq_factor {high!r}")
        need(rope.beta_fast > 0 and rope.beta_slow > 0, f"the rope's betas are {rope.beta_fast!r} and {rope.beta_slow!r}")
