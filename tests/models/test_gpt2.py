"""GPT-2 against transformers, and the names and configs of old files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import build, check_family, make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from octavo.errors import ModelError
from octavo.models import gpt2, registry

SMALL = {"vocab_size": 131, "n_embd": 48, "n_layer": 3, "n_head": 3, "n_positions": 64}
SHAPES: dict[str, dict[str, Any]] = {
    "three heads, tied": {},
    "five heads, untied": {"n_head": 5, "n_embd": 70, "tie_word_embeddings": False},
    "sixteen small heads": {"n_head": 16, "n_embd": 64, "n_layer": 2},
    "odd sizes": {
        "n_embd": 54, "n_inner": 77, "vocab_size": 257, "layer_norm_epsilon": 1e-2, "activation_function": "relu"},
    "one head, unscaled": {"n_head": 1, "n_embd": 24, "scale_attn_weights": False, "activation_function": "gelu"},
}


def config_of(**changes: Any) -> dict[str, Any]:
    """A config.json of a small GPT-2."""
    return {"architectures": ["GPT2LMHeadModel"], **SMALL, **changes}


@pytest.mark.parametrize("shape", SHAPES)
def test_same_as_transformers(shape: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, GPT2Config(**{**SMALL, **SHAPES[shape]}))
    check_family(build(tmp_path), model)


def test_original_names_and_stored_masks(tmp_path: Path) -> None:
    """The first GPT-2 files have no prefix, carry the causal mask, and may repeat the tied head."""
    model = make_checkpoint(tmp_path, GPT2Config(**SMALL))
    saved = load_file(tmp_path / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in saved.items()}
    renamed |= {f"h.{i}.attn.bias": torch.ones(1, 1, 64, 64) for i in range(3)}
    renamed |= {"h.0.attn.masked_bias": torch.tensor(-1e4), "lm_head.weight": renamed["wte.weight"].clone()}
    save_file(renamed, tmp_path / "model.safetensors")
    check_family(build(tmp_path), model)


def test_the_position_table_bounds_the_length() -> None:
    spec = registry.spec(config_of())
    assert (spec.max_len, spec.positions, spec.position_offset, spec.intermediate) == (64, 64, 0, 192)
    assert spec.eos_token_ids == (50256,)
    assert spec.tied


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"activation_function": "mish"}, "mish"),
        ({"n_head": 5}, "48"),
        ({"n_embd": None}, "n_embd"),
    ],
)
def test_what_cannot_be_honoured_is_refused(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ModelError, match=names):
        gpt2.spec(config_of(**changes))
