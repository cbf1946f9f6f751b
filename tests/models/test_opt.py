"""OPT against transformers, the 350m's shape included, and the names of old files."""

from pathlib import Path
from typing import Any

import pytest
from oracle import build, check_family, make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import OPTConfig

from octavo.errors import ModelError
from octavo.models import opt, registry

SMALL = {
    "vocab_size": 131, "hidden_size": 48, "ffn_dim": 80, "num_hidden_layers": 3, "num_attention_heads": 3,
    "max_position_embeddings": 64, "word_embed_proj_dim": 48,
}
SHAPES: dict[str, dict[str, Any]] = {
    "125m": {},
    "350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 24},
    "350m, untied, five heads": {
        "do_layer_norm_before": False, "word_embed_proj_dim": 30, "num_attention_heads": 5, "hidden_size": 70,
        "tie_word_embeddings": False},
    "post-norm without projections": {"do_layer_norm_before": False, "num_hidden_layers": 1},
    "pre-norm with projections": {"word_embed_proj_dim": 96, "num_attention_heads": 8},
    "no final norm": {"_remove_final_layer_norm": True},
    "no biases, gelu": {"enable_bias": False, "activation_function": "gelu", "ffn_dim": 77, "vocab_size": 257},
}


def config_of(**changes: Any) -> dict[str, Any]:
    """A config.json of a small OPT."""
    return {"architectures": ["OPTForCausalLM"], **SMALL, **changes}


@pytest.mark.parametrize("shape", SHAPES)
def test_same_as_transformers(shape: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, OPTConfig(**{**SMALL, **SHAPES[shape]}))
    check_family(build(tmp_path), model)


def test_original_names(tmp_path: Path) -> None:
    """The first OPT files begin with decoder, and the big ones store the tied head as well."""
    model = make_checkpoint(tmp_path, OPTConfig(**SMALL))
    saved = load_file(tmp_path / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in saved.items()}
    renamed["lm_head.weight"] = renamed["decoder.embed_tokens.weight"].clone()
    save_file(renamed, tmp_path / "model.safetensors")
    check_family(build(tmp_path), model)


def test_the_350m_is_described_by_its_config() -> None:
    spec = registry.spec(config_of(do_layer_norm_before=False, word_embed_proj_dim=24))
    assert (spec.norm_placement, spec.final_norm, spec.embedding_dim) == ("post", False, 24)
    assert (spec.positions, spec.position_offset, spec.max_len) == (66, 2, 64)
    assert registry.spec(config_of()).embedding_dim == 0


def test_norms_without_weights_are_refused() -> None:
    with pytest.raises(ModelError, match="layer_norm_elementwise_affine"):
        opt.spec(config_of(layer_norm_elementwise_affine=False))
