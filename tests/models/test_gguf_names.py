"""GGUF names: a model converted to GGUF is the model, for every architecture that we read."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from convert import converted, write_gguf
from oracle import assert_close, check_family, logits_in_chunks, make_checkpoint
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from octavo.config import EngineConfig
from octavo.errors import ModelError
from octavo.models.decoder import Decoder
from octavo.models.hub import resolve
from octavo.models.loader import load_model

SMALL = {
    "vocab_size": 131, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}
GEMMA = {**SMALL, "head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16}
GPT2 = {"vocab_size": 131, "n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 64}
NEOX = {key: value for key, value in SMALL.items() if "key_value" not in key}
CONFIGS: dict[str, Any] = {
    "llama, tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "llama, biases": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, rms_norm_eps=1e-3),
    "llama, wide heads": LlamaConfig(**SMALL, head_dim=12, rope_parameters={"rope_type": "default", "rope_theta": 7e5}),
    "qwen2": Qwen2Config(**SMALL),
    "qwen3": Qwen3Config(**SMALL, head_dim=12, tie_word_embeddings=True),
    "gemma2": Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=7.0),
    "gemma3": Gemma3TextConfig(**{**GEMMA, "num_hidden_layers": 7}),
    "phi3": Phi3Config(**SMALL, pad_token_id=0, sliding_window=9),
    "gpt2": GPT2Config(**GPT2),
    "gpt2, untied": GPT2Config(**GPT2, tie_word_embeddings=False),
    "neox, parallel": GPTNeoXConfig(**NEOX),
    "neox, sequential": GPTNeoXConfig(
        **NEOX, use_parallel_residual=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
}


def load(path: Path, dtype: torch.dtype = torch.float32, max_model_len: int = 128) -> Decoder:
    config = EngineConfig(model=str(path))
    return load_model(resolve(config), config, dtype, max_model_len)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_converted_model_is_the_model(name: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, CONFIGS[name])
    decoder = load(write_gguf(tmp_path / "model.gguf", model))
    assert (decoder.spec.eos_token_ids, decoder.spec.bos_token_id) == ((5,), 1)
    check_family(decoder, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0"])
def test_quantised_matrices(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The same as the model whose matrices went through the blocks; q and k were permuted before that."""
    config = LlamaConfig(**{**SMALL, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96})
    model = make_checkpoint(tmp_path, config)
    path = write_gguf(tmp_path / "model.gguf", model, quantise=kind)
    stored = gguf.GGMLQuantizationType[kind]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                values = converted(name, parameter, "llama", config).numpy()
                rounded = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values, stored), stored))
                if "q_proj" in name or "k_proj" in name:
                    heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
                    rounded = rounded.reshape(heads, -1, 2, 64).swapaxes(1, 2).reshape(values.shape)
                parameter.copy_(rounded.to(dtype))
    check_family(load(path, dtype), model)


def test_llama3_scaling_comes_as_divisors(tmp_path: Path) -> None:
    """rope_freqs.weight holds what plain frequencies are divided by."""
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
    }
    model = make_checkpoint(tmp_path, LlamaConfig(**SMALL, head_dim=16, rope_parameters=rope))
    plain = 1.0 / 10000.0 ** (torch.arange(0, 16, 2) / 16)
    divisors = (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)
    assert divisors.max() > 7
    decoder = load(write_gguf(tmp_path / "model.gguf", model, extra={"rope_freqs.weight": divisors}))
    check_family(decoder, model)


@pytest.mark.parametrize("max_model_len", [32, 128])
def test_phi3_long_and_short_factors(max_model_len: int, tmp_path: Path) -> None:
    """Both lists come as tensors; max_model_len chooses."""
    rng = np.random.default_rng(0)
    lists = {f"{k}_factor": rng.uniform(1, 4, 4).astype(np.float32) for k in ("long", "short")}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 32,
            **{k: [float(x) for x in v] for k, v in lists.items()}}
    config = Phi3Config(**SMALL, pad_token_id=0, original_max_position_embeddings=32, rope_parameters=rope)
    model = make_checkpoint(tmp_path, config)

    def more(w: gguf.GGUFWriter) -> None:
        w.add_rope_scaling_orig_ctx_len(32)
        w.add_rope_scaling_attn_factors((1 + np.log(4) / np.log(32)) ** 0.5)

    extra = {f"rope_factors_{k}.weight": lists[f"{k}_factor"] for k in ("long", "short")}
    path = write_gguf(tmp_path / "model.gguf", model, extra=extra, more=more)
    ids = torch.randint(0, 131, (30 if max_model_len == 32 else 45,))  # transformers chooses by the longest sequence
    with torch.no_grad():
        theirs = model(ids[None]).logits[0]
    assert_close(logits_in_chunks(load(path, max_model_len=max_model_len), ids, (7,)), theirs)


@pytest.mark.parametrize(
    "name", ["blk.0.attn_sinks.weight", "blk.3.ffn_up.weight", "extra", "blk.0.attn_q_norm.weight"]
)
def test_a_left_over_tensor_is_named(name: str, tmp_path: Path) -> None:
    """Unknown ones by their GGUF name, known ones of another network by the name they stand for."""
    model = make_checkpoint(tmp_path, CONFIGS["llama, tied"])
    path = write_gguf(tmp_path / "model.gguf", model, extra={name: np.ones((4, 4), np.float32)})
    shown = {"blk.3.ffn_up.weight": "model.layers.3.mlp.up_proj.weight"}.get(name, name)
    shown = shown.replace("blk.0.attn_q_norm", "model.layers.0.self_attn.q_norm")
    with pytest.raises(ModelError, match=f"nothing uses: {shown}"):
        load(path)
