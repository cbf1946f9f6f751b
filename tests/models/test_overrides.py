"""Overrides: every hf_override counts or is refused, by old and by new names."""

from typing import Any

import pytest

from octavo.errors import ModelError
from octavo.models import registry
from octavo.models.overrides import USELESS, apply

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}
NEW = LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}}
SMALL_GEMMA = LLAMA | {"head_dim": 8, "sliding_window": 16, "num_hidden_layers": 4}
ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA = SMALL_GEMMA | {"architectures": ["Gemma3ForCausalLM"], "rope_parameters": ROPES}
NEOX = LLAMA | {"architectures": ["GPTNeoXForCausalLM"]}


def ropes(config: dict[str, Any], overrides: dict[str, Any]) -> list[tuple[float, str, float]]:
    return [(r.base, r.scaling, r.factor) for r in registry.spec(apply(config, overrides)).ropes]


def test_old_names_win_over_rope_parameters() -> None:
    assert ropes(NEW, {}) == [(1e6, "linear", 2.0)]
    assert ropes(NEW, {"rope_theta": 5.0}) == [(5.0, "linear", 2.0)]
    dynamic = {"rope_type": "dynamic", "factor": 4.0}
    assert ropes(NEW, {"rope_scaling": dynamic}) == [(1e6, "dynamic", 4.0)]
    assert ropes(NEW, {"rope_scaling": dynamic, "rope_theta": 5.0}) == [(5.0, "dynamic", 4.0)]
    assert ropes(NEW, {"rope_scaling": None}) == [(1e6, "none", 1.0)]
    assert registry.spec(apply(NEW, {"partial_rotary_factor": 0.5})).ropes[0].rotary_dim == 4


def test_new_names_win_over_old_ones() -> None:
    old = LLAMA | {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert ropes(old, {}) == [(1e6, "linear", 2.0)]
    assert ropes(old, {"rope_parameters": {"rope_theta": 7.0}}) == [(7.0, "none", 1.0)]
    with pytest.raises(ModelError, match=r"rope_theta .* and rope_parameters"):
        apply(old, {"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 8.0})


def test_two_tables() -> None:
    assert ropes(GEMMA, {"rope_theta": 5.0}) == [(5.0, "linear", 8.0), (1e4, "none", 1.0)]
    assert ropes(GEMMA, {"rope_local_base_freq": 7.0}) == [(1e6, "linear", 8.0), (7.0, "none", 1.0)]
    assert ropes(GEMMA, {"rope_scaling": None}) == [(1e6, "none", 1.0), (1e4, "none", 1.0)]
    for name in ("rope_theta", "rope_local_base_freq"):
        with pytest.raises(ModelError, match=name):
            registry.spec(GEMMA | {name: 3.0})


def test_the_names_of_neox() -> None:
    for config in (NEOX, NEOX | {"rope_parameters": {"rope_theta": 1e6}}, NEOX | {"rope_theta": 1e6}):
        assert ropes(config, {"rotary_emb_base": 5.0}) == [(5.0, "none", 1.0)]
        assert registry.spec(apply(config, {"rotary_pct": 0.5})).ropes[0].rotary_dim == 4


def test_an_override_reaches_the_nested_config() -> None:
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": SMALL_GEMMA}
    assert registry.spec(apply(outer, {"num_hidden_layers": 3})).num_layers == 3
    assert registry.spec(apply(outer, {"text_config": {"num_hidden_layers": 3}})).hidden == 32
    with pytest.raises(ModelError, match="nonsense"):
        apply(outer, {"text_config": {"nonsense": 3}})


@pytest.mark.parametrize("architecture", registry.FAMILIES)
def test_every_family_knows_its_own_names(architecture: str) -> None:
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": 2, "ffn_dim": 48, "word_embed_proj_dim": 32, "head_dim": 8}
    config = LLAMA | sizes | {"architectures": [architecture]}
    theirs = {"GPT2LMHeadModel": ("n_layer", 3), "OPTForCausalLM": ("ffn_dim", 40)}
    name, value = theirs.get(architecture, ("intermediate_size", 40))
    assert registry.spec(apply(config, {name: value})) != registry.spec(config)
    apply(config, {"vocab_size": 65, "tie_word_embeddings": True, "eos_token_id": 3})
    with pytest.raises(ModelError, match="nonsense"):
        apply(config, {name: value, "nonsense": 1})


def test_what_wins_in_a_config_gives_way() -> None:
    listed = GEMMA | {"layer_types": ["full_attention"] * 4}
    spec = registry.spec(apply(listed, {"sliding_window_pattern": 2}))
    assert [layer.window for layer in spec.layers] == [16, 0, 16, 0]


@pytest.mark.parametrize("name", ["nonsense", "n_layer", "rope_thetta", ""])
@pytest.mark.parametrize("value", [1, None])
def test_a_name_that_nothing_reads(name: str, value: Any) -> None:
    with pytest.raises(ModelError, match=f"'{name}', which nothing reads") as info:
        apply(LLAMA, {name: value})
    assert info.value.param == "hf_overrides"


@pytest.mark.parametrize("overrides", [{3: 4}, {None: 1}, {("a",): 1}, {"text_config": 3}])
def test_overrides_that_are_no_entries(overrides: dict[Any, Any]) -> None:
    with pytest.raises(ModelError, match="hf_overrides"):
        apply(LLAMA, overrides)


def test_an_override_that_is_impossible_is_named() -> None:
    with pytest.raises(ModelError, match="rope_scaling"):
        apply(NEW, {"rope_scaling": 3})
    with pytest.raises(ModelError, match="rope_theta"):
        apply(NEW, {"rope_theta": "big"})


def test_names_that_are_known_and_harmless() -> None:
    apply(LLAMA, dict.fromkeys(USELESS, 1) | {"torch_dtype": "float32", "eos_token_id": None})
    assert "dtype" not in apply(LLAMA | {"dtype": "float16"}, {"torch_dtype": "float32"})
    assert apply(LLAMA, {}) == LLAMA
    assert apply(LLAMA | {"made_up": 3}, {"made_up": 3})["made_up"] == 3
    for name, value in LLAMA.items():
        apply(LLAMA, {name: value})
