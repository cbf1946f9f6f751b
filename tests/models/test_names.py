"""Names: who claims a tensor, and what an entry makes of it."""

import pytest
import torch

from octavo.models import registry
from octavo.models.names import IGNORED, Name, match, under
from octavo.models.spec import DecoderSpec, LayerSpec

SPEC = DecoderSpec(
    family="x", vocab_size=1, embedding_rows=1, hidden=4, num_heads=2, num_kv_heads=2, head_dim=2, intermediate=1,
    max_len=1, layers=(LayerSpec(),),
)
OUTER = Name("model.norm.weight", "final_norm.weight")
LAYER = Name("model.layers.{i}.mlp.weight", "layers.{i}.mlp.up.weight")
SPLIT = Name("h.{i}.qk", ("layers.{i}.q", "layers.{i}.k"), lambda t, spec: (t[: spec.num_heads], t[spec.num_heads :]))
TABLE = (OUTER, LAYER, SPLIT)


def test_outer_and_layer_names() -> None:
    assert match("model.norm.weight", TABLE) == (OUTER, None)
    assert match("model.layers.0.mlp.weight", TABLE) == (LAYER, 0)
    assert match("model.layers.117.mlp.weight", TABLE) == (LAYER, 117)
    assert match("h.3.qk", TABLE) == (SPLIT, 3)
    assert LAYER.targets(117) == ("layers.117.mlp.up.weight",)
    assert SPLIT.targets(3) == ("layers.3.q", "layers.3.k")
    assert OUTER.targets(None) == ("final_norm.weight",)


@pytest.mark.parametrize(
    "name",
    [
        "", "model", "model.layers.mlp.weight", "model.layers.-1.mlp.weight", "model.layers.{i}.mlp.weight.1",
        "x.model.norm.weight", "model.layers.01.mlp.weight", "model.layers.1.2.mlp.weight",
        "model.layers.1.mlp.weight ", "model.layers.²._.mlp.weight", "model.layers.٣.mlp.weight",
    ],
)
def test_near_misses_are_left_over(name: str) -> None:
    assert match(name, TABLE) is None


def test_ignored_patterns_come_after_the_table() -> None:
    assert match("a.rotary.inv_freq", TABLE, ("*.inv_freq",)) is IGNORED
    assert match("a.inv_freq.weight", TABLE, ("*.inv_freq",)) is None
    assert match("model.norm.weight", TABLE, ("*",)) == (OUTER, None)


def test_what_an_entry_makes_of_a_tensor() -> None:
    tensor = torch.arange(5)
    assert OUTER.apply(tensor, SPEC)[0] is tensor
    first, second = SPLIT.apply(tensor, SPEC)
    assert (first.tolist(), second.tolist()) == ([0, 1], [2, 3, 4])
    negated = Name("a", "b", lambda t, spec: -t).apply(tensor, SPEC)
    assert len(negated) == 1
    assert negated[0].tolist() == [0, -1, -2, -3, -4]


def test_prefixes_multiply_a_table() -> None:
    sources = [n.source for n in under(("", "a."), (OUTER, LAYER))]
    assert sources == [OUTER.source, LAYER.source, "a." + OUTER.source, "a." + LAYER.source]


@pytest.mark.parametrize("architecture", registry.FAMILIES)
def test_every_table_reads_its_own_names(architecture: str) -> None:
    """No source hides another, and targets keep the layer."""
    names = registry.family_of({"architectures": [architecture]}).NAMES
    for entry in names:
        layer = 7 if "{i}" in entry.source else None
        assert match(entry.source.replace("{i}", "7"), names) == (entry, layer)
        assert all(("7" in target) == (layer == 7) and "{" not in target for target in entry.targets(layer))


