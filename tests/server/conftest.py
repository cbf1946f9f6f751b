"""Tests of the server share modules beside this file, the fake engine of tests/engine, and a model without weights."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from wire import Running

for folder in ("server", "engine"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a tiny Llama, for load_format dummy; there is no tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 211, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False,
        "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"}))
    return folder


@pytest.fixture(scope="module")
def calm() -> "Iterator[Running]":
    """A server without a time-out that a slow machine could meet."""
    from wire import MAX_BODY, serving

    with serving(max_body_bytes=MAX_BODY, header_timeout=60.0, body_timeout=60.0, send_timeout=60.0, keep_alive=60.0) as running:
        yield running
