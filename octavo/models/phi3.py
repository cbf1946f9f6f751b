"""Phi-3 and Phi-4-mini: Llama with fused projections and stretched frequencies.

Owns what differs from Llama: one tensor for q, k and v and one for gate and up, a window, and longrope, whose short or
long list of divisors is chosen by max_model_len when the model is built.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from octavo.models.entries import Entries
from octavo.models.llama import IGNORED, OUTER_NAMES, llama_like
from octavo.models.names import Name
from octavo.models.spec import DecoderSpec, LayerSpec

__all__ = ["ARCHITECTURES", "IGNORED", "NAMES", "spec"]

ARCHITECTURES = ("Phi3ForCausalLM",)


def _split_qkv(tensor: Tensor, spec: DecoderSpec) -> tuple[Tensor, ...]:
    """[(heads + 2 kv_heads) * head_dim, hidden] -> q, k, v."""
    kv_size = spec.num_kv_heads * spec.head_dim
    return torch.split(tensor, [spec.num_heads * spec.head_dim, kv_size, kv_size])


def _split_up(tensor: Tensor, spec: DecoderSpec) -> tuple[Tensor, ...]:
    """[2 * intermediate, hidden] -> gate, up."""
    return torch.split(tensor, [spec.intermediate, spec.intermediate])


_LAYER = "model.layers.{i}."
NAMES = (
    *OUTER_NAMES,
    Name(_LAYER + "self_attn.qkv_proj.weight", tuple(f"layers.{{i}}.attn.{part}.weight" for part in "qkv"), _split_qkv),
    Name(_LAYER + "self_attn.o_proj.weight", "layers.{i}.attn.o.weight"),
    Name(_LAYER + "mlp.gate_up_proj.weight", ("layers.{i}.mlp.gate.weight", "layers.{i}.mlp.up.weight"), _split_up),
    Name(_LAYER + "mlp.down_proj.weight", "layers.{i}.mlp.down.weight"),
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The network of a Phi-3 config."""
    e = Entries.of(_with_longrope(config))
    e.only("attention_bias", False)
    e.only("mlp_bias", False)
    base = llama_like(e, "phi3")
    window = e.whole("sliding_window") if e.has("sliding_window") else 0
    return replace(base, layers=(LayerSpec(window=window),) * base.num_layers)


def _with_longrope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config with longrope under its own name: the first Phi-3 files called it "yarn", which is something else."""
    made = {"original_max_position_embeddings": 4096, **config}
    for name in ("rope_parameters", "rope_scaling"):
        entries = made.get(name)
        if isinstance(entries, Mapping) and entries.get("rope_type", entries.get("type")) == "yarn":
            made[name] = {**entries, "rope_type": "longrope"}
    return made
