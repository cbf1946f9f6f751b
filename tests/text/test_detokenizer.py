"""octavo.text.detokenizer: any split of any tokens gives the text decoded at once, cut at the first stop string."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.params import SamplingParams
from octavo.text.detokenizer import Detokenizer
from octavo.text.vocabulary import Tokenizer

KINDS = ("byte_level", "spaces", "words")


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[int, int, str] | None:
    for end in range(1, len(text) + 1):
        for stop in stops:
            if text[:end].endswith(stop):
                return end - len(stop), end, stop
    return None


@pytest.fixture(params=KINDS, scope="session")
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    found: Tokenizer = request.getfixturevalue(request.param)
    return found


def tokens_of(draw: st.DrawFn, tokenizer: Tokenizer) -> list[int]:
    """Random ids, and ids of random Unicode text, mixed."""
    ids = st.integers(0, tokenizer.vocab_size - 1)
    parts = draw(
        st.lists(
            st.one_of(
                st.lists(ids, max_size=6),
                st.text(max_size=12).map(lambda t: tokenizer.encode(t, parse_special=False)),
                st.sampled_from(["🎉 Straße", "stop here", "你好", "a b c"]).map(lambda t: tokenizer.encode(t)),
            ),
            max_size=5,
        )
    )
    return [token for part in parts for token in part]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip=st.booleans(), spaces=st.booleans(), include=st.booleans())
def test_every_split_is_the_whole(
    tokenizer: Tokenizer, data: st.DataObject, skip: bool, spaces: bool, include: bool
) -> None:
    prompt = tokens_of(data.draw, tokenizer) if data.draw(st.booleans()) else []
    ids = tokens_of(data.draw, tokenizer)
    whole = tokenizer.decode(ids, skip, spaces, prompt)
    # Stop strings that do occur, across tokens, and some that do not.
    inner = [whole[a : a + n] for a in range(len(whole)) for n in (1, 2, 3, 7)]
    stops = tuple(data.draw(st.lists(st.sampled_from([s for s in inner if s] + ["stop", "\ufffd", "zz"]), max_size=4)))
    params = SamplingParams(
        stop=stops, include_stop_str_in_output=include, skip_special_tokens=skip, spaces_between_special_tokens=spaces
    )
    found = first_stop(whole, stops)

    chunked = Detokenizer(tokenizer, params, prompt)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=8)))
    chunks = [chunked.push(ids[a:b]) for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    chunks.append(chunked.finish())
    text = "".join(chunks)
    if found is None:
        assert text == whole and chunked.stop is None and chunked.num_tokens == len(ids)
    else:
        assert text == whole[: found[1] if include else found[0]] and chunked.stop == found[2]
        assert chunked.push(ids) == "" and chunked.finish() == ""
    assert "".join(chunks).count("\ufffd") <= whole.count("\ufffd")

    # Token by token, what was shown before the stop is a prefix of the cut text at every time.
    single, shown = Detokenizer(tokenizer, params, prompt), ""
    for number, token in enumerate(ids, 1):
        shown += single.push([token])
        assert text.startswith(shown)
        if single.stop is not None:
            assert single.num_tokens == number
            break
    assert shown + single.finish() == text and single.num_tokens == chunked.num_tokens
    if found is not None:  # the count of tokens is the fewest whose text holds the stop string for certain
        fewer = Detokenizer(
            tokenizer, SamplingParams(skip_special_tokens=skip, spaces_between_special_tokens=spaces), prompt
        )
        before = fewer.push(ids[: single.num_tokens - 1])
        assert len(before) < found[1]


def test_no_half_character(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("🤖é你")
    detokenizer = Detokenizer(byte_level, SamplingParams())
    seen = [detokenizer.push([token]) for token in ids]
    assert "".join(seen) == "🤖é你" and all("\ufffd" not in text for text in seen)
    assert "" in seen  # some tokens end within a character


def test_a_character_that_never_ends(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("🤖")[:-1]
    detokenizer = Detokenizer(byte_level, SamplingParams())
    assert detokenizer.push(ids) == ""
    assert detokenizer.finish() == byte_level.decode(ids) == "\ufffd"


def test_broken_bytes_do_not_pile_up(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, SamplingParams())
    broken = byte_level.token_to_id("ÿ")  # the byte 0xFF
    assert detokenizer.push([broken or 0] * 3) == "\ufffd" * 3


def test_leading_space_follows_the_prompt(spaces: Tokenizer) -> None:
    ids = spaces.encode("Paris is", add_special_tokens=False)
    for prompt, text in (([], "Paris is"), ([1], "Paris is"), (spaces.encode("capital of"), " Paris is")):
        detokenizer = Detokenizer(spaces, SamplingParams(), prompt)
        assert "".join(detokenizer.push([token]) for token in ids) + detokenizer.finish() == text


def test_special_tokens_show_or_not(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("a<|im_end|>b")
    assert Detokenizer(byte_level, SamplingParams()).push(ids) == "ab"
    assert Detokenizer(byte_level, SamplingParams(skip_special_tokens=False)).push(ids) == "a<|im_end|>b"


def test_stop_is_held_back_until_it_cannot_be(byte_level: Tokenizer) -> None:
    ids = [byte_level.encode(char)[0] for char in "xSTOx"]
    detokenizer = Detokenizer(byte_level, SamplingParams(stop=["STOP"]))
    assert [detokenizer.push([token]) for token in ids] == ["x", "", "", "", "STOx"]


def test_min_tokens_lets_early_stop_strings_pass(byte_level: Tokenizer) -> None:
    ids = [byte_level.encode(char)[0] for char in "abab"]
    detokenizer = Detokenizer(byte_level, SamplingParams(stop=["ab"], min_tokens=3))
    assert detokenizer.push(ids) == "ab" and detokenizer.stop == "ab" and detokenizer.num_tokens == 4
    at_once = Detokenizer(byte_level, SamplingParams(stop=["b"], min_tokens=2))
    assert at_once.push(ids) == "aba" and at_once.num_tokens == 4


def test_sampled_padding_is_no_text(byte_level: Tokenizer) -> None:
    detokenizer = Detokenizer(byte_level, SamplingParams(stop=["x"]))
    assert detokenizer.push([byte_level.vocab_size + 3, *byte_level.encode("a")]) == "a"


@pytest.mark.parametrize("stop", [(), ("never seen", "\n\n\n")])
def test_time_is_linear(byte_level: Tokenizer, spaces: Tokenizer, words: Tokenizer, stop: tuple[str, ...]) -> None:
    def seconds(tokenizer: Tokenizer, count: int) -> float:
        ids = (tokenizer.encode("a b c Paris 🎉", add_special_tokens=False) * count)[:count]
        detokenizer = Detokenizer(tokenizer, SamplingParams(stop=stop))
        started = time.perf_counter()
        for token in ids:
            detokenizer.push((token,))
        detokenizer.finish()
        return time.perf_counter() - started

    # Quadratic time would give a ratio of 4 in every attempt; a busy machine spoils one or two of them.
    for tokenizer, count in ((byte_level, 8000), (spaces, 8000), (words, 1500)):
        assert any(seconds(tokenizer, 2 * count) < 3 * seconds(tokenizer, count) for _ in range(8))
