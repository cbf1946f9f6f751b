"""GGUF config: the metadata of a GGUF file as the config.json that its Hugging Face original has.

Owns the keys of GGUF and what llama.cpp takes for granted where the file says nothing. It does not know tensors beyond
their names and shapes, except for the rotary factors that GGUF stores as tensors. Invariant: a value of the metadata
that would change the network and that we cannot honour is a ModelError that names the key.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from octavo.errors import ModelError
from octavo.models.gguf import GgufFile

Config = dict[str, Any]


def config_of(file: GgufFile) -> Config:
    """The config that the family of the file's architecture reads; ModelError if it is unknown or incomplete."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        supported = ", ".join(sorted(_ARCHITECTURES))
        raise ModelError(
            f"{file.path}: GGUF architecture {name!r} is not supported; supported are {supported}.", "architectures"
        )
    parts = file.metadata.get("split.count", 1)
    if type(parts) is int and parts > 1:
        text = "is one part of a split GGUF file; merge the parts first (llama-gguf-split --merge)"
        raise ModelError(f"{file.path} {text}.", "model")
    architecture, make = _ARCHITECTURES[name]
    keys = _Keys(file, name)
    if keys.integer("expert_count", 0):
        raise keys.error("expert_count", f"is {keys.integer('expert_count')}, experts are not supported")
    # A file of nothing but float32 is meant to be computed so; everything else has been rounded already.
    stored = {"torch_dtype": "float32"} if {t.type for t in file.tensors.values()} == {"F32"} else {}
    return {"architectures": [architecture], **stored, **make(keys), **_tokens(file.metadata)}


class _Keys:
    """Typed access to the keys of one architecture."""

    def __init__(self, file: GgufFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture

    def has(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.file.metadata

    def error(self, key: str, text: str) -> ModelError:
        return ModelError(f"{self.file.path}: the metadata key {self.architecture}.{key} {text}.", "model")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.file.metadata.get(f"{self.architecture}.{key}", default)
        if value is None:
            raise self.error(key, "is missing")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()  # one entry per layer, all alike
        if type(value) is not int:
            raise self.error(key, f"must be one integer, got {value!r}")
        return value

    def layers(self) -> int:
        """Number of layers; each has tensors, so a file cannot claim more layers than tensors."""
        count = self.integer("block_count")
        if not 1 <= count <= len(self.file.tensors):
            raise self.error("block_count", f"is {count}, the file has {len(self.file.tensors)} tensors")
        return count

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if type(value) not in (int, float):
            raise self.error(key, f"must be a number, got {value!r}")
        # Stored as float32: its shortest decimal is the number that the original config says (1e-05, not 9.99...e-06).
        return float(str(np.float32(value)))

    def text(self, key: str, default: str) -> str:
        value = self.get(key, default)
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, got {value!r}")
        return value

    def tensor(self, name: str) -> bool:
        return name in self.file.tensors

    def rows(self, name: str) -> int:
        if name not in self.file.tensors:
            raise ModelError(f"{self.file.path}: the tensor {name!r} is missing.", "model")
        return self.file.tensors[name].shape[0]


def _tokens(metadata: Config) -> Config:
    """Ids of the tokens that begin and end a text; a chat's end of turn ends it too."""
    found: Config = {}
    ends = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    ends = [e for e in dict.fromkeys(ends) if type(e) is int]
    if ends:
        found["eos_token_id"] = ends[0] if len(ends) == 1 else ends
    for key in ("bos", "pad"):
        value = metadata.get(f"tokenizer.ggml.{'padding' if key == 'pad' else key}_token_id")
        if type(value) is int:
            found[f"{key}_token_id"] = value
    return found


def _common(k: _Keys) -> Config:
    """What every network with RMS norms and rotary positions has."""
    heads = k.integer("attention.head_count")
    hidden = k.integer("embedding_length")
    if heads < 1:
        raise k.error("attention.head_count", f"must be at least 1, got {heads}")
    config: Config = {
        "vocab_size": k.rows("token_embd.weight"),
        "hidden_size": hidden,
        "intermediate_size": k.integer("feed_forward_length"),
        "num_hidden_layers": k.layers(),
        "num_attention_heads": heads,
        "num_key_value_heads": k.integer("attention.head_count_kv", heads),
        "head_dim": k.integer("attention.key_length", hidden // heads),
        "max_position_embeddings": k.integer("context_length"),
        "rms_norm_eps": k.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": k.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": not k.tensor("output.weight"),
    }
    if k.integer("attention.value_length", config["head_dim"]) != config["head_dim"]:
        raise k.error("attention.value_length", f"differs from the key length {config['head_dim']}")
    if scaling := _rope_scaling(k, config):
        config["rope_scaling"] = scaling
    return config


def _whole_rotation(k: _Keys, config: Config) -> Config:
    if k.integer("rope.dimension_count", config["head_dim"]) != config["head_dim"]:
        raise k.error("rope.dimension_count", f"must be the head size {config['head_dim']} in this architecture")
    return config


def _factors(k: _Keys, name: str) -> list[float]:
    return [float(v) for v in k.file.floats(name)]


def _rope_scaling(k: _Keys, config: Config) -> Config | None:
    """rope_scaling of the config, from keys or from the tensors that hold a divisor per frequency."""
    length = config["max_position_embeddings"]
    if k.tensor("rope_factors_long.weight") or k.tensor("rope_factors_short.weight"):
        names = {"long_factor": "rope_factors_long.weight", "short_factor": "rope_factors_short.weight"}
        for name in names.values():
            k.rows(name)
        original = k.integer("rope.scaling.original_context_length")
        found: Config = {"rope_type": "longrope", "original_max_position_embeddings": original}
        if k.has("rope.scaling.attn_factor"):
            found["attention_factor"] = k.number("rope.scaling.attn_factor")
        return found | {key: _factors(k, name) for key, name in names.items()}
    if k.tensor("rope_freqs.weight"):
        # Llama 3's scaling comes as its result, one divisor per frequency: the same numbers at every length.
        divisors = _factors(k, "rope_freqs.weight")
        return {"rope_type": "longrope", "short_factor": divisors, "long_factor": divisors, "factor": 1.0,
                "attention_factor": 1.0, "original_max_position_embeddings": length}
    kind = k.text("rope.scaling.type", "none")
    if kind == "none":
        factor = k.number("rope.scale_linear", 1.0)
        return {"rope_type": "linear", "factor": factor} if factor != 1.0 else None
    if kind == "linear":
        return {"rope_type": "linear", "factor": k.number("rope.scaling.factor")}
    if kind == "yarn":
        original = k.integer("rope.scaling.original_context_length", length)
        found = {"rope_type": "yarn", "factor": k.number("rope.scaling.factor")}
        found["original_max_position_embeddings"] = original
        for key in ("beta_fast", "beta_slow"):
            if k.has(f"rope.scaling.yarn_{key}"):
                found[key] = k.number(f"rope.scaling.yarn_{key}")
        return found
    raise k.error("rope.scaling.type", f"is {kind!r}, which is not supported")


def _llama(k: _Keys) -> Config:
    biases = {"attention_bias": k.tensor("blk.0.attn_q.bias"), "mlp_bias": k.tensor("blk.0.ffn_gate.bias")}
    return _whole_rotation(k, _common(k)) | biases | {"hidden_act": "silu"}


def _qwen2(k: _Keys) -> Config:
    return _whole_rotation(k, _common(k)) | {"hidden_act": "silu", "use_sliding_window": False}


def _qwen3(k: _Keys) -> Config:
    return _qwen2(k) | {"attention_bias": False}


def _phi3(k: _Keys) -> Config:
    config = _common(k)
    length = config["max_position_embeddings"]
    return config | {
        "hidden_act": "silu",
        "sliding_window": k.integer("attention.sliding_window", 0) or None,
        "original_max_position_embeddings": k.integer("rope.scaling.original_context_length", length),
        "partial_rotary_factor": k.integer("rope.dimension_count", config["head_dim"]) / config["head_dim"],
    }


def _gemma(k: _Keys, largest: int) -> Config:
    """Both Gemmas. ``largest``: layers of the 27B model, the one whose attention scale is not the head size's."""
    config = _whole_rotation(k, _common(k))
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    return config | {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": config["hidden_size"] // heads if layers == largest else config["head_dim"],
        "attention_bias": False,
    }


def _gemma2(k: _Keys) -> Config:
    config = _gemma(k, 46)
    return config | {
        "sliding_window": k.integer("attention.sliding_window", 4096),
        "layer_types": _layer_types(k, config["num_hidden_layers"], 2),
        "attn_logit_softcapping": k.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": k.number("final_logit_softcapping", 30.0),
    }


def _gemma3(k: _Keys) -> Config:
    config = _gemma(k, 62)
    layers = config["num_hidden_layers"]
    windowed = k.has("attention.sliding_window")
    return config | {
        "sliding_window": k.integer("attention.sliding_window") if windowed else None,
        "layer_types": _layer_types(k, layers, 6) if windowed else ["full_attention"] * layers,
        "rope_local_base_freq": k.number("rope.freq_base_swa", 10000.0),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": k.number("final_logit_softcapping") if k.has("final_logit_softcapping") else None,
    }


def _layer_types(k: _Keys, layers: int, period: int) -> list[str]:
    """Which layers see a window: all but every period-th, unless the file says otherwise."""
    key = "attention.sliding_window_pattern"
    pattern = k.get(key, period)
    if isinstance(pattern, np.ndarray):
        if pattern.dtype != np.bool_ or len(pattern) < layers:
            raise k.error(key, f"must hold a bool for each of {layers} layers")
        windowed = [bool(p) for p in pattern[:layers]]
    else:
        period = k.integer(key, period)
        if period < 1:
            raise k.error(key, f"must be at least 1, got {period}")
        windowed = [(i + 1) % period != 0 for i in range(layers)]
    return ["sliding_attention" if w else "full_attention" for w in windowed]


def _gpt2(k: _Keys) -> Config:
    return {
        "vocab_size": k.rows("token_embd.weight"),
        "n_positions": k.rows("position_embd.weight"),
        "n_embd": k.integer("embedding_length"),
        "n_layer": k.layers(),
        "n_head": k.integer("attention.head_count"),
        "n_inner": k.integer("feed_forward_length"),
        "layer_norm_epsilon": k.number("attention.layer_norm_epsilon"),
        "activation_function": "gelu_new",
        "tie_word_embeddings": not k.tensor("output.weight"),
    }


def _gptneox(k: _Keys) -> Config:
    heads, hidden = k.integer("attention.head_count"), k.integer("embedding_length")
    if heads < 1 or hidden < heads:
        raise k.error("attention.head_count", f"must be from 1 to {hidden}, got {heads}")
    parallel = k.get("use_parallel_residual", True)
    if not isinstance(parallel, bool):
        raise k.error("use_parallel_residual", f"must be a bool, got {parallel!r}")
    return {
        "vocab_size": k.rows("token_embd.weight"),
        "max_position_embeddings": k.integer("context_length"),
        "hidden_size": hidden,
        "num_hidden_layers": k.layers(),
        "num_attention_heads": heads,
        "intermediate_size": k.integer("feed_forward_length"),
        "layer_norm_eps": k.number("attention.layer_norm_epsilon"),
        "rotary_pct": k.integer("rope.dimension_count", hidden // heads) / (hidden // heads),
        "rotary_emb_base": k.number("rope.freq_base", 10000.0),
        "use_parallel_residual": parallel,
        "hidden_act": "gelu",
        "tie_word_embeddings": not k.tensor("output.weight"),
    }


_ARCHITECTURES: dict[str, tuple[str, Callable[[_Keys], Config]]] = {
    "llama": ("LlamaForCausalLM", _llama),
    "qwen2": ("Qwen2ForCausalLM", _qwen2),
    "qwen3": ("Qwen3ForCausalLM", _qwen3),
    "gemma2": ("Gemma2ForCausalLM", _gemma2),
    "gemma3": ("Gemma3ForCausalLM", _gemma3),
    "phi3": ("Phi3ForCausalLM", _phi3),
    "gpt2": ("GPT2LMHeadModel", _gpt2),
    "gptneox": ("GPTNeoXForCausalLM", _gptneox),
}
