"""Qwen2 and Qwen3 against transformers: biases, norms of q and k, windows of the upper layers."""

from pathlib import Path
from typing import Any

import pytest
from oracle import build, check_family, make_checkpoint
from transformers import Qwen2Config, Qwen3Config

from octavo.errors import ModelError
from octavo.models import qwen

SMALL = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 3,
    "num_key_value_heads": 3, "max_position_embeddings": 128,
}
GROUPS_OF_8 = {"num_attention_heads": 16, "num_key_value_heads": 2, "hidden_size": 96}
WINDOWED = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e6}
SHAPES: dict[str, Any] = {
    "2, odd heads": Qwen2Config(**SMALL),
    "2, groups of 3, tied": Qwen2Config(**{**SMALL, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    "2, groups of 8, yarn": Qwen2Config(**{**SMALL, **GROUPS_OF_8, "rope_parameters": YARN}),
    "2, window from layer 1": Qwen2Config(**SMALL, **WINDOWED),
    "2, window not in use": Qwen2Config(**{**SMALL, **WINDOWED, "use_sliding_window": False}),
    "3, odd heads": Qwen3Config(**SMALL, head_dim=20),
    "3, five heads, tied, biases": Qwen3Config(
        **{**SMALL, "num_attention_heads": 5, "num_key_value_heads": 1}, head_dim=8, tie_word_embeddings=True,
        attention_bias=True),
    "3, groups of 8, head_dim 128": Qwen3Config(**{**SMALL, **GROUPS_OF_8, "num_hidden_layers": 2}),
    "3, window from layer 1": Qwen3Config(**SMALL, **WINDOWED, head_dim=16),
}


def config_of(architecture: str = "Qwen2ForCausalLM", **changes: Any) -> dict[str, Any]:
    """A config.json of a small Qwen."""
    return {"architectures": [architecture], "rms_norm_eps": 1e-6, **SMALL, **changes}


@pytest.mark.parametrize("shape", SHAPES)
def test_same_as_transformers(shape: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, SHAPES[shape])
    check_family(build(tmp_path), model)


@pytest.mark.parametrize("architecture", qwen.ARCHITECTURES)
def test_windows_without_layer_types(architecture: str) -> None:
    """Configs older than ``layer_types`` say the same by max_window_layers."""
    windows = [layer.window for layer in qwen.spec(config_of(architecture, **WINDOWED)).layers]
    assert windows == [0, 6, 6]
    assert {layer.window for layer in qwen.spec(config_of(architecture)).layers} == {0}


def test_what_tells_the_generations_apart() -> None:
    two, three = qwen.spec(config_of()), qwen.spec(config_of("Qwen3ForCausalLM"))
    assert (two.qkv_bias, two.out_bias, two.qk_norm, two.head_dim) == (True, False, False, 16)
    assert (three.qkv_bias, three.out_bias, three.qk_norm, three.head_dim) == (False, False, True, 128)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config"),
        ({"layer_types": ["sliding_attention"] * 3}, "sliding_window"),
        ({"use_sliding_window": 1}, "use_sliding_window"),
        ({"mlp_bias": True}, "mlp_bias"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ModelError, match=names):
        qwen.spec(config_of(**changes))
