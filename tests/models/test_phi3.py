"""Phi-3 against transformers: fused projections, partial rotation, and longrope on both sides of the trained length."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import assert_close, build, check_family, logits_in_chunks, make_checkpoint
from transformers import Phi3Config

from octavo.errors import ModelError
from octavo.models import phi3

SMALL = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 3,
    "max_position_embeddings": 128, "pad_token_id": 0, "eos_token_id": 1,
}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.3, 1.2, 1.5, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 9.0, 12.0, 20.0],
}
SHAPES: dict[str, dict[str, Any]] = {
    "odd heads": {},
    "groups of 3, window": {"num_key_value_heads": 1, "sliding_window": 7},
    "groups of 8, tied": {
        "num_attention_heads": 16, "num_key_value_heads": 2, "hidden_size": 64, "tie_word_embeddings": True},
    "three quarters rotate": {
        "num_attention_heads": 5, "num_key_value_heads": 1, "hidden_size": 80,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}},
}


def config_of(**changes: Any) -> dict[str, Any]:
    """A config.json of a small Phi-3."""
    return {"architectures": ["Phi3ForCausalLM"], "rms_norm_eps": 1e-5, **SMALL, **changes}


@pytest.mark.parametrize("shape", SHAPES)
def test_same_as_transformers(shape: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, Phi3Config(**{**SMALL, **SHAPES[shape]}))
    check_family(build(tmp_path), model)


@pytest.mark.parametrize("attention", [{}, {"factor": 6.0}, {"attention_factor": 1.3}])
def test_longrope_is_chosen_by_max_model_len(attention: dict[str, float], tmp_path: Path) -> None:
    """Up to the trained 40 tokens the short divisors hold, beyond it the long ones, for every token of the engine."""
    config = Phi3Config(**SMALL, original_max_position_embeddings=40, rope_parameters={**LONGROPE, **attention})
    model = make_checkpoint(tmp_path, config)
    ids = torch.randint(0, 131, (60,))
    with torch.no_grad():
        long, short = model(ids[None]).logits[0], model(ids[None, :40]).logits[0]
    ours_long = logits_in_chunks(build(tmp_path, max_model_len=60), ids, (1, 7))
    ours_short = logits_in_chunks(build(tmp_path, max_model_len=40), ids[:40], (1, 7))
    assert_close(ours_long, long)
    assert_close(ours_short, short)
    assert float((ours_long[:40] - ours_short).abs().max()) > 0.05, "the two tables should differ visibly"


def test_the_old_names_of_longrope() -> None:
    """The first files said "su" or "yarn" and kept theta outside."""
    new = phi3.spec(config_of(rope_parameters=LONGROPE, original_max_position_embeddings=40))
    for kind in ("su", "yarn", "longrope"):
        scaling = {"type": kind, "short_factor": LONGROPE["short_factor"], "long_factor": LONGROPE["long_factor"]}
        old = config_of(rope_scaling=scaling, rope_theta=10000.0, original_max_position_embeddings=40)
        assert phi3.spec(old) == new
    assert new.ropes[0].scaling == "longrope"
    assert (new.ropes[0].original_max_len, new.ropes[0].factor) == (40, 128 / 40)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"rope_scaling": {**LONGROPE, "short_factor": [1.0] * 7}}, "short_factor"),
        ({"rope_scaling": {**LONGROPE, "long_factor": None}}, "long_factor"),
        ({"rope_scaling": {**LONGROPE, "long_factor": [0.0] * 8}}, "long_factor"),
        ({"rope_scaling": {**LONGROPE, "short_mscale": 1.2}}, "short_mscale"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changes: dict[str, Any], names: str) -> None:
    with pytest.raises(ModelError, match=names):
        phi3.spec(config_of(**changes))
