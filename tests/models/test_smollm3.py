"""SmolLM3 against transformers: layers without rotary positions."""

from pathlib import Path
from typing import Any

import pytest
from oracle import build, check_family, make_checkpoint
from transformers import SmolLM3Config

from octavo.errors import ModelError
from octavo.models import smollm3

SMALL = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 5, "num_attention_heads": 3,
    "num_key_value_heads": 3, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "odd heads, tied": {},
    "groups of 3, every second layer": {
        "num_key_value_heads": 1, "no_rope_layer_interval": 2, "tie_word_embeddings": False},
    "groups of 8, listed layers": {
        "num_attention_heads": 16, "num_key_value_heads": 2, "hidden_size": 64, "no_rope_layers": [0, 1, 1, 0, 0]},
    "biases": {
        "attention_bias": True, "mlp_bias": True, "num_attention_heads": 5, "num_key_value_heads": 5,
        "hidden_size": 60},
    "window where nothing rotates": {"use_sliding_window": True, "sliding_window": 6, "no_rope_layer_interval": 2},
}


def config_of(**changes: Any) -> dict[str, Any]:
    """A config.json of a small SmolLM3."""
    return {"architectures": ["SmolLM3ForCausalLM"], "rms_norm_eps": 1e-6, **SMALL, **changes}


@pytest.mark.parametrize("shape", SHAPES)
def test_same_as_transformers(shape: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, SmolLM3Config(**{**SMALL, **SHAPES[shape]}))
    check_family(build(tmp_path), model)


def test_which_layers_rotate() -> None:
    spec = smollm3.spec(config_of())
    assert [layer.rope for layer in spec.layers] == [0, 0, 0, None, 0]
    assert spec.tied and spec.ropes[0].base == 2000000.0
    windowed = smollm3.spec(config_of(use_sliding_window=True, sliding_window=6, no_rope_layers=[1, 0, 1, 1, 0, 0, 1]))
    assert [(layer.rope, layer.window) for layer in windowed.layers] == [(0, 0), (None, 6), (0, 0), (0, 0), (None, 6)]


@pytest.mark.parametrize("listed", [[1, 1], [1, 1, 2, 1, 1], "none"])
def test_a_wrong_list_is_refused(listed: Any) -> None:
    with pytest.raises(ModelError, match="no_rope_layers"):
        smollm3.spec(config_of(no_rope_layers=listed))
