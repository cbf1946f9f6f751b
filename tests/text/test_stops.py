"""octavo.text.stops: the first stop string, found in pieces."""

import time

from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.text.stops import StopMatcher

LETTERS = st.text(alphabet="ab\u00e9\U0001f389", max_size=40)
STOPS = st.lists(st.text(alphabet="ab\u00e9\U0001f389", min_size=1, max_size=5), min_size=1, max_size=5).map(tuple)


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[int, int, str] | None:
    """Start, end and string of the match with the smallest end, the first as given among those."""
    for end in range(1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return end - len(stop), end, stop
    return None


def expected(text: str, stops: tuple[str, ...], include: bool) -> tuple[str, str | None]:
    found = first_stop(text, stops)
    if found is None:
        return text, None
    return text[: found[1] if include else found[0]], found[2]


@st.composite
def split(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(LETTERS)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return text, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(max_examples=1000, deadline=None)
@given(split(), STOPS, st.booleans())
def test_every_split_gives_the_same(parts: tuple[str, list[str]], stops: tuple[str, ...], include: bool) -> None:
    text, chunks = parts
    matcher, shown, fed = StopMatcher(stops, include), "", ""
    for chunk in chunks:
        shown += matcher.push(chunk)
        if matcher.stop is not None:
            break
        fed += chunk
        # What waits is the longest end that may still become a stop string, no more and no less.
        longest = max((k for stop in stops for k in range(len(stop)) if fed.endswith(stop[:k])), default=0)
        assert shown == fed[: len(fed) - longest]
    else:
        shown += matcher.finish()
    assert (shown, matcher.stop) == expected(text, stops, include)


def test_ties_go_by_the_order_given() -> None:
    for stops, shown in ((("b", "ab"), "xa"), (("ab", "b"), "x")):
        matcher = StopMatcher(stops)
        assert matcher.push("xab") == shown and matcher.stop == stops[0]


def test_the_first_to_end_wins_over_the_first_to_begin() -> None:
    matcher = StopMatcher(("abcd", "bc"))
    assert matcher.push("xabcd") == "xa" and matcher.stop == "bc"


def test_unarmed_text_is_no_match_but_may_begin_one() -> None:
    matcher = StopMatcher(("ab",))
    assert matcher.push("ab", armed=False) + matcher.push("xa", armed=False) == "abx" and matcher.stop is None
    assert matcher.push("b") == "" and matcher.stop == "ab"


def test_time_is_linear() -> None:
    def seconds(size: int) -> float:
        stops = tuple("a" * 255 + chr(ord("b") + i) for i in range(16))
        matcher = StopMatcher(stops)
        started = time.perf_counter()
        for _ in range(size):
            matcher.push("aaaa")
        matcher.finish()
        return time.perf_counter() - started

    assert min(seconds(4000) for _ in range(3)) < 3 * min(seconds(2000) for _ in range(3))
