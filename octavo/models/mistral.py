"""Mistral 7B and its kin: Llama with a sliding window.

Owns what differs from Llama: the window, which holds for every layer, or for those that ``layer_types`` names.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.models.entries import Entries
from octavo.models.llama import IGNORED, NAMES, llama_like
from octavo.models.spec import DecoderSpec, LayerSpec

__all__ = ["ARCHITECTURES", "IGNORED", "NAMES", "spec"]

ARCHITECTURES = ("MistralForCausalLM",)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The network of a Mistral config; without an entry the window is 4096, null is none."""
    e = Entries.of(config)
    e.only("attention_bias", False)
    e.only("mlp_bias", False)
    base = llama_like(e, "mistral")
    window = e.whole("sliding_window", 4096) if e.has("sliding_window") or "sliding_window" not in config else 0
    windows = e.windows(base.num_layers, window, (window > 0,) * base.num_layers)
    return replace(base, layers=tuple(LayerSpec(window=w) for w in windows))
