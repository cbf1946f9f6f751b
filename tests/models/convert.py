"""A transformers model as a GGUF file, as llama.cpp's converter would write it: names from the gguf package, and the
changes of values written down here once more, the other way round."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

ARCHITECTURES = {
    "LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3", "Phi3ForCausalLM": "phi3",
    "Gemma2ForCausalLM": "gemma2", "Gemma3ForCausalLM": "gemma3", "GPT2LMHeadModel": "gpt2",
    "GPTNeoXForCausalLM": "gptneox",
}


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a head from halves to pairs, for llama.cpp's interleaved rotation."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def converted(name: str, tensor: torch.Tensor, architecture: str, config: Any) -> torch.Tensor:
    """The values that the converter stores."""
    if architecture == "llama" and ".q_proj." in name:
        return permute(tensor, config.num_attention_heads)
    if architecture == "llama" and ".k_proj." in name:
        return permute(tensor, config.num_key_value_heads)
    if architecture.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1
    if architecture == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return tensor.transpose(1, 0)
    if architecture == "gptneox" and ".query_key_value." in name:
        heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
        split = tensor.reshape(heads, 3, size, *tensor.shape[1:])
        return torch.cat([split[:, i].reshape(heads * size, *tensor.shape[1:]) for i in range(3)])
    return tensor


def common_keys(w: gguf.GGUFWriter, c: Any) -> None:
    """Keys of the networks with RMS norms."""
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_block_count(c.num_hidden_layers)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    head_dim = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    if head_dim * c.num_attention_heads != c.hidden_size:
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)
    rope = c.rope_parameters.get("full_attention", c.rope_parameters)
    w.add_rope_freq_base(rope["rope_theta"])
    w.add_rope_dimension_count(int(head_dim * rope.get("partial_rotary_factor", 1.0)))


def keys(w: gguf.GGUFWriter, architecture: str, c: Any) -> None:
    """The metadata of a config."""
    if architecture == "gpt2":
        w.add_context_length(c.n_positions)
        w.add_embedding_length(c.n_embd)
        w.add_block_count(c.n_layer)
        w.add_feed_forward_length(c.n_inner or 4 * c.n_embd)
        w.add_head_count(c.n_head)
        w.add_layer_norm_eps(c.layer_norm_epsilon)
    elif architecture == "gptneox":
        w.add_context_length(c.max_position_embeddings)
        w.add_embedding_length(c.hidden_size)
        w.add_block_count(c.num_hidden_layers)
        w.add_feed_forward_length(c.intermediate_size)
        size = c.hidden_size // c.num_attention_heads
        w.add_rope_dimension_count(int(c.rope_parameters["partial_rotary_factor"] * size))
        w.add_head_count(c.num_attention_heads)
        w.add_parallel_residual(c.use_parallel_residual)
        w.add_layer_norm_eps(c.layer_norm_eps)
    else:
        common_keys(w, c)
        if architecture in ("gemma2", "gemma3", "phi3"):
            w.add_sliding_window(c.sliding_window or 0)
        if architecture == "gemma2":
            w.add_attn_logit_softcapping(c.attn_logit_softcapping)
            w.add_final_logit_softcapping(c.final_logit_softcapping)


def write_gguf(
    path: Path, model: Any, *, quantise: str | None = None, extra: dict[str, np.ndarray] | None = None, more: Any = None
) -> Path:
    """Write a model.

    Args:
        path: of the file. model: by transformers.
        quantise: type of the matrices whose rows divide into blocks; the others stay F32.
        extra: further tensors. more: called with the writer, for further keys.
    """
    config = model.config
    architecture = ARCHITECTURES[type(model).__name__]
    number = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    layers = getattr(config, "num_hidden_layers", None) or config.n_layer
    names = gguf.get_tensor_name_map(number, layers)
    writer = gguf.GGUFWriter(path, architecture)
    keys(writer, architecture, config)
    writer.add_eos_token_id(5)
    writer.add_bos_token_id(1)
    if more:
        more(writer)
    for name, tensor in model.state_dict().items():
        if name in ("lm_head.weight", "embed_out.weight") and config.tie_word_embeddings:
            continue
        stored = converted(name, tensor, architecture, config).contiguous().float().numpy()
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert target is not None, name
        block = {None: 0, "Q4_1": 32, "Q8_0": 32}[quantise]
        if block and stored.ndim == 2 and stored.shape[1] % block == 0:
            kind = gguf.GGMLQuantizationType[quantise]
            writer.add_tensor(target, gguf.quants.quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(target, stored)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
