"""GGUF names: the tensors of a GGUF file under the names that Hugging Face gives them, in its layout.

Owns one table per GGUF architecture and the undoing of what the converter did to the values: the permuted rows of q and
k (llama), the 1 that is added to norm weights (gemma), the transposed Conv1D of GPT-2 and the separated q, k and v of
GPT-NeoX. It does not read files and knows no parameters of the decoder. Invariant: what leaves this table is exactly
what a Hugging Face checkpoint of the same model holds, so that a family needs one table for both.
"""

from dataclasses import replace

import torch

from octavo.models.names import Name, Transform
from octavo.models.spec import DecoderSpec

# Tensors that gguf_config.py has read into the config, or that hold what we compute ourselves.
IGNORED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", "blk.*.attn_rot_embd.weight")


def _unpermute(tensor: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows of each head from pairs (0, 1), (2, 3), ... back to halves."""
    return tensor.view(num_heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def _unpermute_q(tensor: torch.Tensor, spec: DecoderSpec) -> torch.Tensor:
    return _unpermute(tensor, spec.num_heads)


def _unpermute_k(tensor: torch.Tensor, spec: DecoderSpec) -> torch.Tensor:
    return _unpermute(tensor, spec.num_kv_heads)


def _minus_one(tensor: torch.Tensor, spec: DecoderSpec) -> torch.Tensor:
    return tensor.float() - 1.0


def _transpose(tensor: torch.Tensor, spec: DecoderSpec) -> torch.Tensor:
    return tensor.t()


def _interleave_qkv(tensor: torch.Tensor, spec: DecoderSpec) -> torch.Tensor:
    """Rows [3, heads, head_dim] -> [heads, 3, head_dim]."""
    return tensor.view(3, spec.num_heads, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)


def _both(source: str, target: str, transform: Transform | None = None) -> tuple[Name, Name]:
    """Weight and bias of a linear or a norm."""
    weight = Name(f"{source}.weight", f"{target}.weight", transform)
    return weight, Name(f"{source}.bias", f"{target}.bias", transform)


_OUTSIDE = (
    Name("token_embd.weight", "model.embed_tokens.weight"),
    Name("output_norm.weight", "model.norm.weight"),
    Name("output.weight", "lm_head.weight"),
)

_QWEN = (
    *_OUTSIDE,
    Name("blk.{i}.attn_norm.weight", "model.layers.{i}.input_layernorm.weight"),
    *_both("blk.{i}.attn_q", "model.layers.{i}.self_attn.q_proj"),
    *_both("blk.{i}.attn_k", "model.layers.{i}.self_attn.k_proj"),
    *_both("blk.{i}.attn_v", "model.layers.{i}.self_attn.v_proj"),
    *_both("blk.{i}.attn_output", "model.layers.{i}.self_attn.o_proj"),
    Name("blk.{i}.attn_q_norm.weight", "model.layers.{i}.self_attn.q_norm.weight"),
    Name("blk.{i}.attn_k_norm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
    Name("blk.{i}.ffn_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    *_both("blk.{i}.ffn_gate", "model.layers.{i}.mlp.gate_proj"),
    *_both("blk.{i}.ffn_up", "model.layers.{i}.mlp.up_proj"),
    *_both("blk.{i}.ffn_down", "model.layers.{i}.mlp.down_proj"),
)

_PERMUTED: dict[str, Transform] = {"blk.{i}.attn_q.": _unpermute_q, "blk.{i}.attn_k.": _unpermute_k}
_LLAMA = tuple(
    replace(n, transform=next((f for start, f in _PERMUTED.items() if n.source.startswith(start)), None)) for n in _QWEN
)

_GEMMA_NORMS = {
    "blk.{i}.ffn_norm.weight": "model.layers.{i}.pre_feedforward_layernorm.weight",
    "blk.{i}.post_attention_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blk.{i}.post_ffw_norm.weight": "model.layers.{i}.post_feedforward_layernorm.weight",
}
_GEMMA = (
    *(replace(n, transform=_minus_one if "norm" in n.source else None) for n in _QWEN if n.source not in _GEMMA_NORMS),
    *(Name(source, target, _minus_one) for source, target in _GEMMA_NORMS.items()),
)

_PHI3 = (
    *_OUTSIDE,
    Name("blk.{i}.attn_norm.weight", "model.layers.{i}.input_layernorm.weight"),
    Name("blk.{i}.attn_qkv.weight", "model.layers.{i}.self_attn.qkv_proj.weight"),
    Name("blk.{i}.attn_output.weight", "model.layers.{i}.self_attn.o_proj.weight"),
    Name("blk.{i}.ffn_norm.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    Name("blk.{i}.ffn_up.weight", "model.layers.{i}.mlp.gate_up_proj.weight"),
    Name("blk.{i}.ffn_down.weight", "model.layers.{i}.mlp.down_proj.weight"),
)


def _conv1d(source: str, target: str) -> tuple[Name, Name]:
    return Name(f"{source}.weight", f"{target}.weight", _transpose), Name(f"{source}.bias", f"{target}.bias")


_GPT2 = (
    Name("token_embd.weight", "transformer.wte.weight"),
    Name("position_embd.weight", "transformer.wpe.weight"),
    *_both("output_norm", "transformer.ln_f"),
    Name("output.weight", "lm_head.weight"),
    *_both("blk.{i}.attn_norm", "transformer.h.{i}.ln_1"),
    *_conv1d("blk.{i}.attn_qkv", "transformer.h.{i}.attn.c_attn"),
    *_conv1d("blk.{i}.attn_output", "transformer.h.{i}.attn.c_proj"),
    *_both("blk.{i}.ffn_norm", "transformer.h.{i}.ln_2"),
    *_conv1d("blk.{i}.ffn_up", "transformer.h.{i}.mlp.c_fc"),
    *_conv1d("blk.{i}.ffn_down", "transformer.h.{i}.mlp.c_proj"),
)

_NEOX = (
    Name("token_embd.weight", "gpt_neox.embed_in.weight"),
    *_both("output_norm", "gpt_neox.final_layer_norm"),
    Name("output.weight", "embed_out.weight"),
    *_both("blk.{i}.attn_norm", "gpt_neox.layers.{i}.input_layernorm"),
    *_both("blk.{i}.attn_qkv", "gpt_neox.layers.{i}.attention.query_key_value", _interleave_qkv),
    *_both("blk.{i}.attn_output", "gpt_neox.layers.{i}.attention.dense"),
    *_both("blk.{i}.ffn_norm", "gpt_neox.layers.{i}.post_attention_layernorm"),
    *_both("blk.{i}.ffn_up", "gpt_neox.layers.{i}.mlp.dense_h_to_4h"),
    *_both("blk.{i}.ffn_down", "gpt_neox.layers.{i}.mlp.dense_4h_to_h"),
)

# general.architecture -> table.
TABLES: dict[str, tuple[Name, ...]] = {
    "llama": _LLAMA, "qwen2": _QWEN, "qwen3": _QWEN, "gemma2": _GEMMA, "gemma3": _GEMMA, "phi3": _PHI3, "gpt2": _GPT2,
    "gptneox": _NEOX,
}
