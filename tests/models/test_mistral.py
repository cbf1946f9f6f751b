"""Mistral against transformers: the sliding window, and configs with and without one."""

from pathlib import Path
from typing import Any

import pytest
from oracle import build, check_family, make_checkpoint
from transformers import MinistralConfig, MistralConfig

from octavo.errors import ModelError
from octavo.models import mistral

SMALL = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 3,
    "num_key_value_heads": 3, "max_position_embeddings": 128,
}
SHAPES: dict[str, dict[str, Any]] = {
    "no window": {"sliding_window": None},
    "window of 5": {"sliding_window": 5},
    "window of 1, groups of 3, tied": {"sliding_window": 1, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "window of a block, groups of 8, wide heads": {
        "sliding_window": 8, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 10, "hidden_size": 64},
    "window longer than the text": {
        "sliding_window": 500, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 6},
}


def config_of(**changes: Any) -> dict[str, Any]:
    """A config.json of a small Mistral."""
    return {"architectures": ["MistralForCausalLM"], "rms_norm_eps": 1e-5, **SMALL, **changes}


@pytest.mark.parametrize("shape", SHAPES)
def test_same_as_transformers(shape: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, MistralConfig(**{**SMALL, **SHAPES[shape]}))
    check_family(build(tmp_path), model)


def test_layer_types_choose_the_windows() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    spec = mistral.spec(config_of(sliding_window=6, layer_types=kinds))
    assert [layer.window for layer in spec.layers] == [0, 6, 0]
    theirs = MinistralConfig(**SMALL, sliding_window=6, layer_types=kinds)
    assert theirs.layer_types == kinds


def test_silence_means_the_window_of_the_first_mistral() -> None:
    assert {layer.window for layer in mistral.spec(config_of()).layers} == {MistralConfig(**SMALL).sliding_window}
    assert {layer.window for layer in mistral.spec(config_of(sliding_window=None)).layers} == {0}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ({"layer_types": ["sliding_attention"] * 3, "sliding_window": None}, "sliding_window is not in use"),
        ({"attention_bias": True}, "attention_bias"),
        ({"sliding_window": "wide"}, "sliding_window"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ModelError, match=names):
        mistral.spec(config_of(**changes))
