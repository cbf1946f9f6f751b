"""SmolLM3: Llama in which every fourth layer has no rotary positions.

Owns what differs from Llama: ``no_rope_layers`` (1 rotates, 0 does not) or its interval, and the window that layers
without positions may have.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.errors import ModelError
from octavo.models.entries import Entries
from octavo.models.llama import IGNORED, NAMES, llama_like, with_biases
from octavo.models.spec import DecoderSpec, LayerSpec

__all__ = ["ARCHITECTURES", "IGNORED", "NAMES", "spec"]

ARCHITECTURES = ("SmolLM3ForCausalLM",)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The network of a SmolLM3 config."""
    e = Entries.of(config)
    base = llama_like(e, "smollm3", tied=True, rope_base=2000000.0)
    rotates = _rotates(e, base.num_layers)
    window = e.whole("sliding_window", 0) if e.flag("use_sliding_window", False) else 0
    windows = e.windows(base.num_layers, window, tuple(not r for r in rotates))
    layers = tuple(LayerSpec(window=w, rope=0 if r else None) for w, r in zip(windows, rotates, strict=True))
    return with_biases(replace(base, layers=layers), e)


def _rotates(e: Entries, num_layers: int) -> tuple[bool, ...]:
    if not e.has("no_rope_layers"):
        interval = e.whole("no_rope_layer_interval", 4)
        return tuple((i + 1) % interval != 0 for i in range(num_layers))
    listed = e.values["no_rope_layers"]
    if not isinstance(listed, list) or len(listed) < num_layers or any(v not in (0, 1) for v in listed):
        wanted = f"0 or 1 for each of {num_layers} layers"
        raise ModelError(f"no_rope_layers must list {wanted}, got {listed!r}.", "no_rope_layers")
    return tuple(bool(v) for v in listed[:num_layers])
