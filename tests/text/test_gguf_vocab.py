"""octavo.text.gguf_vocab: the same ids as the model's own tokenizer, and named errors."""

import random
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from octavo.errors import ModelError
from octavo.text import gguf_vocab
from octavo.text.gguf_vocab import PRE_TOKENIZERS, vocabulary_from_gguf
from octavo.text.vocabulary import Tokenizer

HARD = [
    "",
    " ",
    "  ",
    "\n",
    " \n ",
    "Hello world",
    " Hello world",
    "  two  spaces  ",
    "\tTab",
    "line\nbreak\n\n",
    "naïve café",
    "1234567890 007",
    "你好\uff0c世界",
    "🎉🤖🎉",
    "a\u0301 e\u0308",
    "<s> </s> <unk>",
    "<0x0A><0x41>",
    "\u2581 \u2581\u2581x",
    "\x00\x01\x7f",
    "aaaaaaaaaaaaaaaaaaaa",
    "\u200b\ufeff",
    "\U0001d518\U0001d52b",
    "The capital of France is Paris.",
]


def texts(seed: int, count: int) -> list[str]:
    pseudo = random.Random(seed)
    alphabet = "aabcdeeeghilnorst      .,'\n1230ßéñ你好🎉\u2581ÅØ<>/s"
    return ["".join(pseudo.choices(alphabet, k=pseudo.randrange(1, 60))) for _ in range(count)]


def test_smollm2_prompts_and_answers(smollm2: Tokenizer, smollm2_data: dict[str, Any]) -> None:
    for entry in smollm2_data["entries"]:
        assert smollm2.encode(entry["prompt"]) == entry["prompt_ids"], entry["name"]
        assert smollm2.decode(entry["output_ids"]) == entry["text"], entry["name"]
        assert smollm2.decode(entry["prompt_ids"], skip_special_tokens=False) == entry["prompt"]
    extra = smollm2_data["extra"]
    assert smollm2.encode(extra["text"]) == extra["ids"]
    assert smollm2.vocab_size == 49152
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.eos_token_ids) == (1, 2, (2,))
    assert smollm2.special_tokens["bos_token"] == "<|im_start|>"
    assert "<|im_start|>" in smollm2.chat_templates["default"]


def test_smollm_splits_digits(smollm2: Tokenizer) -> None:
    assert [smollm2.id_to_piece(t) for t in smollm2.encode("2024")] == ["2", "0", "2", "4"]


@pytest.mark.parametrize("fixture", ["trained", "trained_bare"])
def test_sentencepiece_ids_and_texts(fixture: str, request: pytest.FixtureRequest) -> None:
    trained = request.getfixturevalue(fixture)
    bytes_seen = 0
    for text in HARD + texts(1, 400):
        if "\x00" in text:
            continue  # the library's own C string ends here
        wanted = trained.processor.encode(text)
        assert trained.tokenizer.encode(text, add_special_tokens=False, parse_special=False) == wanted, text
        bytes_seen += sum(trained.processor.is_byte(i) for i in wanted)
        assert trained.tokenizer.decode(wanted) == trained.processor.decode(wanted)
    assert bytes_seen > 100


def test_sentencepiece_frame(trained: Any) -> None:
    assert trained.tokenizer.encode("Paris")[0] == 1
    assert trained.tokenizer.encode("Paris", add_special_tokens=False) == trained.processor.encode("Paris")
    told = trained.metadata | {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    assert Tokenizer(*vocabulary_from_gguf(told)).encode("Paris") == [*trained.processor.encode("Paris"), 2]


def test_numpy_metadata(trained: Any) -> None:
    arrays = trained.metadata | {
        "tokenizer.ggml.scores": np.array(trained.metadata["tokenizer.ggml.scores"], dtype=np.float32),
        "tokenizer.ggml.token_type": np.array(trained.metadata["tokenizer.ggml.token_type"], dtype=np.int32),
    }
    tokenizer = Tokenizer(*vocabulary_from_gguf(arrays))
    assert tokenizer.encode("The capital of France") == trained.tokenizer.encode("The capital of France")


def test_user_defined_pieces_hold_real_spaces(trained: Any) -> None:
    metadata = dict(trained.metadata)
    tokens = [*metadata["tokenizer.ggml.tokens"], "\u2581\u2581\u2581", "<mark>"]
    metadata["tokenizer.ggml.tokens"] = tokens
    metadata["tokenizer.ggml.scores"] = [*metadata["tokenizer.ggml.scores"], -1000.0, -1000.0]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], 4, 4]
    metadata["tokenizer.ggml.add_space_prefix"] = False
    tokenizer = Tokenizer(*vocabulary_from_gguf(metadata))
    ids = tokenizer.encode("a   b<mark>", add_special_tokens=False, parse_special=False)
    assert len(tokens) - 2 in ids and ids[-1] == len(tokens) - 1
    assert tokenizer.decode(ids) == "a   b<mark>"


def huggingface(vocab: dict[str, int], merges: list[tuple[str, str]], name: str) -> Backend:
    """The pre-tokenisers as the models' own tokenizer.json spell them."""
    backend = Backend(models.BPE(vocab, merges, ignore_merges=name == "llama-bpe"))
    isolated = {
        "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    }
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name not in isolated)
    steps: list[Any] = [last]
    if name in isolated:
        steps.insert(0, pre_tokenizers.Split(Regex(isolated[name]), "isolated"))
    elif name == "smollm":
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    if name == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_named_pre_tokenisers(name: str, byte_level: Tokenizer) -> None:
    import json

    model = json.loads(byte_level.backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    ours = Tokenizer(
        *vocabulary_from_gguf(
            {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": name,
                "tokenizer.ggml.tokens": tokens,
                "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
            }
        )
    )
    theirs = huggingface(model["vocab"], merges, name)
    for text in HARD + texts(2, 300) + ["It'S 12345 x\r\n\r\n  y", "HE'LL", "a...\n\n!!"]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text).ids, text
        assert ours.decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("name", sorted(PRE_TOKENIZERS))
def test_no_pre_tokeniser_loses_text(name: str, byte_level: Tokenizer) -> None:
    metadata = byte_metadata(byte_level) | {"tokenizer.ggml.pre": name}
    tokenizer = Tokenizer(*vocabulary_from_gguf(metadata))
    for text in HARD + texts(3, 50):
        assert tokenizer.decode(tokenizer.encode(text)) == (text if name != "qwen2" else unicode_nfc(text))


def unicode_nfc(text: str) -> str:
    import unicodedata

    return unicodedata.normalize("NFC", text)


def byte_metadata(byte_level: Tokenizer) -> dict[str, Any]:
    import json

    model = json.loads(byte_level.backend.to_str())["model"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": sorted(model["vocab"], key=model["vocab"].__getitem__),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model 'bert'"),
        ({"tokenizer.ggml.pre": "no-such-name"}, "'no-such-name'"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges is missing"),
        ({"tokenizer.ggml.merges": ["ab"]}, "'ab'"),
        ({"tokenizer.ggml.merges": ["a zzzz"]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "tokenizer.ggml.token_type has 2 entries"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "'a' twice"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "tokenizer.ggml.eos_token_id 1000000"),
        ({"tokenizer.ggml.add_bos_token": True}, "tokenizer.ggml.bos_token_id"),
    ],
)
def test_errors_name_the_key(change: dict[str, Any], words: str, byte_level: Tokenizer) -> None:
    metadata = {k: v for k, v in (byte_metadata(byte_level) | change).items() if v is not None}
    with pytest.raises(ModelError) as caught:
        vocabulary_from_gguf(metadata, "some.gguf")
    assert words in str(caught.value) and "some.gguf" in str(caught.value)


def test_missing_name_is_the_default_and_said(byte_level: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    metadata = byte_metadata(byte_level)
    del metadata["tokenizer.ggml.pre"]
    vocabulary_from_gguf(metadata)
    assert "tokenizer.ggml.pre" in caplog.text


def test_end_tokens_and_templates(byte_level: Tokenizer) -> None:
    _, facts = vocabulary_from_gguf(
        byte_metadata(byte_level)
        | {
            "tokenizer.ggml.eos_token_id": 5,
            "tokenizer.ggml.eot_token_id": 7,
            "tokenizer.chat_template": "A",
            "tokenizer.chat_template.tool_use": "B",
            "tokenizer.chat_templates": ["tool_use"],
        }
    )
    assert facts.eos_token_ids == (5, 7) and facts.chat_templates == {"default": "A", "tool_use": "B"}
    assert gguf_vocab.SPACE == "\u2581"
