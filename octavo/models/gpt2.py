"""GPT-2: learned positions, LayerNorm with bias, and matrices that the checkpoint keeps as [in, out].

Owns the reading of a GPT-2 config and the names of its tensors, which begin with ``transformer.`` in files that
transformers wrote and with nothing in the original ones.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from octavo.models.entries import Entries
from octavo.models.names import Name, under
from octavo.models.spec import DecoderSpec, LayerSpec

ARCHITECTURES = ("GPT2LMHeadModel",)
IGNORED = ("*.attn.bias", "*.attn.masked_bias")  # the causal mask, stored as a tensor


def _transposed(tensor: Tensor, spec: DecoderSpec) -> Tensor:
    """[in, out] -> [out, in]."""
    return tensor.t()


def _split_weight(tensor: Tensor, spec: DecoderSpec) -> tuple[Tensor, ...]:
    """[hidden, 3 * hidden] -> q, k, v as [out, in]."""
    return torch.split(tensor.t(), spec.hidden)


def _split_bias(tensor: Tensor, spec: DecoderSpec) -> tuple[Tensor, ...]:
    return torch.split(tensor, spec.hidden)


_NORMS = {"h.{i}.ln_1": "layers.{i}.attn_norm", "h.{i}.ln_2": "layers.{i}.mlp_norm", "ln_f": "final_norm"}
_MATRICES = {
    "h.{i}.attn.c_proj": "layers.{i}.attn.o",
    "h.{i}.mlp.c_fc": "layers.{i}.mlp.up",
    "h.{i}.mlp.c_proj": "layers.{i}.mlp.down",
}
NAMES = (
    Name("lm_head.weight", "head.weight"),
    *under(("", "transformer."), (
        Name("wte.weight", "embed.weight"),
        Name("wpe.weight", "positions.weight"),
        *(Name(f"{a}.{kind}", f"{b}.{kind}") for a, b in _NORMS.items() for kind in ("weight", "bias")),
        Name("h.{i}.attn.c_attn.weight", tuple(f"layers.{{i}}.attn.{part}.weight" for part in "qkv"), _split_weight),
        Name("h.{i}.attn.c_attn.bias", tuple(f"layers.{{i}}.attn.{part}.bias" for part in "qkv"), _split_bias),
        *(Name(f"{a}.weight", f"{b}.weight", _transposed) for a, b in _MATRICES.items()),
        *(Name(f"{a}.bias", f"{b}.bias") for a, b in _MATRICES.items()),
    )),
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The network of a GPT-2 config."""
    e = Entries.of(config)
    e.only("scale_attn_by_inverse_layer_idx", False)
    hidden, num_heads, rows = e.whole("n_embd"), e.whole("n_head"), e.whole("vocab_size")
    dim = e.head_dim(hidden, num_heads)
    return DecoderSpec(
        family="gpt2",
        vocab_size=rows,
        embedding_rows=rows,
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=dim,
        intermediate=e.whole("n_inner", 4 * hidden),
        max_len=e.whole("n_positions", 1024),
        layers=(LayerSpec(rope=None),) * e.layers("n_layer"),
        norm="layer",
        norm_eps=e.number("layer_norm_epsilon", 1e-5),
        norm_bias=True,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        attn_scale=dim**-0.5 if e.flag("scale_attn_weights", True) else 1.0,
        gated=False,
        activation=e.activation("activation_function", "gelu_new"),
        positions=e.whole("n_positions", 1024),
        tied=e.flag("tie_word_embeddings", True),
        eos_token_ids=e.eos(50256),
        bos_token_id=e.bos(50256),
    )
