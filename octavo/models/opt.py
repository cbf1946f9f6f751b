"""OPT: learned positions that begin at row 2, ReLU, and the odd one of the family, the 350m.

Owns the reading of an OPT config and the names of its tensors. The 350m has its norms after the sublayers, none at the
end, and embeddings narrower than the network with a projection on either side.
"""

from collections.abc import Mapping
from typing import Any

from octavo.models.entries import Entries
from octavo.models.names import Name, under
from octavo.models.spec import DecoderSpec, LayerSpec

ARCHITECTURES = ("OPTForCausalLM",)
IGNORED = ("*decoder.version",)

POSITION_OFFSET = 2
_PLAIN = {
    "final_layer_norm": "final_norm",
    "layers.{i}.self_attn_layer_norm": "layers.{i}.attn_norm",
    "layers.{i}.final_layer_norm": "layers.{i}.mlp_norm",
    **{f"layers.{{i}}.self_attn.{part}_proj": f"layers.{{i}}.attn.{part}" for part in "qkv"},
    "layers.{i}.self_attn.out_proj": "layers.{i}.attn.o",
    "layers.{i}.fc1": "layers.{i}.mlp.up",
    "layers.{i}.fc2": "layers.{i}.mlp.down",
}
NAMES = (
    Name("lm_head.weight", "head.weight"),
    *under(("model.decoder.", "decoder."), (
        Name("embed_tokens.weight", "embed.weight"),
        Name("embed_positions.weight", "positions.weight"),
        Name("project_in.weight", "project_in.weight"),
        Name("project_out.weight", "project_out.weight"),
        *(Name(f"{a}.{kind}", f"{b}.{kind}") for a, b in _PLAIN.items() for kind in ("weight", "bias")),
    )),
)


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The network of an OPT config."""
    e = Entries.of(config)
    e.only("layer_norm_elementwise_affine", True)
    hidden, num_heads, rows = e.whole("hidden_size"), e.whole("num_attention_heads"), e.whole("vocab_size")
    dim = e.head_dim(hidden, num_heads)
    width, length = e.whole("word_embed_proj_dim", hidden), e.whole("max_position_embeddings", 2048)
    before, bias = e.flag("do_layer_norm_before", True), e.flag("enable_bias", True)
    return DecoderSpec(
        family="opt",
        vocab_size=rows,
        embedding_rows=rows,
        hidden=hidden,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=dim,
        intermediate=e.whole("ffn_dim"),
        max_len=length,
        layers=(LayerSpec(rope=None),) * e.layers("num_hidden_layers"),
        norm="layer",
        norm_eps=1e-5,
        norm_bias=True,
        norm_placement="pre" if before else "post",
        final_norm=before and not e.flag("_remove_final_layer_norm", False),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=bias,
        attn_scale=dim**-0.5,
        gated=False,
        activation=e.activation("activation_function", "relu"),
        positions=length + POSITION_OFFSET,
        position_offset=POSITION_OFFSET,
        embedding_dim=width if width != hidden else 0,
        tied=e.flag("tie_word_embeddings", True),
        eos_token_ids=e.eos(2),
        bos_token_id=e.bos(2),
    )
