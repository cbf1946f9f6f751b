"""octavo.text.folder_vocab and load_tokenizer: folders as transformers reads them, and named errors."""

import builtins
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import processors

from octavo.config import EngineConfig
from octavo.errors import ModelError
from octavo.models.source import ModelSource
from octavo.text.folder_vocab import vocabulary_from_folder
from octavo.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = ["The capital of France", "<s>a</s> b", "你好 🎉", "  x", ""]


def folder(path: Path, backend: Backend, settings: dict[str, Any] | None = None) -> Path:
    backend.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps(settings or {}), encoding="utf-8")
    return path


def copy(tokenizer: Tokenizer) -> Backend:
    return Backend.from_str(tokenizer.backend.to_str())


def load(path: Path, **values: Any) -> Tokenizer:
    generation = values.pop("generation_config", {})
    config = values.pop("config", {})
    source = ModelSource("folder", path, config, generation, str(path))
    return load_tokenizer(source, EngineConfig(model=str(path), **values))


@pytest.mark.parametrize(
    "settings",
    [
        {"bos_token": "<s>", "eos_token": "</s>"},
        {"bos_token": "<s>", "eos_token": {"__type": "AddedToken", "content": "</s>"}, "add_bos_token": True},
        {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False, "add_eos_token": True},
    ],
)
@pytest.mark.parametrize("framed", [None, False, True])
def test_ids_as_transformers(
    tmp_path: Path, byte_level: Tokenizer, settings: dict[str, Any], framed: bool | None
) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = copy(byte_level)
    if framed is False:
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    if framed:
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
        )
    path = folder(tmp_path, backend, {"tokenizer_class": "PreTrainedTokenizerFast"} | settings)
    theirs = PreTrainedTokenizerFast.from_pretrained(path)
    ours = load(path)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        ids = theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_end_tokens_are_a_union(tmp_path: Path, byte_level: Tokenizer) -> None:
    path = folder(tmp_path, copy(byte_level), {"eos_token": "</s>"})
    own = byte_level.token_to_id("</s>")
    assert load(path, generation_config={"eos_token_id": [7, own]}, config={"eos_token_id": 9}).eos_token_ids == (
        own,
        7,
    )
    assert load(path, config={"eos_token_id": 9}).eos_token_ids == (own, 9)
    assert load(path, generation_config={"eos_token_id": 7}).eos_token_ids == (own, 7)


def test_tokens_of_tokenizer_config(tmp_path: Path, byte_level: Tokenizer) -> None:
    size = byte_level.vocab_size
    listed = {str(size): {"content": "<|new|>", "special": True}, str(size + 1): {"content": "<new>", "special": False}}
    tokenizer = load(folder(tmp_path, copy(byte_level), {"added_tokens_decoder": listed, "eos_token": "<|new|>"}))
    assert tokenizer.encode("<|new|><new>") == [size, size + 1]
    assert tokenizer.special_ids == byte_level.special_ids | {size} and tokenizer.eos_token_id == size
    listed[str(size + 5)] = {"content": "<hole>", "special": True}
    with pytest.raises(ModelError, match=str(size + 5)):
        load(folder(tmp_path, copy(byte_level), {"added_tokens_decoder": listed}))


def test_named_special_tokens_are_control_tokens(tmp_path: Path, byte_level: Tokenizer) -> None:
    tokenizer = load(folder(tmp_path, copy(byte_level), {"eos_token": "<think>", "pad_token": "[NOT THERE]"}))
    assert tokenizer.eos_token_id == byte_level.token_to_id("<think>")
    assert tokenizer.decode(tokenizer.encode("a<think>")) == "a"
    assert tokenizer.vocab_size == byte_level.vocab_size


def test_gpt2_files(tmp_path: Path, byte_level: Tokenizer) -> None:
    from transformers import AutoTokenizer

    plain = Backend.from_str(byte_level.backend.to_str())
    plain.model.save(str(tmp_path))
    settings = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "a", "eos_token": "b", "unk_token": "c"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    ours, theirs = load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ["The capital of France", "  x 123", "é🎉", ""]:
        assert ours.encode(text) == theirs.encode(text)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": True}), encoding="utf-8")
    framed = load(tmp_path)
    assert framed.encode("Paris") == [framed.bos_token_id, *ours.encode("Paris")]


def test_sentencepiece_folder_goes_through_transformers(
    tmp_path: Path, trained: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained.processor.serialized_model_proto())
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
        "legacy": True,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer = load(tmp_path)
    assert tokenizer.encode("The capital of France") == [1, *trained.processor.encode("The capital of France")]
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModelError, match="pip install transformers") as caught:
        load(tmp_path)
    assert "tokenizer.model" in str(caught.value)


def test_gguf_file(tmp_path: Path, trained: Any) -> None:
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    meta = trained.metadata
    writer.add_tokenizer_model("llama")
    writer.add_token_list(meta["tokenizer.ggml.tokens"])
    writer.add_token_scores(meta["tokenizer.ggml.scores"])
    writer.add_token_types(meta["tokenizer.ggml.token_type"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ bos_token }}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = ModelSource("gguf", path, {"eos_token_id": 2}, {}, "tiny")
    tokenizer = load_tokenizer(source, EngineConfig(model="tiny"))
    assert tokenizer.encode("The capital") == [1, *trained.processor.encode("The capital")]
    assert tokenizer.chat_templates == {"default": "{{ bos_token }}"} and tokenizer.eos_token_ids == (2,)


def test_other_tokenizer_wins(tmp_path: Path, byte_level: Tokenizer, words: Tokenizer) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first, second = folder(tmp_path / "one", copy(byte_level)), folder(tmp_path / "two", copy(words))
    assert load(first, tokenizer=str(second)).encode("a b") == [2, 3]
    with pytest.raises(ModelError, match="no/such/place") as caught:
        load(first, tokenizer="no/such/place")
    assert caught.value.param == "tokenizer"


def test_chat_template_files(tmp_path: Path, byte_level: Tokenizer) -> None:
    named = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    path = folder(tmp_path, copy(byte_level), {"chat_template": named})
    assert load(path).chat_templates == {"default": "A", "tool_use": "B"}
    (path / "chat_template.jinja").write_text("C", encoding="utf-8")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "rag.jinja").write_text("D", encoding="utf-8")
    assert load(path).chat_templates == {"default": "C", "tool_use": "B", "rag": "D"}
    folder(path, copy(byte_level), {"chat_template": "E"})
    (path / "chat_template.jinja").unlink()
    assert load(path).chat_templates["default"] == "E"
    folder(path, copy(byte_level), {"chat_template": [{"name": "x"}]})
    with pytest.raises(ModelError, match="chat_template"):
        load(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", "{x"),
        ("special_tokens_map.json", b"\xff"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, byte_level: Tokenizer, name: str, content: str | bytes) -> None:
    folder(tmp_path, copy(byte_level))
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ModelError, match=name):
        vocabulary_from_folder(tmp_path)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="no tokenizer"):
        vocabulary_from_folder(tmp_path)


@pytest.mark.parametrize("settings", [
    {"chat_template": 5}, {"chat_template": {"a": "b"}}, {"added_tokens_decoder": {"x": 1}},
    {"added_tokens_decoder": {"1": 1}}, {"added_tokens_decoder": [1]}, {"added_tokens_decoder": {"x": {"content": "a"}}},
])
def test_wrong_types_in_the_settings(tmp_path: Path, byte_level: Tokenizer, settings: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=next(iter(settings))):
        vocabulary_from_folder(folder(tmp_path, copy(byte_level), settings))
