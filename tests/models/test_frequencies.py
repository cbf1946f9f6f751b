"""Rotary frequencies against the functions that transformers has for them, entry by entry of the table."""

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from octavo.models import llama, phi3
from octavo.models.frequencies import frequencies

HEAD = 64
SCALED: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama 3.1": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0,
        "original_max_position_embeddings": 8192},
    "llama 3.2": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500000.0,
        "original_max_position_embeddings": 8192},
    "qwen yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6},
    "yarn without truncation": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "truncate": False,
        "beta_fast": 16, "beta_slow": 2},
    "yarn with mscale": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
        "mscale_all_dim": 0.7},
    "yarn with attention_factor": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096, "attention_factor": 1.25},
    "yarn of a short range": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
}


def config_of(architecture: str, theirs: Any) -> dict[str, Any]:
    """The config.json of a transformers config."""
    return {**theirs.to_dict(), "architectures": [architecture]}


@pytest.mark.parametrize("kind", SCALED)
@pytest.mark.parametrize("length", [100, 40000])
def test_scaled_as_by_transformers(kind: str, length: int) -> None:
    theirs = LlamaConfig(head_dim=HEAD, max_position_embeddings=16384, rope_parameters=dict(SCALED[kind]))
    ours, magnitude = frequencies(llama.spec(config_of("LlamaForCausalLM", theirs)).ropes[0], length)
    wanted, wanted_magnitude = ROPE_INIT_FUNCTIONS[theirs.rope_parameters["rope_type"]](theirs, "cpu", seq_len=length)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, wanted, rtol=3e-7, atol=0.0)
    assert magnitude == pytest.approx(wanted_magnitude, rel=1e-12)


@pytest.mark.parametrize("extra", [{}, {"factor": 8.0}, {"attention_factor": 1.19}])
@pytest.mark.parametrize("length", [4096, 4097, 131072])
def test_longrope_as_by_transformers(extra: dict[str, float], length: int) -> None:
    half = 96 // 2
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1 + i / 50 for i in range(half)],
        "long_factor": [1 + i for i in range(half)], **extra,
    }
    theirs = Phi3Config(
        hidden_size=96 * 32, num_attention_heads=32, max_position_embeddings=131072,
        original_max_position_embeddings=4096, rope_parameters=rope)
    ours, magnitude = frequencies(phi3.spec(config_of("Phi3ForCausalLM", theirs)).ropes[0], length)
    wanted, wanted_magnitude = ROPE_INIT_FUNCTIONS["longrope"](theirs, "cpu", seq_len=length)
    torch.testing.assert_close(ours, wanted, rtol=3e-7, atol=0.0)
    assert magnitude == pytest.approx(wanted_magnitude, rel=1e-12)


def test_plain_frequencies_by_their_formula() -> None:
    spec = llama.spec(config_of("LlamaForCausalLM", LlamaConfig(head_dim=HEAD)))
    ours, magnitude = frequencies(spec.ropes[0], 10)
    assert magnitude == 1.0
    for i in (0, 1, 31):
        assert float(ours[i]) == pytest.approx(math.pow(10000.0, -2 * i / HEAD), rel=1e-6)
