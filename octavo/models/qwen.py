"""Qwen2 (and 2.5) and Qwen3, the dense ones.

Owns what differs from Llama: Qwen2 has biases on q, k and v, Qwen3 norms q and k instead; in both, the upper layers may
have a sliding window.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.models.entries import Entries
from octavo.models.llama import IGNORED, NAMES, llama_like
from octavo.models.names import Name
from octavo.models.spec import DecoderSpec, LayerSpec

__all__ = ["ARCHITECTURES", "IGNORED", "NAMES", "spec"]

ARCHITECTURES = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
NAMES = (
    *NAMES,
    Name("model.layers.{i}.self_attn.q_norm.weight", "layers.{i}.attn.q_norm.weight"),
    Name("model.layers.{i}.self_attn.k_norm.weight", "layers.{i}.attn.k_norm.weight"),
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The network of a Qwen2 or Qwen3 config."""
    e = Entries.of(config)
    e.only("mlp_bias", False)
    if "Qwen3ForCausalLM" in config["architectures"]:
        bias = e.flag("attention_bias", False)
        base = replace(llama_like(e, "qwen3", head_dim=128), qk_norm=True, qkv_bias=bias, out_bias=bias)
    else:
        base = replace(llama_like(e, "qwen2"), qkv_bias=True)
    return replace(base, layers=tuple(LayerSpec(window=w) for w in _windows(e, base.num_layers)))


def _windows(e: Entries, num_layers: int) -> tuple[int, ...]:
    """Layers from ``max_window_layers`` on have the window, if ``use_sliding_window`` says so."""
    window = e.whole("sliding_window", 4096) if e.flag("use_sliding_window", False) else 0
    first = e.whole("max_window_layers", 28)
    return e.windows(num_layers, window, tuple(i >= first for i in range(num_layers)))
