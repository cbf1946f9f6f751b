"""octavo.text.vocabulary: encoding with and without control tokens, decoding, range checks."""

import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from octavo.errors import RequestError
from octavo.text.facts import TokenizerFacts
from octavo.text.vocabulary import Tokenizer

FRAGMENTS = [
    "<|im_end|>",
    "<|im_start|>",
    "<s>",
    "</s>",
    "<|im_",
    "end|>",
    "<",
    "|>",
    " ",
    "a",
    "Paris",
    "<think>",
    "é",
    "\n",
    "<|user|>",
    "  ",
    "[INST]",
    "<|<|im_end|>im_end|>",
    "#1",
    "1",
]


def test_special_strings_are_parsed_or_not(byte_level: Tokenizer) -> None:
    end = byte_level.token_to_id("<|im_end|>")
    text = "a<|im_end|>b"
    assert end in byte_level.encode(text)
    plain = byte_level.encode(text, parse_special=False)
    assert not byte_level.special_ids.intersection(plain)
    assert byte_level.decode(plain) == text
    assert byte_level.decode(byte_level.encode(text)) == "ab"
    assert byte_level.decode(byte_level.encode(text), skip_special_tokens=False) == text


def test_other_added_tokens_are_always_parsed(byte_level: Tokenizer) -> None:
    think = byte_level.token_to_id("<think>")
    for parse in (True, False):
        assert byte_level.encode("x<think>y", parse_special=parse).count(think or -1) == 1
    assert byte_level.decode(byte_level.encode("x<think>y")) == "x<think>y"


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))
def test_plain_text_never_makes_control_tokens(byte_level: Tokenizer, spaces: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, spaces):
        ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        assert not tokenizer.special_ids.intersection(ids)
        assert max(ids, default=0) < tokenizer.vocab_size  # no alias is left
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_plain_equals_parsed_without_special_strings(byte_level: Tokenizer, text: str) -> None:
    if not byte_level.controls.whole(text):
        assert byte_level.encode(text) == byte_level.encode(text, parse_special=False)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))
def test_aliases_cut_where_the_originals_cut(byte_level: Tokenizer, spaces: Tokenizer, text: str) -> None:
    for tokenizer in (byte_level, spaces):
        plain, aliased = tokenizer.plain, []
        at = 0
        for start, end in tokenizer.controls.find(text):
            aliased += [text[at:start], plain.alias[text[start:end]]]
            at = end
        aliased.append(text[at:])
        assert plain.encode("".join(aliased)) == tokenizer.encode(text, add_special_tokens=False)


def test_a_word_model_cannot_be_tricked(words: Tokenizer) -> None:
    assert words.encode("a <eos> b") == [2, 1, 3]
    ids = words.encode("a <eos> b", parse_special=False)
    assert 1 not in ids and ids[0] == 2 and ids[-1] == 3


def test_a_vocabulary_that_cannot_help_says_so() -> None:
    backend = Backend(models.WordLevel({"?": 0, "!": 1, "a": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("!", normalized=False)])
    tokenizer = Tokenizer(backend)
    assert tokenizer.encode("a ! a") == [2, 1, 2]
    with pytest.raises(RequestError, match="'!'"):
        tokenizer.encode("a ! a", parse_special=False)


def test_frame_is_kept_around_plain_text(spaces: Tokenizer) -> None:
    assert spaces.encode("<s>x", parse_special=False)[0] == spaces.bos_token_id
    assert spaces.encode("<s>x", parse_special=False).count(1) == 1
    assert spaces.encode("<s>x", add_special_tokens=False)[0] == 1


def test_batch_equals_single(byte_level: Tokenizer) -> None:
    texts = ["", "a<|im_end|>", "Paris is", "你好 🎉"] * 5
    for parse in (True, False):
        assert byte_level.encode_batch(texts, parse_special=parse) == [
            byte_level.encode(text, parse_special=parse) for text in texts
        ]
    assert byte_level.encode_batch([]) == []


@pytest.mark.parametrize("text", [None, 3, ["a"], b"a", "\ud800", "a\udfffb"])
def test_bad_text_is_a_request_error(byte_level: Tokenizer, text: object) -> None:
    for parse in (True, False):
        with pytest.raises(RequestError) as caught:
            byte_level.encode(text, parse_special=parse)  # type: ignore[arg-type]
        assert caught.value.param == "prompt"
    with pytest.raises(RequestError):
        byte_level.encode_batch(["fine", text])  # type: ignore[list-item]


@pytest.mark.parametrize("token", [-1, 10**6, 2**70, "a", None])
def test_ids_out_of_range(byte_level: Tokenizer, token: object) -> None:
    for call in (byte_level.decode, lambda ids: byte_level.id_to_piece(ids[0])):
        with pytest.raises(RequestError) as caught:
            call([token])
        assert str(token) in str(caught.value)
    last = byte_level.vocab_size - 1
    assert byte_level.id_to_piece(last) == "</tool_call>"  # added last: the count includes added tokens
    with pytest.raises(RequestError):
        byte_level.decode([last + 1])


def test_sampled_padding_has_no_text(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("ab")
    assert byte_level.decode_generated([*ids, byte_level.vocab_size + 7], True, True, ()) == "ab"
    assert byte_level.token_text(byte_level.vocab_size + 7) == ""


def test_leading_space_depends_on_what_comes_before(spaces: Tokenizer) -> None:
    ids = spaces.encode("Paris", add_special_tokens=False)
    assert spaces.decode(ids) == "Paris"
    assert spaces.decode(ids, after=[spaces.bos_token_id or 0]) == "Paris"
    assert spaces.decode(ids, after=spaces.encode("is")) == " Paris"
    assert spaces.decode(ids, skip_special_tokens=False, after=[spaces.bos_token_id or 0]) == " Paris"


def test_a_character_begun_in_the_prompt_is_finished(byte_level: Tokenizer) -> None:
    ids = [byte_level.token_to_id(piece) or 0 for piece in ("ð", "Ł", "İ", "ī")]  # the four bytes of U+1F389
    assert byte_level.decode(ids[2:], after=ids[:2]) == "🎉"
    assert byte_level.decode(ids[2:]) == "\ufffd\ufffd"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 260), max_size=30))
def test_byte_level_decoding_is_the_librarys(byte_level: Tokenizer, ids: list[int]) -> None:
    assert byte_level.decode(ids) == byte_level.backend.decode(ids)


def test_words_decode_with_spaces(words: Tokenizer) -> None:
    assert words.decode([2, 3, 4]) == "a b c"
    assert words.decode([2, 1, 1, 3], skip_special_tokens=False) == "a <eos> <eos> b"
    closed = words.decode([2, 1, 1, 3], skip_special_tokens=False, spaces_between_special_tokens=False)
    assert closed == "a <eos><eos> b"


def test_truncation_and_padding_of_the_file_are_off(byte_level: Tokenizer) -> None:
    backend = Backend.from_str(byte_level.backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    ids = byte_level.encode("The capital of France is Paris")
    assert len(ids) > 4
    assert Tokenizer(backend).encode("The capital of France is Paris") == ids


def test_end_tokens_are_unique_and_in_order(byte_level: Tokenizer) -> None:
    tokenizer = Tokenizer(Backend.from_str(byte_level.backend.to_str()), TokenizerFacts(eos_token_ids=(5, 3, 5)))
    assert (tokenizer.eos_token_ids, tokenizer.eos_token_id, tokenizer.bos_token_id) == ((5, 3), 5, None)


def test_threads(byte_level: Tokenizer) -> None:
    fresh = Tokenizer(Backend.from_str(byte_level.backend.to_str()))
    wanted = fresh.encode("<s>"), byte_level.encode("<s>", parse_special=False)
    failures: list[object] = []

    def work() -> None:
        for _ in range(50):
            if (fresh.encode("<s>"), fresh.encode("<s>", parse_special=False)) != wanted:
                failures.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_wrong_ids_and_the_field_of_a_text(byte_level: Tokenizer) -> None:
    wrong: list[Any] = [5, None, "ab", [1.5], [None], [True], ["1"], [-1], [10**30], {"a": 1}]
    for ids in wrong:
        with pytest.raises(RequestError) as caught:
            byte_level.decode(ids)
        assert caught.value.param == "token_ids"
    for parse_special in (True, False):
        for text in ("\ud800", 5):
            with pytest.raises(RequestError, match=r"^stop must be") as caught:
                byte_level.encode(text, parse_special=parse_special, field="stop")  # type: ignore[arg-type]
            assert caught.value.param == "stop"


@pytest.mark.parametrize("parse_special", [True, False])
def test_other_threads_run_while_a_long_text_is_encoded(byte_level: Tokenizer, parse_special: bool) -> None:
    text = "The quick brown fox, <|im_end|> and 12 more.\n" * 115_000
    byte_level.encode("a", parse_special=parse_special)
    longest, done = 0.0, threading.Event()

    def tick() -> None:
        nonlocal longest
        last = time.monotonic()
        while not done.is_set():
            time.sleep(0.001)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()

    ticker = threading.Thread(target=tick)
    ticker.start()
    began = time.monotonic()
    ids = byte_level.encode(text, parse_special=parse_special)
    took = time.monotonic() - began
    done.set()
    ticker.join()
    assert len(text) > 5_000_000 and len(ids) > 1_000_000
    assert longest < max(0.3, 0.2 * took), (longest, took)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join), st.booleans())
def test_the_fast_way_gives_the_same_ids(byte_level: Tokenizer, spaces: Tokenizer, text: str, around: bool) -> None:
    for tokenizer in (byte_level, spaces):
        assert tokenizer.encode(text, around) == tokenizer.backend.encode(text, add_special_tokens=around).ids


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(FRAGMENTS), max_size=30).map("".join))
def test_no_token_stands_for_more_characters(byte_level: Tokenizer, text: str) -> None:
    most = byte_level.chars_per_token
    assert most is not None
    for parse in (True, False):
        assert len(byte_level.encode(text, add_special_tokens=False, parse_special=parse)) * most >= len(text)


def test_characters_of_a_token(byte_level: Tokenizer, words: Tokenizer) -> None:
    assert byte_level.chars_per_token == max(len(piece.decode(errors="replace")) for piece in byte_level.pieces())
    assert words.chars_per_token is None  # any word is one unknown token


@pytest.mark.parametrize(("normalizer", "known"), [
    (normalizers.NFC(), True), (normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]), True),
    (normalizers.Replace(" ", "_"), True), (normalizers.Replace("  ", "_"), False),
    (normalizers.Replace(Regex(" +"), "_"), False),
    (normalizers.Strip(), False), (normalizers.Sequence([normalizers.NFC(), normalizers.StripAccents()]), False)])
def test_a_normalizer_that_shortens_makes_no_promise(byte_level: Tokenizer, normalizer: Any, known: bool) -> None:
    backend = Backend.from_str(byte_level.backend.to_str())
    backend.normalizer = normalizer
    backend.add_tokens(["\u1fa7"])  # one character, of four
    most = Tokenizer(backend).chars_per_token
    assert (most is not None) == known and (most is None or most >= 4)
