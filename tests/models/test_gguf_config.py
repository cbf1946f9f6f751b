"""GGUF config: keys to config entries, defaults of llama.cpp, and what is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from octavo.errors import ModelError
from octavo.models import registry
from octavo.models.gguf import GgufFile
from octavo.models.gguf_config import config_of

Edit = Callable[[gguf.GGUFWriter], object]


def config(
    folder: Path, architecture: str = "llama", *edits: Edit, tensors: dict[str, Any] | None = None, **keys: Any
) -> Any:
    """The config of a file with the usual keys; ``keys`` replace them, None leaves one out."""
    w = gguf.GGUFWriter(folder / "m.gguf", architecture)
    usual = {
        "context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48,
        "attention.head_count": 4, "attention.head_count_kv": 2,
    }
    for key, value in (usual | keys).items():
        if value is not None:
            w.add_uint32(f"{architecture}.{key}", value)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_layer_norm_eps(1e-3)
    for edit in edits:
        edit(w)
    shapes = {"token_embd.weight": (50, 32), "position_embd.weight": (64, 32), "x": (1, 1)}
    for name, shape in shapes.items():
        w.add_tensor(name, np.zeros(shape, np.float32))
    for name, values in (tensors or {}).items():
        w.add_tensor(name, np.asarray(values, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return config_of(GgufFile(folder / "m.gguf"))


def test_floats_are_the_decimals_that_were_meant(tmp_path: Path) -> None:
    found = config(tmp_path, "llama", lambda w: w.add_rope_freq_base(1e6))
    assert found["rms_norm_eps"] == 1e-5
    assert found["rope_theta"] == 1e6


def test_defaults_and_derived_values(tmp_path: Path) -> None:
    found = config(tmp_path, **{"attention.head_count_kv": None})
    assert found["num_key_value_heads"] == 4
    assert found["head_dim"] == 8
    assert found["vocab_size"] == 50
    assert found["tie_word_embeddings"] is True
    assert found["rope_theta"] == 10000.0
    assert not {"eos_token_id", "rope_scaling"} & found.keys()
    assert config(tmp_path, tensors={"output.weight": [[1.0]]})["tie_word_embeddings"] is False


def test_the_end_of_a_turn_ends_a_text(tmp_path: Path) -> None:
    def tokens(w: gguf.GGUFWriter) -> None:
        w.add_eos_token_id(1)
        w.add_eot_token_id(7)
        w.add_pad_token_id(0)

    assert config(tmp_path, "llama", tokens)["eos_token_id"] == [1, 7]
    assert config(tmp_path, "llama", lambda w: (w.add_eos_token_id(3), w.add_eot_token_id(3)))["eos_token_id"] == 3


def test_one_value_per_layer_must_be_the_same_one(tmp_path: Path) -> None:
    found = config(tmp_path, "llama", lambda w: w.add_head_count([4, 4]), **{"attention.head_count": None})
    assert found["num_attention_heads"] == 4
    with pytest.raises(ModelError, match=r"llama\.attention\.head_count must be one integer"):
        config(tmp_path, "llama", lambda w: w.add_head_count([4, 2]), **{"attention.head_count": None})


def test_rope_scalings(tmp_path: Path) -> None:
    def scaling(kind: gguf.RopeScalingType) -> Edit:
        def edit(w: gguf.GGUFWriter) -> None:
            w.add_rope_scaling_type(kind)
            w.add_rope_scaling_factor(4.0)
            w.add_rope_scaling_orig_ctx_len(16)

        return edit

    linear = config(tmp_path, "llama", scaling(gguf.RopeScalingType.LINEAR))
    assert linear["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}
    yarn = config(tmp_path, "qwen2", scaling(gguf.RopeScalingType.YARN))
    assert yarn["rope_scaling"] == {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert registry.spec(yarn).ropes[0].scaling == "yarn"
    assert "rope_scaling" not in config(tmp_path, "llama", scaling(gguf.RopeScalingType.NONE))
    with pytest.raises(ModelError, match=r"rope\.scaling\.type is 'longrope'"):
        config(tmp_path, "llama", scaling(gguf.RopeScalingType.LONGROPE))


@pytest.mark.parametrize(
    ("architecture", "layers", "hidden", "scalar"),
    [("gemma2", 46, 32, 8), ("gemma2", 2, 32, 16), ("gemma3", 62, 32, 8), ("gemma3", 46, 32, 16)],
)
def test_the_largest_gemmas_scale_by_the_hidden_size(
    architecture: str, layers: int, hidden: int, scalar: int, tmp_path: Path
) -> None:
    """GGUF does not store the scale of the scores: it is known by the number of layers."""
    more = {f"blk.{i}.x": [[0.0]] for i in range(layers)}
    found = config(tmp_path, architecture, tensors=more, block_count=layers,
                   **{"attention.key_length": 16, "attention.value_length": 16, "attention.sliding_window": 8})
    assert found["query_pre_attn_scalar"] == scalar


def test_windows_of_gemma(tmp_path: Path) -> None:
    more = {f"blk.{i}.x": [[0.0]] for i in range(7)}

    def kinds(architecture: str, *edits: Edit, **keys: Any) -> list[int]:
        found = config(tmp_path, architecture, *edits, tensors=more, block_count=7, **keys)
        return [layer.window for layer in registry.spec(found).layers]

    window = {"attention.sliding_window": 8}
    assert kinds("gemma2", **window) == [8, 0, 8, 0, 8, 0, 8]
    assert kinds("gemma3", **window) == [8, 8, 8, 8, 8, 0, 8]
    assert kinds("gemma3", **window, **{"attention.sliding_window_pattern": 3}) == [8, 8, 0, 8, 8, 0, 8]
    assert kinds("gemma3") == [0] * 7
    flags = [True, False, False, True, True, True, False]
    listed = kinds("gemma3", lambda w: w.add_sliding_window_pattern(flags), **window)
    assert listed == [8, 0, 0, 8, 8, 8, 0]
    with pytest.raises(ModelError, match="sliding_window_pattern must hold a bool for each of 7 layers"):
        kinds("gemma3", lambda w: w.add_sliding_window_pattern(flags[:3]), **window)


def test_neox_defaults(tmp_path: Path) -> None:
    found = config(tmp_path, "gptneox", **{"rope.dimension_count": 2})
    assert (found["use_parallel_residual"], found["rotary_pct"], found["rotary_emb_base"]) == (True, 0.25, 10000.0)
    assert found["layer_norm_eps"] == 1e-3


@pytest.mark.parametrize(
    ("keys", "edit", "reason"),
    [
        ({"embedding_length": None}, None, r"llama\.embedding_length is missing"),
        ({"block_count": 4}, None, "block_count is 4, the file has 3 tensors"),
        ({"block_count": 2**32 - 1}, None, "block_count is 4294967295"),
        ({"block_count": 0}, None, "block_count is 0"),
        ({"attention.head_count": 0}, None, "head_count must be at least 1"),
        ({"expert_count": 8}, None, "expert_count is 8"),
        ({"attention.value_length": 4}, None, "value_length differs"),
        ({"rope.dimension_count": 4}, None, "rope.dimension_count must be the head size 8"),
        ({"context_length": None}, lambda w: w.add_string("llama.context_length", "long"), "must be one integer"),
        ({}, lambda w: w.add_string("llama.rope.freq_base", "big"), "freq_base must be a number"),
        ({}, lambda w: w.add_uint32("llama.rope.scaling.type", 3), "scaling.type must be a string"),
        ({}, lambda w: w.add_uint16("split.count", 3), "split GGUF"),
    ],
)
def test_keys_that_cannot_be_honoured(keys: dict[str, Any], edit: Edit | None, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"m\.gguf.*{reason}"):
        config(tmp_path, "llama", *([edit] if edit else []), **keys)


def test_an_unknown_architecture_is_named_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"'mamba' is not supported; supported are gemma2, .*llama.*qwen3"):
        config(tmp_path, "mamba")


def test_a_file_without_an_embedding(tmp_path: Path) -> None:
    w = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"):
        w.add_uint32(f"llama.{key}", 1)
    w.add_tensor("x", np.zeros(1, np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    with pytest.raises(ModelError, match=r"'token_embd\.weight' is missing"):
        config_of(GgufFile(tmp_path / "m.gguf"))
