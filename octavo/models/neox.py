"""GPT-NeoX and Pythia: attention and MLP side by side, a part of each head rotated, q, k and v interleaved by head.

Owns the reading of a NeoX config and the names of its tensors. The sequential form of the residual (a config entry) is
an ordinary pre-norm layer.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from octavo.models.entries import Entries
from octavo.models.names import Name
from octavo.models.spec import DecoderSpec, LayerSpec

ARCHITECTURES = ("GPTNeoXForCausalLM",)
# The causal mask and the frequencies, stored as tensors.
IGNORED = ("*.attention.bias", "*.attention.masked_bias", "*.rotary_emb.inv_freq")


def _split_qkv(tensor: Tensor, spec: DecoderSpec) -> tuple[Tensor, ...]:
    """Rows [heads, 3, head_dim] -> q, k, v with rows [heads, head_dim]; weights and biases alike."""
    parts = tensor.view(spec.num_heads, 3, spec.head_dim, *tensor.shape[1:]).unbind(1)
    return tuple(part.flatten(0, 1) for part in parts)


_PLAIN = {
    "gpt_neox.final_layer_norm": "final_norm",
    "gpt_neox.layers.{i}.input_layernorm": "layers.{i}.attn_norm",
    "gpt_neox.layers.{i}.post_attention_layernorm": "layers.{i}.mlp_norm",
    "gpt_neox.layers.{i}.attention.dense": "layers.{i}.attn.o",
    "gpt_neox.layers.{i}.mlp.dense_h_to_4h": "layers.{i}.mlp.up",
    "gpt_neox.layers.{i}.mlp.dense_4h_to_h": "layers.{i}.mlp.down",
}
_QKV = "gpt_neox.layers.{i}.attention.query_key_value"
NAMES = (
    Name("gpt_neox.embed_in.weight", "embed.weight"),
    Name("embed_out.weight", "head.weight"),
    *(Name(f"{a}.{kind}", f"{b}.{kind}") for a, b in _PLAIN.items() for kind in ("weight", "bias")),
    *(
        Name(f"{_QKV}.{kind}", tuple(f"layers.{{i}}.attn.{part}.{kind}" for part in "qkv"), _split_qkv)
        for kind in ("weight", "bias")
    ),
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The network of a GPT-NeoX config."""
    # The rotary entries have names of their own in files from before rope_parameters.
    old = {"partial_rotary_factor": config.get("rotary_pct", 0.25), "rope_theta": config.get("rotary_emb_base")}
    e = Entries.of({**old, **config})
    hidden, num_heads, rows = e.whole("hidden_size"), e.whole("num_attention_heads"), e.whole("vocab_size")
    dim = e.head_dim(hidden, num_heads)
    rope = e.rope(dim)
    bias = e.flag("attention_bias", True)
    return DecoderSpec(
        family="neox",
        vocab_size=rows,
        embedding_rows=rows,
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=dim,
        intermediate=e.whole("intermediate_size"),
        max_len=e.max_len(rope, 2048),
        layers=(LayerSpec(),) * e.layers("num_hidden_layers"),
        ropes=(rope,),
        norm="layer",
        norm_eps=e.number("layer_norm_eps", 1e-5),
        norm_bias=True,
        parallel_residual=e.flag("use_parallel_residual", True),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        attn_scale=dim**-0.5,
        gated=False,
        activation=e.activation("hidden_act", "gelu"),
        tied=e.flag("tie_word_embeddings", False),
        eos_token_ids=e.eos(2),
        bos_token_id=e.bos(0),
    )
