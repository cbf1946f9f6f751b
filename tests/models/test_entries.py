"""Reading single entries: types, defaults, null, nested configs, and what is refused."""

from typing import Any

import pytest

from octavo.errors import ModelError
from octavo.models.entries import FOREIGN, Entries


def test_null_counts_as_absent() -> None:
    e = Entries.of({"a": None, "b": 3, "c": 2.0})
    assert (e.whole("a", 7), e.whole("b", 7), e.whole("c")) == (7, 3, 2)
    assert (e.has("a"), e.has("b"), e.has("z")) == (False, True, False)


@pytest.mark.parametrize(
    ("question", "value"),
    [
        ("whole", 1.5), ("whole", True), ("whole", "3"), ("number", True), ("number", "3"), ("flag", 0),
        ("activation", "mish"),
    ],
)
def test_values_of_the_wrong_kind_are_named(question: str, value: Any) -> None:
    ask = getattr(Entries({"thing": value}), question)
    with pytest.raises(ModelError, match=f"thing.*{value!r}") as caught:
        ask("thing", None)
    assert caught.value.param == "thing"


def test_a_missing_entry_is_named() -> None:
    with pytest.raises(ModelError, match="hidden_size is missing"):
        Entries({}).whole("hidden_size")


def test_a_nested_config_lies_over_the_outer_one() -> None:
    e = Entries.of({"hidden_size": 1, "tie_word_embeddings": True, "text_config": {"hidden_size": 2}})
    assert (e.whole("hidden_size"), e.flag("tie_word_embeddings", False)) == (2, True)


@pytest.mark.parametrize("name", FOREIGN)
def test_every_foreign_entry_is_refused_unless_the_family_computes_it(name: str) -> None:
    for neutral in (None, *FOREIGN[name]):
        Entries.of({name: neutral})
    with pytest.raises(ModelError, match=f"{name} = 3.5") as caught:
        Entries.of({name: 3.5})
    assert caught.value.param == name
    Entries.of({name: 3.5}, known=(name,))


def test_head_dim() -> None:
    assert Entries({"head_dim": 5}).head_dim(64, 4) == 5
    assert Entries({}).head_dim(64, 4) == 16
    assert Entries({}).head_dim(64, 4, 128) == 128
    for heads in (0, 5):
        with pytest.raises(ModelError, match=f"num_attention_heads {heads}"):
            Entries({}).head_dim(64, heads)


def test_special_tokens() -> None:
    assert Entries({}).eos(2) == (2,)
    assert Entries({"eos_token_id": None}).eos(2) == ()
    assert Entries({"eos_token_id": [1, 2]}).eos() == (1, 2)
    assert Entries({}).bos(1) == 1
    assert Entries({"bos_token_id": None}).bos(1) is None
    assert Entries({"bos_token_id": 0}).bos(1) == 0
    with pytest.raises(ModelError, match="bos_token_id"):
        Entries({"bos_token_id": "<s>"}).bos()


def test_ropes_by_layer_type() -> None:
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_theta": 1e4},
    }
    e = Entries({"rope_parameters": parameters, "max_position_embeddings": 64})
    full, sliding = e.rope(8, nested="full_attention"), e.rope(8, nested="sliding_attention")
    assert (full.base, full.scaling, full.factor) == (1e6, "linear", 8.0)
    assert (sliding.base, sliding.scaling, sliding.factor) == (1e4, "none", 1.0)
    with pytest.raises(ModelError, match="full_attention, sliding_attention"):
        e.rope(8)


def test_partial_rotation_and_defaults() -> None:
    assert Entries({}).rope(10, base=5.0).base == 5.0
    assert Entries({"rope_theta": 3.0}).rope(10, base=5.0).base == 3.0
    assert Entries({"partial_rotary_factor": 0.4}).rope(10).rotary_dim == 4
    assert Entries({"rope_parameters": {"partial_rotary_factor": 0.8}}).rope(10).rotary_dim == 8
