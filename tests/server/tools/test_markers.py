"""Markers: the first one is found in any pieces, and no more than the beginning of one waits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from octavo.server.tools.markers import Ending, Frame, Markers, expect


def split(pieces, markers) -> list[str]:
    """Texts and markers in turn."""
    found, held = [""], ""
    for piece in pieces:
        text, pos = held + piece, 0
        while True:
            start, end = markers.find(text, pos)
            found[-1] += text[pos:start]
            if start == end:
                break
            found += [text[start:end], ""]
            pos = end
        held = text[start:]
    found[-1] += held
    return found


@pytest.mark.parametrize(("markers", "text", "found"), [
    (("<a>", "</a>"), "x<<a>y</a></a", ["x<", "<a>", "y", "</a>", "</a"]),
    (("abcd", "bc"), "abcd bc abcx", ["", "abcd", " ", "bc", " a", "bc", "x"]),
    (("ab", "abc"), "abc", ["", "ab", "c"]),
    (("aab",), "aaab", ["a", "aab", ""]),
    ((), "anything", ["anything"]),
])
def test_first_marker(markers, text, found):
    assert split([text], Markers(*markers)) == split(text, Markers(*markers)) == found


@given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4), st.text("abc", max_size=12))
def test_any_markers_in_any_pieces(markers, text):
    assert split([text], Markers(*markers)) == split(text, Markers(*markers))


def test_expected_strings():
    options = ("</a>", "<b")
    found = [expect(text, 1, options) for text in ("x</a>y", "x<b", "x</", "x", "xy", "x</b")]
    assert found == ["</a>", "<b", "", "", None, None]


def test_newlines_beside_a_marker_are_its_own():
    frame = Frame()
    assert [frame.push(text) for text in ("\na", "\n", "\n", "b\n\n")] == ["\na", "", "", "\n\nb"]
    frame.mark()
    assert [frame.push(text) for text in ("\n", "\nc\n")] == ["", "c"]
    assert frame.finish() == "\n"


def test_an_ending_waits_for_other_words():
    ending = Ending(["</s>"])
    assert [ending.push(text) for text in ("a<", "/s>", "\n", "b", "</s> ")] == ["a", "", "", "</s>\nb", ""]
    assert ending.finish() == ""
