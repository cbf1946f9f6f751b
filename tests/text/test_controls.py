"""octavo.text.controls: the search goes through a text in stretches and finds what it would find at once."""

import re
from unittest.mock import patch

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.text import controls as module
from octavo.text.controls import Controls

SPECIAL = ["<|a|>", "<|a|><|b|>", "<|", "|>", "<|word|>", "aba"]
TEXT = st.lists(st.sampled_from([*SPECIAL, "<think>", "x", " ", "a", "b", "<", "|"]), max_size=25).map("".join)
CONTROLS = Controls(SPECIAL, ["<think>", "x<|"], ["<|word|>", "aba"])


@settings(max_examples=500, deadline=None)
@given(TEXT, st.integers(1, 9), st.data())
def test_stretches_change_nothing(text: str, stretch: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    whole, found = CONTROLS.whole(text), CONTROLS.find(text, start, end)
    assert found == [m.span() for m in CONTROLS._any.finditer(text, start, end) if m.group() in SPECIAL]
    places = [(m.start(), word) for word in SPECIAL for m in re.finditer(f"(?={re.escape(word)})", text)]
    held = {i for at, word in places for i in range(at, at + len(word))}
    assert {i for a, b in whole for i in range(a, b)} == held
    with patch.object(module, "STRETCH", stretch):
        assert (CONTROLS.whole(text), CONTROLS.find(text, start, end)) == (whole, found)
