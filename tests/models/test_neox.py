"""GPT-NeoX and Pythia against transformers, and the names and configs of old files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import build, check_family, make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig

from octavo.errors import ModelError
from octavo.models import neox, registry

SMALL = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 3,
    "max_position_embeddings": 128,
}


def rope(partial: float, base: float = 10000.0, **more: Any) -> dict[str, Any]:
    """The rotary entries of a new config."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": partial, **more}}


SHAPES: dict[str, dict[str, Any]] = {
    "parallel, a quarter rotates": rope(0.25),
    "sequential, a quarter rotates": {**rope(0.25), "use_parallel_residual": False},
    "parallel, all rotates": rope(1.0, 500.0),
    "sequential, five heads, tied": {
        **rope(0.5), "use_parallel_residual": False, "num_attention_heads": 5, "hidden_size": 80,
        "tie_word_embeddings": True},
    "no attention bias": {**rope(0.5), "attention_bias": False, "hidden_act": "relu", "layer_norm_eps": 1e-2},
    "sixteen heads, odd sizes": {
        **rope(1.0), "num_attention_heads": 16, "hidden_size": 96, "intermediate_size": 77, "vocab_size": 257},
    "linear scaling": {"rope_parameters": {
        "rope_type": "linear", "factor": 2.5, "rope_theta": 500.0, "partial_rotary_factor": 0.5}},
}


def config_of(**changes: Any) -> dict[str, Any]:
    """A config.json of a small NeoX."""
    return {"architectures": ["GPTNeoXForCausalLM"], **SMALL, **changes}


@pytest.mark.parametrize("shape", SHAPES)
def test_same_as_transformers(shape: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, GPTNeoXConfig(**{**SMALL, **SHAPES[shape]}))
    check_family(build(tmp_path), model)


def test_stored_masks_and_frequencies_are_ignored(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, GPTNeoXConfig(**SMALL, **rope(0.25)))
    saved = load_file(tmp_path / "model.safetensors")
    saved["gpt_neox.layers.0.attention.bias"] = torch.ones(1, 1, 8, 8)
    saved["gpt_neox.layers.0.attention.masked_bias"] = torch.tensor(-1e9)
    saved["gpt_neox.layers.0.attention.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(saved, tmp_path / "model.safetensors")
    build(tmp_path)


def test_old_and_new_shapes_of_a_config_mean_the_same() -> None:
    old = registry.spec(config_of(rotary_pct=0.5, rotary_emb_base=500))
    assert old == registry.spec(config_of(**rope(0.5, 500.0)))
    assert (old.ropes[0].rotary_dim, old.ropes[0].base) == (8, 500.0)
    assert registry.spec(config_of()) == registry.spec(config_of(**rope(0.25)))
    scaled = registry.spec(config_of(rotary_pct=0.5, rope_scaling={"type": "linear", "factor": 2.0}))
    assert (scaled.ropes[0].scaling, scaled.ropes[0].factor, scaled.ropes[0].rotary_dim) == ("linear", 2.0, 8)


def test_a_rotated_part_that_is_odd_is_refused() -> None:
    with pytest.raises(ModelError, match="15 of 16 dims rotate"):
        registry.spec(config_of(rotary_pct=0.94))
    with pytest.raises(ModelError, match="use_parallel_residual"):
        neox.spec(config_of(use_parallel_residual="yes"))
