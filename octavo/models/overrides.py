"""Overrides: hf_overrides laid over a model's config, so that each of them counts or is refused.

Owns the old and the new names of one thing (rope_theta and rope_parameters), the nested text_config, and the check of
token ids. It knows no family: whether a name is read is found out by trying. Invariant: a config that is returned does
what its overrides say, and no override is silently without effect.
"""

from collections.abc import Mapping
from typing import Any

from octavo.errors import ModelError
from octavo.models import registry

# Names that config.json files have and that change nothing here.
USELESS = {
    "model_type", "transformers_version", "_name_or_path", "use_cache", "initializer_range", "pad_token_id",
    "attention_dropout", "hidden_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "dropout", "layerdrop",
    "pretraining_tp", "auto_map", "output_attentions", "output_hidden_states", "return_dict", "_attn_implementation",
    "attn_implementation", "unk_token_id", "sep_token_id", "classifier_dropout", "gradient_checkpointing",
}
ELSEWHERE = {"dtype", "torch_dtype", "eos_token_id", "bos_token_id"}  # read by others than the families
# An override of the left one is meant to count: the entries that win over it in a config go.
WINNERS = {
    "torch_dtype": ("dtype",), "max_window_layers": ("layer_types",), "sliding_window_pattern": ("layer_types",),
    "_sliding_window_pattern": ("layer_types", "sliding_window_pattern"), "no_rope_layer_interval": ("no_rope_layers",),
    "rotary_emb_base": ("rope_theta",), "rotary_pct": ("partial_rotary_factor",),
    "rope_parameters": ("rope_theta", "rope_scaling", "rope_local_base_freq", "rotary_emb_base"),
}
OUTER = ("architectures", "quantization_config")
MAX_ID = 2**31


def apply(config: Mapping[str, Any], overrides: Mapping[Any, Any]) -> dict[str, Any]:
    """The config with the overrides in it.

    Raises:
        ModelError: an override that nothing reads, whose name is no string, or that makes the config impossible.
    """
    if not overrides:
        return dict(config)
    for name in overrides:
        if not isinstance(name, str):
            raise ModelError(f"hf_overrides must have strings as names, got {name!r:.200}.", "hf_overrides")
    inner = overrides.get("text_config", {})
    if not isinstance(inner, Mapping):
        raise ModelError(f"text_config in hf_overrides must be an object, got {inner!r:.200}.", "hf_overrides")
    flat = {name: value for name, value in overrides.items() if name != "text_config"} | dict(inner)
    merged = _merged(config, flat)
    expected = registry.spec(merged)
    for name in flat.keys() - USELESS - ELSEWHERE:
        if name in config and config[name] == flat[name]:
            continue  # says what is so anyway
        if not _matters(config, flat, name, expected):
            text = f"hf_overrides has {name!r:.200}, which nothing reads in this model and with these other entries."
            raise ModelError(text, "hf_overrides")
    return merged


def _matters(config: Mapping[str, Any], flat: dict[str, Any], name: str, expected: Any) -> bool:
    """Whether a family reads an override: a value that is of no kind makes it fail, or makes another network."""
    try:
        return bool(registry.spec(_merged(config, flat | {name: object()})) != expected)
    except ModelError:
        return True


def _merged(config: Mapping[str, Any], flat: dict[str, Any]) -> dict[str, Any]:
    merged = _laid_over(config, flat)
    if isinstance(text := config.get("text_config"), Mapping):
        merged["text_config"] = _laid_over(text, {name: v for name, v in flat.items() if name not in OUTER})
    return merged


def _laid_over(config: Mapping[str, Any], flat: dict[str, Any]) -> dict[str, Any]:
    gone = {winner for name in flat for winner in WINNERS.get(name, ())}
    merged = {name: value for name, value in config.items() if name not in gone} | flat
    parameters = merged.get("rope_parameters")
    if "rope_parameters" not in flat and isinstance(parameters, Mapping):
        _rewrite_rope(merged, parameters, flat)
    return merged


def _rewrite_rope(merged: dict[str, Any], parameters: Mapping[str, Any], flat: dict[str, Any]) -> None:
    """Put overrides by the old names of rotary entries into rope_parameters, where the new files have them."""
    nested = "full_attention" in parameters
    made: dict[str, Any] = dict(parameters)
    full = made.get("full_attention") if nested else made
    entries: Any = dict(full) if isinstance(full, Mapping) else {}
    if "rope_scaling" in flat:
        scaling = merged.pop("rope_scaling")
        kept = {name: entries[name] for name in ("rope_theta", "partial_rotary_factor") if name in entries}
        if scaling is not None and not isinstance(scaling, Mapping):
            raise ModelError(f"rope_scaling in hf_overrides must be an object, got {scaling!r:.200}.", "hf_overrides")
        entries = {"rope_type": "default", **kept} if scaling is None else kept | dict(scaling)
    for old, new in (("rotary_emb_base", "rope_theta"), ("rope_theta", "rope_theta"),
                     ("rotary_pct", "partial_rotary_factor"), ("partial_rotary_factor", "partial_rotary_factor")):
        if old in flat:
            entries[new] = merged.pop(old)
    if nested:
        made["full_attention"] = entries
        if "rope_local_base_freq" in flat:
            local = made.get("sliding_attention") or {}
            made["sliding_attention"] = {**local, "rope_theta": merged.pop("rope_local_base_freq")}
    else:
        made = entries
    merged["rope_parameters"] = made


def check_tokens(holder: Mapping[str, Any], config: Mapping[str, Any], where: str) -> None:
    """ModelError for ids of special tokens that are not in the vocabulary; ``where`` says whose they are."""
    inner = config.get("text_config")
    whole = {**config, **inner} if isinstance(inner, Mapping) else config
    size = whole.get("vocab_size")
    limit = size if type(size) is int else MAX_ID
    for name in ("eos_token_id", "bos_token_id"):
        for values in (holder, whole) if holder is config else (holder,):
            value = values.get(name)
            for token in value if isinstance(value, list) and name == "eos_token_id" else [value]:
                if value is not None and (type(token) is not int or not 0 <= token < limit):
                    wanted = f"a token id from 0 to {limit - 1}"
                    raise ModelError(f"{name} in {where} must be {wanted}, got {token!r:.200}.", name)
