"""Llama 1, 2, 3 and SmolLM2 against transformers, and what a Llama config may say."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_close, build, check_family, logits_in_chunks, make_checkpoint
from transformers import LlamaConfig

from octavo.errors import ModelError
from octavo.models import llama

SMALL = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 3,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SHAPES: dict[str, dict[str, Any]] = {
    "odd heads": {},
    "groups of 3, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "groups of 8, wide heads": {
        "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 12, "hidden_size": 80, "num_hidden_layers": 2},
    "five heads, biases": {
        "num_attention_heads": 5, "num_key_value_heads": 5, "hidden_size": 70, "attention_bias": True, "mlp_bias": True,
    },
    "odd sizes": {
        "hidden_size": 54, "intermediate_size": 77, "vocab_size": 257, "rms_norm_eps": 1e-2, "hidden_act": "gelu"},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 500.0}},
    "llama3": {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}, "head_dim": 32},
    "yarn": {"rope_parameters": {**YARN, "rope_theta": 10000.0}, "head_dim": 32},
    "yarn by mscale": {
        "rope_parameters": {
            **YARN, "rope_theta": 10000.0, "mscale": 0.7, "mscale_all_dim": 0.3, "beta_fast": 8, "truncate": False}},
    "smollm2": {
        "hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}},
}


def config_of(**changes: Any) -> dict[str, Any]:
    """A config.json of a small Llama."""
    return {"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, **SMALL, **changes}


@pytest.mark.parametrize("shape", SHAPES)
def test_same_as_transformers(shape: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, LlamaConfig(**{**SMALL, **SHAPES[shape]}))
    check_family(build(tmp_path), model)


def test_dynamic_scaling_is_that_of_the_longest_sequence(tmp_path: Path) -> None:
    """Below the trained length nothing is scaled; above it the table is that of max_model_len."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = make_checkpoint(tmp_path, LlamaConfig(**{**SMALL, "max_position_embeddings": 40, "rope_parameters": rope}))
    ids = torch.randint(0, 131, (60,))
    with torch.no_grad():
        short = model(ids[None, :40]).logits[0]  # first: transformers keeps the longest table that it ever needed
        long = model(ids[None]).logits[0]
    assert_close(logits_in_chunks(build(tmp_path, max_model_len=60), ids, (7,)), long)
    assert_close(logits_in_chunks(build(tmp_path, max_model_len=40), ids[:40], (7,)), short)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """Stored in two bytes, computed in float32: the same as a float32 model whose matrices were rounded."""
    model = make_checkpoint(tmp_path, LlamaConfig(**SMALL, num_key_value_heads=1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.to(dtype))
    check_family(build(tmp_path, dtype=dtype), model)


def test_old_and_new_shapes_of_a_config_mean_the_same() -> None:
    new = config_of(rope_parameters={**LLAMA3, "rope_theta": 500000.0}, dtype="bfloat16")
    old = config_of(rope_scaling={**LLAMA3, "type": "llama3"}, rope_theta=500000.0, torch_dtype="bfloat16")
    nested = {"architectures": ["LlamaForCausalLM"], "text_config": new}
    assert llama.spec(new) == llama.spec(old) == llama.spec(nested)
    assert llama.spec(new).ropes[0].factor == 8.0
    assert llama.spec(new).ropes[0].base == 500000.0


def test_tokens_and_lengths() -> None:
    spec = llama.spec(config_of(eos_token_id=[5, 6], bos_token_id=1))
    assert (spec.eos_token_ids, spec.bos_token_id, spec.max_len) == ((5, 6), 1, 128)
    assert llama.spec(config_of(eos_token_id=7)).eos_token_ids == (7,)
    assert llama.spec(config_of(eos_token_id=None)).eos_token_ids == ()
    assert llama.spec(config_of(rope_scaling={"type": "linear", "factor": 4})).max_len == 512
    yarn = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 64}
    assert llama.spec(config_of(rope_scaling=yarn)).max_len == 256


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "mrope"),
        ({"rope_scaling": {"type": "spiral", "factor": 2}}, "spiral"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "surprise": 1}}, "surprise"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2}}, "low_freq_factor"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"hidden_act": "mish"}, "mish"),
        ({"attention_bias": "yes"}, "attention_bias"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"num_experts": 8}, "num_experts"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 50}, "num_attention_heads"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ModelError, match=names):
        llama.spec(config_of(**changes))


def test_neutral_entries_are_accepted() -> None:
    harmless = {"quantization_config": None, "num_experts": 0, "residual_multiplier": 1.0, "attention_dropout": 0.1}
    assert llama.spec(config_of(**harmless)) == llama.spec(config_of())
