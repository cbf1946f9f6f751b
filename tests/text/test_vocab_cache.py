"""Built vocabularies on disk: found again, told apart by content, rebuilt when broken, not needed."""

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from octavo.text import gguf_vocab
from octavo.text.gguf_vocab import vocabulary_from_gguf
from octavo.text.vocab_cache import cached, key_of

PIECES = ["<unk>", "<s>", "</s>", "a", "b", "ab", "\u2581"]
METADATA = {
    "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": PIECES, "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 1, 1],
    "tokenizer.ggml.scores": np.array([0, 0, 0, -1, -2, -3, -4], np.float32),
}


def never() -> Backend:
    raise AssertionError("was built again")


def test_found_again_and_rebuilt_when_broken(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "cache"
    built = Backend(models.BPE({"a": 0}, []))
    assert cached(folder, "k", lambda: built).to_str() == built.to_str()
    assert cached(folder, "k", never).to_str() == built.to_str()
    assert [p.name for p in folder.iterdir()] == ["k.json"]
    (folder / "k.json").write_text("{")
    assert cached(folder, "k", lambda: built).to_str() == built.to_str()
    assert cached(folder, "k", never).to_str() == built.to_str()


def test_a_folder_that_cannot_be_made_costs_the_caching_only(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    built = Backend(models.BPE({"a": 0}, []))
    assert cached(tmp_path / "file", "k", lambda: built).to_str() == built.to_str()


def test_keys_tell_contents_apart() -> None:
    other = METADATA | {"tokenizer.ggml.scores": np.array([0, 0, 0, -1, -3, -2, -4], np.float32)}
    assert key_of(METADATA) == key_of(dict(METADATA)) != key_of(other)
    assert key_of(METADATA) == key_of(METADATA | {"general.name": "x"})
    assert key_of(METADATA) != key_of(METADATA | {"tokenizer.ggml.add_space_prefix": False})


def test_large_vocabularies_go_through_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, facts = vocabulary_from_gguf(METADATA, "x", tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(gguf_vocab, "WORTH_KEEPING", len(PIECES))
    first, _ = vocabulary_from_gguf(METADATA, "x", tmp_path)
    monkeypatch.setattr(gguf_vocab._Builder, "build", lambda self: never())
    second, again = vocabulary_from_gguf(METADATA, "x", tmp_path)
    assert facts == again
    for backend in (first, second):
        assert backend.encode("ab b").ids == plain.encode("ab b").ids
        assert backend.to_str() == plain.to_str()


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("octavo.text.vocab_cache.os.replace", full)
    built = Backend(models.BPE({"a": 0}, []))
    assert cached(tmp_path, "k", lambda: built).to_str() == built.to_str()
    assert not list(tmp_path.iterdir())
