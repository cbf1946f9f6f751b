"""Gemma 2 and 3: four norms a layer with weights stored as w for 1 + w, windows on most layers, scaled embeddings.

Owns the reading of both configs and the names of their tensors. Gemma 2 caps scores and logits by tanh; Gemma 3 norms q
and k instead and rotates its windowed layers with a base of their own. Of a Gemma 3 with images only the language model
is read.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from octavo.errors import ModelError
from octavo.models.entries import Entries, agree
from octavo.models.llama import llama_like
from octavo.models.names import Name, under
from octavo.models.spec import DecoderSpec, LayerSpec, RopeSpec

ARCHITECTURES = ("Gemma2ForCausalLM", "Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
IGNORED = ("*.rotary_emb.*inv_freq", "*vision_tower.*", "*multi_modal_projector.*")

_ROOTS = ("model.", "model.language_model.", "language_model.model.")
_NORMS = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "mlp_norm", "post_feedforward_layernorm": "mlp_post_norm",
    "self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm",
    **{f"mlp.{part}_proj": f"mlp.{part}" for part in ("gate", "up", "down")},
}
NAMES = (
    *under(("", "language_model."), (Name("lm_head.weight", "head.weight"),)),
    *under(_ROOTS, (
        Name("embed_tokens.weight", "embed.weight"),
        Name("norm.weight", "final_norm.weight"),
        *(Name(f"layers.{{i}}.{a}.weight", f"layers.{{i}}.{b}.weight") for a, b in _NORMS.items()),
        *(
            Name(f"layers.{{i}}.self_attn.{part}_proj.{kind}", f"layers.{{i}}.attn.{part}.{kind}")
            for part in "qkvo" for kind in ("weight", "bias")
        ),
    )),
)

# What transformers takes where the config is silent; published configs leave out much of it.
_DEFAULTS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "rms_norm_eps": 1e-6}


def spec(config: Mapping[str, Any]) -> DecoderSpec:
    """The network of a Gemma 2 or Gemma 3 config."""
    if "Gemma2ForCausalLM" in config["architectures"]:
        return _gemma2(Entries.of({**_DEFAULTS, **config}, known=("attn_logit_softcapping", "final_logit_softcapping")))
    defaults = {**_DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072}
    return _gemma3(Entries.of({**defaults, **config}, known=("final_logit_softcapping",)))


def _gemma(e: Entries, base: DecoderSpec, family: str, windows: tuple[int, ...]) -> DecoderSpec:
    """What both have."""
    e.only("use_bidirectional_attention", False)
    bias = e.flag("attention_bias", False)
    scalar = e.number("query_pre_attn_scalar", 256)
    if scalar <= 0:
        text = f"query_pre_attn_scalar in the config must be positive, got {scalar}."
        raise ModelError(text, "query_pre_attn_scalar")
    return replace(
        base,
        family=family,
        layers=tuple(LayerSpec(window=w) for w in windows),
        norm_offset=1.0,
        norm_placement="sandwich",
        qkv_bias=bias,
        out_bias=bias,
        attn_scale=scalar**-0.5,
        activation=e.activation("hidden_activation", "gelu_pytorch_tanh"),
        embedding_scale=math.sqrt(base.hidden),
        eos_token_ids=e.eos(1),
        bos_token_id=e.bos(2),
    )


def _gemma2(e: Entries) -> DecoderSpec:
    base = llama_like(e, "gemma2", tied=True)
    window = e.whole("sliding_window", 4096)
    windows = e.windows(base.num_layers, window, tuple((i + 1) % 2 != 0 for i in range(base.num_layers)))
    return replace(
        _gemma(e, base, "gemma2", windows),
        attn_softcap=_softcap(e, "attn_logit_softcapping", 50.0),
        logit_softcap=_softcap(e, "final_logit_softcapping", 30.0),
    )


def _gemma3(e: Entries) -> DecoderSpec:
    full, local = _two_ropes(e)
    # The rope entries are read here: llama_like knows one table, and not those nested by type of layer.
    flat = Entries({k: v for k, v in e.values.items() if k not in ("rope_parameters", "rope_scaling")})
    base = llama_like(flat, "gemma3", tied=True)
    period = e.whole("sliding_window_pattern", e.whole("_sliding_window_pattern", 6))
    if period < 1:
        text = f"sliding_window_pattern in the config must be at least 1, got {period}."
        raise ModelError(text, "sliding_window_pattern")
    sliding = tuple((i + 1) % period != 0 for i in range(base.num_layers))
    windows = e.windows(base.num_layers, e.whole("sliding_window", 4096), sliding)
    found = replace(
        _gemma(e, base, "gemma3", windows), qk_norm=True, ropes=(full, local),
        logit_softcap=_softcap(e, "final_logit_softcapping", 0.0),
    )
    return replace(found, layers=tuple(replace(layer, rope=1 if layer.window else 0) for layer in found.layers))


def _two_ropes(e: Entries) -> tuple[RopeSpec, RopeSpec]:
    """The tables of full and of windowed layers: nested by type of layer (new), or told apart by name (old)."""
    dim = e.whole("head_dim")
    if not e.has("rope_parameters"):
        local = Entries({"rope_theta": e.number("rope_local_base_freq", 10000.0)})
        return e.rope(dim, base=1e6), local.rope(dim)
    nested = e.values["rope_parameters"]
    if not isinstance(nested, Mapping) or not nested.keys() <= {"full_attention", "sliding_attention"}:
        text = f"rope_parameters in the config must hold full_attention and sliding_attention, got {nested!r}."
        raise ModelError(text, "rope_parameters")
    agree(e, nested.get("full_attention"), theta="rope_theta", scaling="rope_scaling", where="rope_parameters.full_attention")
    agree(e, nested.get("sliding_attention"), theta="rope_local_base_freq", where="rope_parameters.sliding_attention")
    inner = Entries({k: e.values.get(k) for k in ("rope_parameters", "max_position_embeddings")})
    return inner.rope(dim, base=1e6, nested="full_attention"), inner.rope(dim, base=1e4, nested="sliding_attention")


def _softcap(e: Entries, name: str, default: float) -> float:
    """A cap: null switches it off, silence means the default."""
    return 0.0 if name in e.values and not e.has(name) else e.number(name, default)
