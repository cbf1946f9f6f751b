"""Gemma 2 and Gemma 3 against transformers, and what their configs may say or leave out."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import build, check_family, make_checkpoint
from transformers import Gemma2Config, Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig

from octavo.errors import ModelError
from octavo.models import gemma, registry

SMALL = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 4, "num_attention_heads": 3,
    "num_key_value_heads": 3, "head_dim": 16, "max_position_embeddings": 128, "sliding_window": 6,
    "query_pre_attn_scalar": 16,
}
GROUPS_OF_3 = {"num_key_value_heads": 1, "query_pre_attn_scalar": 23, "vocab_size": 257, "intermediate_size": 77}
GROUPS_OF_8 = {"num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 12, "hidden_size": 80}
FULL, SLIDING = "full_attention", "sliding_attention"
GEMMA2: dict[str, dict[str, Any]] = {
    "soft caps that bite": {"attn_logit_softcapping": 0.7, "final_logit_softcapping": 3.0},
    "groups of 3": GROUPS_OF_3,
    "groups of 8, untied": {**GROUPS_OF_8, "tie_word_embeddings": False},
    "no caps, biases": {"attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": True},
    "layers as listed": {"layer_types": [FULL, FULL, SLIDING, FULL], "sliding_window": 1},
}


def ropes(local: float = 100.0, base: float = 5000.0, **full: Any) -> dict[str, Any]:
    """The rotary entries of a new Gemma 3 config."""
    whole = {"rope_type": "default", "rope_theta": base, **full}
    return {"rope_parameters": {FULL: whole, SLIDING: {"rope_type": "default", "rope_theta": local}}}


GEMMA3: dict[str, dict[str, Any]] = {
    "two bases": {**ropes(), "layer_types": [SLIDING, FULL, SLIDING, FULL]},
    "five windows to one whole": {**ropes(), "num_hidden_layers": 6, "intermediate_size": 40},
    "groups of 3": {**ropes(), **GROUPS_OF_3},
    "groups of 8, untied": {**ropes(), **GROUPS_OF_8, "tie_word_embeddings": False},
    "linear scaling of whole layers": {
        **ropes(rope_type="linear", factor=4.0), "layer_types": [SLIDING, FULL, FULL, SLIDING], "sliding_window": 9},
    "capped logits, biases": {**ropes(), "final_logit_softcapping": 3.0, "attention_bias": True},
}


def config_of(version: int, **changes: Any) -> dict[str, Any]:
    """A config.json of a small Gemma."""
    return {"architectures": [f"Gemma{version}ForCausalLM"], **SMALL, **changes}


@pytest.mark.parametrize("shape", GEMMA2)
def test_gemma2_same_as_transformers(shape: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, Gemma2Config(**{**SMALL, **GEMMA2[shape]}))
    check_family(build(tmp_path), model)


@pytest.mark.parametrize("shape", GEMMA3)
def test_gemma3_same_as_transformers(shape: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, Gemma3TextConfig(**{**SMALL, **GEMMA3[shape]}))
    check_family(build(tmp_path), model)


def test_embeddings_are_scaled_by_what_the_type_can_hold(tmp_path: Path) -> None:
    """transformers rounds sqrt(hidden) to the type of the weights, and checkpoints were trained with that."""
    model = make_checkpoint(tmp_path, Gemma3TextConfig(**SMALL, **ropes()))
    rounded = torch.tensor(math.sqrt(48)).bfloat16().float()
    assert float(rounded) != pytest.approx(math.sqrt(48), rel=1e-3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.bfloat16())
        model.model.embed_tokens.embed_scale.fill_(rounded)
    check_family(build(tmp_path, dtype=torch.bfloat16), model)


def test_the_language_model_of_a_gemma3_with_images(tmp_path: Path) -> None:
    """Only its tensors are read, under the nested names; a text goes through as in transformers."""
    text = Gemma3TextConfig(**SMALL, **ropes())
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1.0 if "embed" in name else 1.4 / math.sqrt(parameter.shape[-1]) if parameter.ndim > 1 else 0.3
            parameter.normal_(0.0, scale)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    check_family(build(tmp_path), model)


def test_old_and_new_shapes_of_a_gemma3_config_mean_the_same() -> None:
    linear = {"rope_type": "linear", "factor": 8.0}
    new = config_of(3, **ropes(1e4, 1e6, **linear))
    old = config_of(3, rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=linear, sliding_window_pattern=6)
    nested = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": old}
    assert registry.spec(new) == registry.spec(old) == registry.spec(nested)
    spec = registry.spec(old)
    assert [(r.base, r.scaling, r.factor) for r in spec.ropes] == [(1e6, "linear", 8.0), (1e4, "none", 1.0)]
    assert [(layer.window, layer.rope) for layer in spec.layers] == [(6, 1)] * 4
    assert registry.spec(config_of(3, num_hidden_layers=7)).layers[5:] == registry.spec(old).layers[:1] * 0 + (
        registry.spec(config_of(3, sliding_window_pattern=1)).layers[0], spec.layers[0])
    assert spec.max_len == 128, "the length of a Gemma config is stretched already"


def test_a_gemma3_config_may_leave_out_nearly_everything() -> None:
    """The published 4B config says only this about its language model."""
    text = {
        "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    config = {"architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106], "text_config": text}
    spec = registry.spec(config)
    assert (spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.vocab_size) == (8, 4, 256, 262208)
    assert (spec.max_len, spec.attn_scale, spec.eos_token_ids, spec.tied) == (131072, 1 / 16, (1, 106), True)
    assert sum(layer.window == 0 for layer in spec.layers) == 5


def test_gemma2_defaults() -> None:
    spec = registry.spec(config_of(2))
    assert (spec.attn_softcap, spec.logit_softcap) == (50.0, 30.0)
    assert [layer.window for layer in spec.layers] == [6, 0, 6, 0]
    assert registry.spec(config_of(2, attn_logit_softcapping=None)).attn_softcap == 0.0


@pytest.mark.parametrize(
    ("version", "changes", "names"),
    [
        (2, {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        (2, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (3, {"sliding_window_pattern": 0}, "sliding_window_pattern"),
        (3, {"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters"),
        (3, {"layer_types": [FULL, "chunked_attention"] * 2}, "chunked_attention"),
    ],
)
def test_what_cannot_be_honoured_is_refused(version: int, changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ModelError, match=names):
        gemma.spec(config_of(version, **changes))
