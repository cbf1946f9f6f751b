"""Entries: config.json as typed questions, in the shapes of old and new Hugging Face checkpoints.

Owns the reading of single entries, of rotary parameters and of layer types, and the list of entries that change a
network's maths. It knows no family. Invariant: an entry is understood, known to change nothing, or refused by a
ModelError that names it and its value; JSON's null counts as absent.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from octavo.errors import ModelError
from octavo.models.spec import Activation, RopeSpec

# Entries of families that we do not have: a value other than these means a computation that we would leave out.
FOREIGN: dict[str, tuple[Any, ...]] = {
    "quantization_config": ({},),
    "num_experts": (0, 1), "num_local_experts": (0, 1), "n_routed_experts": (0,), "moe_intermediate_size": (0,),
    "attn_logit_softcapping": (), "final_logit_softcapping": (), "logit_softcap": (), "use_qk_norm": (False,),
    "qk_layernorm": (False,), "clip_qkv": (), "alibi": (False,), "use_alibi": (False,), "parallel_attn": (False,),
    "embedding_multiplier": (1,), "residual_multiplier": (1,), "attention_multiplier": (), "logits_scaling": (1,),
    "logit_scale": (1,), "scale_emb": (1,), "scale_depth": (1,), "mup_width_scale": (1,), "attention_chunk_size": (),
    "dual_chunk_attention_config": (), "attention_sinks": (False,), "kv_lora_rank": (), "q_lora_rank": (),
    "add_cross_attention": (False,), "is_encoder_decoder": (False,), "num_kv_shared_layers": (0,),
    "lm_head_bias": (False,), "o_bias": (False,), "rope_interleaved": (False,), "rope_interleave": (False,),
}
ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu", "swish": "silu", "relu": "relu", "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
}
SCALINGS = {
    "default": "none", "none": "none", "linear": "linear", "dynamic": "dynamic", "llama3": "llama3", "yarn": "yarn",
    "longrope": "longrope", "su": "longrope",
}
MAX_LAYERS = 2000  # far beyond any network: a mistyped number must not build layers for hours
_ROPE_ENTRIES = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim",
    "truncate", "short_factor", "long_factor",
    "finetuned",  # says how a yarn checkpoint was made; it changes nothing
}


@dataclass(frozen=True, slots=True)
class Entries:
    """A config.json.

    Attributes:
        values: the entries of the language model; those of a nested text_config lie over the outer ones.
    """

    values: Mapping[str, Any]

    @classmethod
    def of(cls, config: Mapping[str, Any], *, known: tuple[str, ...] = ()) -> "Entries":
        """Read a config; ``known`` are entries of FOREIGN that the family computes.

        Raises:
            ModelError: an entry of another family's maths has a value that matters.
        """
        inner = config.get("text_config")
        entries = cls({**config, **inner} if isinstance(inner, Mapping) else config)
        for name, neutral in FOREIGN.items():
            if name not in known:
                entries.only(name, *neutral)
        return entries

    def has(self, name: str) -> bool:
        """True where the entry exists and is not null."""
        return self.values.get(name) is not None

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number."""
        value = self._value(name, default)
        if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and value.is_integer())):
            raise _wrong(name, "a whole number", value)
        return int(value)

    def number(self, name: str, default: float | None = None) -> float:
        """A number."""
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise _wrong(name, "a number", value)
        if not math.isfinite(value):
            raise _wrong(name, "a finite number", value)
        return float(value)

    def layers(self, name: str) -> int:
        """The number of layers, checked before anything is made of it."""
        count = self.whole(name)
        if not 1 <= count <= MAX_LAYERS:
            raise _wrong(name, f"from 1 to {MAX_LAYERS}", count)
        return count

    def flag(self, name: str, default: bool) -> bool:
        """true or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise _wrong(name, "true or false", value)
        return value

    def activation(self, name: str, default: str | None = None) -> Activation:
        """An activation, by any of the names that Hugging Face has for it."""
        value = self._value(name, default)
        if value not in ACTIVATIONS:
            raise _wrong(name, f"one of {', '.join(sorted(ACTIVATIONS))}", value)
        return ACTIVATIONS[value]

    def only(self, name: str, *accepted: Any) -> None:
        """Refuse every value but the accepted ones (and null)."""
        if self.has(name) and self.values[name] not in accepted:
            raise ModelError(f"{name} = {self.values[name]!r} in the config is not supported.", name)

    def head_dim(self, hidden: int, num_heads: int, default: int | None = None) -> int:
        """``head_dim``, else the default, else hidden / heads, which must come out even."""
        if self.has("head_dim") or default is not None:
            return self.whole("head_dim", default)
        if num_heads < 1 or hidden % num_heads:
            text = f"hidden_size {hidden} is not a multiple of num_attention_heads {num_heads}"
            raise ModelError(f"{text}, and the config has no head_dim.", "num_attention_heads")
        return hidden // num_heads

    def eos(self, default: int | None = None) -> tuple[int, ...]:
        """The end tokens: the config has a number, a list or nothing."""
        value = self.values.get("eos_token_id", default)
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(v) is int for v in found):
            raise _wrong("eos_token_id", "a token id or a list of them", value)
        return tuple(found)

    def bos(self, default: int | None = None) -> int | None:
        """The token that begins a text, or None; null says that there is none."""
        if self.values.get("bos_token_id", default) is None:
            return None
        return self.whole("bos_token_id", default)

    def windows(self, num_layers: int, window: int, sliding: tuple[bool, ...]) -> tuple[int, ...]:
        """Window per layer.

        Args:
            num_layers: layers. window: of sliding layers, 0 where there is none. sliding: which layers slide where the
                config has no ``layer_types``.
        """
        if not self.has("layer_types"):
            return tuple(window if slides else 0 for slides in sliding)
        kinds = self.values["layer_types"]
        if not isinstance(kinds, list) or len(kinds) != num_layers:
            raise _wrong("layer_types", f"a list of {num_layers} names", kinds)
        for kind in kinds:
            if kind not in ("full_attention", "sliding_attention"):
                known = "full_attention and sliding_attention"
                raise ModelError(f"layer_types has {kind!r}; known are {known}.", "layer_types")
            if kind == "sliding_attention" and not window:
                raise ModelError("layer_types has sliding_attention, but sliding_window is not in use.", "layer_types")
        return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)

    def rope(self, head_dim: int, *, base: float = 10000.0, nested: str | None = None) -> RopeSpec:
        """The rotary parameters: ``rope_parameters`` (new), or ``rope_scaling`` and ``rope_theta`` (old).

        Args:
            head_dim: of the attention. base: where the config has none. nested: the layer type under which
                ``rope_parameters`` holds the entries, for families with several tables.

        Raises:
            ModelError: a type that is not known, an entry that is not known, or one of the wrong kind.
        """
        return _rope(self, self._rope_entries(nested), head_dim, base)

    def max_len(self, rope: RopeSpec, default: int | None = None) -> int:
        """Positions the model was made for: old configs name the length before stretching."""
        length = self.whole("max_position_embeddings", default)
        trained = {"linear": length, "dynamic": length, "yarn": rope.original_max_len}.get(rope.scaling, 0)
        return max(length, int(trained * rope.factor))

    def _rope_entries(self, nested: str | None) -> "Entries":
        name = "rope_parameters" if self.has("rope_parameters") else "rope_scaling"
        found = self.values.get(name)
        if nested is not None and isinstance(found, Mapping):
            found = found.get(nested)
        elif name == "rope_parameters":
            agree(self, found, theta="rope_theta", scaling="rope_scaling")
        if found is None:
            return Entries({})
        if not isinstance(found, Mapping):
            raise _wrong(name, "an object", found)
        unknown = sorted(set(found) - _ROPE_ENTRIES)
        if unknown:
            raise ModelError(f"{name} has entries that are not supported: {', '.join(unknown)}.", name)
        return Entries(found)

    def _value(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            value = default
        if value is None:
            raise ModelError(f"{name} is missing in the config.", name)
        return value


def _rope(config: Entries, r: Entries, head_dim: int, base: float) -> RopeSpec:
    kind = r.values.get("rope_type") or r.values.get("type") or "default"
    if kind not in SCALINGS:
        raise ModelError(f"rope type {kind!r} is not known; known are {', '.join(SCALINGS)}.", "rope_type")
    scaling = SCALINGS[kind]
    partial = r.number("partial_rotary_factor", config.number("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * partial)
    original = factor = 0.0
    if scaling != "none":
        length = config.whole("max_position_embeddings", 0) or None
        trained = r.whole("original_max_position_embeddings", length) if scaling != "dynamic" else length
        # An entry beside the others wins, as Phi-3 writes it; dynamic scaling begins where the model's own length ends.
        original = config.whole("original_max_position_embeddings", trained) if scaling != "dynamic" else trained or 0
        stretch = (length or original) / original if scaling in ("yarn", "longrope") and original else None
        factor = r.number("factor", stretch)
        if factor <= 0:
            raise _wrong("the rope's factor", "positive", factor)
    return RopeSpec(
        base=r.number("rope_theta", config.number("rope_theta", base)),
        rotary_dim=rotary_dim,
        scaling=cast(Any, scaling),
        factor=factor if scaling != "none" else 1.0,
        original_max_len=int(original),
        low_freq_factor=r.number("low_freq_factor") if scaling == "llama3" else 1.0,
        high_freq_factor=r.number("high_freq_factor") if scaling == "llama3" else 4.0,
        beta_fast=r.number("beta_fast", 32.0) or 32.0,
        beta_slow=r.number("beta_slow", 1.0) or 1.0,
        attention_factor=r.number("attention_factor") if r.has("attention_factor") else None,
        mscale=r.number("mscale") if r.has("mscale") else None,
        mscale_all_dim=r.number("mscale_all_dim") if r.has("mscale_all_dim") else None,
        truncate=r.flag("truncate", True),
        short_factor=_divisors(r, "short_factor", rotary_dim) if scaling == "longrope" else (),
        long_factor=_divisors(r, "long_factor", rotary_dim) if scaling == "longrope" else (),
    )


def _divisors(r: Entries, name: str, rotary_dim: int) -> tuple[float, ...]:
    value = r.values.get(name)
    good = isinstance(value, list) and len(value) == rotary_dim // 2
    if not good or not all(isinstance(v, int | float) and v > 0 for v in value or ()):
        raise _wrong(name, f"a list of {rotary_dim // 2} positive numbers", value)
    return tuple(float(v) for v in value or ())


def agree(config: Entries, parameters: Any, *, theta: str, scaling: str = "", where: str = "rope_parameters") -> None:
    """ModelError where a config holds its rotary entries in the new form and in the old one, and they disagree."""
    if not isinstance(parameters, Mapping):
        return
    pairs = [(theta, config.values.get(theta), parameters.get("rope_theta"))]
    old = config.values.get(scaling)
    if isinstance(old, Mapping):
        kind, new_kind = (str(m.get("rope_type") or m.get("type") or "default") for m in (old, parameters))
        pairs.append((scaling, SCALINGS.get(kind, kind), SCALINGS.get(new_kind, new_kind)))
        rest = [key for key in old if key not in ("rope_type", "type")]
        pairs += [(f"{scaling}.{key}", old[key], parameters.get(key, None if key == "rope_theta" else "nothing")) for key in rest]
    for name, before, now in pairs:
        if before is not None and now is not None and before != now:
            text = f"the config holds {name} ({before!r:.80}) and {where} ({now!r:.80}), and they disagree; keep one"
            raise ModelError(f"{text}.", "rope_parameters")


def _wrong(name: str, wanted: str, value: Any) -> ModelError:
    return ModelError(f"{name} in the config must be {wanted}, got {value!r:.200}.", name)
