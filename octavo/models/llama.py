"""Llama 1, 2 and 3, SmolLM2 and whatever else calls itself LlamaForCausalLM.

Owns the reading of a Llama config and the names of its tensors; families that grew out of Llama (mistral, qwen, phi3,
smollm3) start from ``llama_like`` and state only what differs. It does not know tensors' contents.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.models.entries import Entries
from octavo.models.names import Name
from octavo.models.spec import DecoderSpec, LayerSpec

ARCHITECTURES = ("LlamaForCausalLM",)
IGNORED = ("*.rotary_emb.inv_freq",)

_LAYER = "model.layers.{i}."
OUTER_NAMES = (
    Name("model.embed_tokens.weight", "embed.weight"),
    Name("model.norm.weight", "final_norm.weight"),
    Name("lm_head.weight", "head.weight"),
    Name(_LAYER + "input_layernorm.weight", "layers.{i}.attn_norm.weight"),
    Name(_LAYER + "post_attention_layernorm.weight", "layers.{i}.mlp_norm.weight"),
)
NAMES = (
    *OUTER_NAMES,
    *(
        Name(f"{_LAYER}{theirs}.{part}_proj.{kind}", f"layers.{{i}}.{ours}.{part}.{kind}")
        for theirs, ours, parts in (("self_attn", "attn", ("q", "k", "v", "o")), ("mlp", "mlp", ("gate", "up", "down")))
        for part in parts
        for kind in ("weight", "bias")
    ),
)


def llama_like(
    e: Entries, family: str, *, tied: bool = False, rope_base: float = 10000.0, head_dim: int | None = None
) -> DecoderSpec:
    """The spec of a Llama without biases: RMSNorm before both sublayers, rotary positions, a gated MLP.

    Args:
        e: the config. family: for messages. tied, rope_base, head_dim: the family's defaults where the config has
            no entry.
    """
    hidden, num_heads = e.whole("hidden_size"), e.whole("num_attention_heads")
    dim = e.head_dim(hidden, num_heads, head_dim)
    rope = e.rope(dim, base=rope_base)
    rows = e.whole("vocab_size")
    return DecoderSpec(
        family=family,
        vocab_size=rows,
        embedding_rows=rows,
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=e.whole("num_key_value_heads", num_heads),
        head_dim=dim,
        intermediate=e.whole("intermediate_size"),
        max_len=e.max_len(rope, 2048),
        layers=(LayerSpec(),) * e.layers("num_hidden_layers"),
        ropes=(rope,),
        norm_eps=e.number("rms_norm_eps", 1e-6),
        attn_scale=dim**-0.5,
        activation=e.activation("hidden_act", "silu"),
        tied=e.flag("tie_word_embeddings", tied),
        eos_token_ids=e.eos(),
        bos_token_id=e.bos(),
    )


def with_biases(spec: DecoderSpec, e: Entries) -> DecoderSpec:
    """The spec with the biases that a config asks for: attention's four projections, the MLP's three."""
    attention = e.flag("attention_bias", False)
    return replace(spec, qkv_bias=attention, out_bias=attention, mlp_bias=e.flag("mlp_bias", False))


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The network of a Llama config."""
    e = Entries.of(config)
    return with_biases(llama_like(e, "llama"), e)
