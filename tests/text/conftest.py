"""Small vocabularies for the tests of octavo.text: trained here, or cut out of a real one."""

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from octavo.text.facts import TokenizerFacts
from octavo.text.gguf_vocab import vocabulary_from_gguf
from octavo.text.vocabulary import Tokenizer

DATA = Path(__file__).parent.parent / "data" / "text"
CORPUS = [
    "The capital of France is Paris, and the capital of Spain is Madrid.",
    "She said: don't you know that it's 1234 o'clock? We're late!",
    "Große Straßen, naïve cafés, über alles; 你好\uff0c世界。こんにちは世界 🎉🎉 🤖",
    "def main():\n    return {'a': [1, 2, 3]}\n\n\tprint(x)  # comment",
    "user assistant system tool function call arguments name content role",
    '<tools> </tools> {"name": "get", "arguments": {}} Today Date: 2024',
] * 3
# Control tokens of all the template families together; one swallows the spaces behind it, as Phi-3's do.
SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<s>",
    "</s>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "<start_of_turn>",
    "<end_of_turn>",
    "<start_of_image>",
    "<bos>",
]
STRIPPING = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
PLAIN = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """GPT-2 style byte-level BPE with the control tokens above and some added tokens that are none."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False),
    )
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIALS])
    backend.add_special_tokens([AddedToken(text, normalized=False, rstrip=True) for text in STRIPPING])
    backend.add_tokens([AddedToken(text, normalized=False) for text in PLAIN])
    facts = TokenizerFacts(
        {"bos_token": "<s>", "eos_token": "</s>"}, backend.token_to_id("<s>"), (backend.token_to_id("</s>"),)
    )
    return Tokenizer(backend, facts)


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    """A vocabulary of whole words whose decoder puts spaces: neither byte-level nor SentencePiece."""
    vocab = {word: i for i, word in enumerate(["<unk>", "<eos>", "a", "b", "c", "stop", "here"])}
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("<unk>", normalized=False), AddedToken("<eos>", normalized=False)])
    return Tokenizer(backend, TokenizerFacts(eos_token_ids=(1,)))


class Trained:
    """A SentencePiece model and the GGUF metadata that describes it."""

    def __init__(self, **options: Any) -> None:
        import sentencepiece

        pseudo = random.Random(0)
        alphabet = [word for line in CORPUS for word in line.split()]
        lines = [" ".join(pseudo.choices(alphabet, k=12)) for _ in range(400)]
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=700,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=0.98,
            minloglevel=2,
            num_threads=1,
            **options,
        )
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        size = self.processor.get_piece_size()
        kinds = [
            2
            if self.processor.is_unknown(i)
            else 3
            if self.processor.is_control(i)
            else 6
            if self.processor.is_byte(i)
            else 1
            for i in range(size)
        ]
        self.metadata: dict[str, Any] = {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.tokens": [self.processor.id_to_piece(i) for i in range(size)],
            "tokenizer.ggml.scores": [self.processor.get_score(i) for i in range(size)],
            "tokenizer.ggml.token_type": kinds,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.add_space_prefix": options.get("add_dummy_prefix", True),
        }
        self.tokenizer = Tokenizer(*vocabulary_from_gguf(self.metadata))


@pytest.fixture(scope="session")
def trained() -> Trained:
    """As Llama 2 and Mistral: a space before every text."""
    return Trained()


@pytest.fixture(scope="session")
def trained_bare() -> Trained:
    """As Gemma: no space before a text."""
    return Trained(add_dummy_prefix=False)


@pytest.fixture(scope="session")
def spaces(trained: Trained) -> Tokenizer:
    return trained.tokenizer


@pytest.fixture(scope="session")
def smollm2_data() -> dict[str, Any]:
    """A part of a real vocabulary with prompts, their ids and greedy answers."""
    data: dict[str, Any] = json.loads((DATA / "smollm2_part.json").read_text(encoding="utf-8"))
    return data


@pytest.fixture(scope="session")
def smollm2(smollm2_data: dict[str, Any]) -> Tokenizer:
    return Tokenizer(*vocabulary_from_gguf(smollm2_metadata(smollm2_data)))


def smollm2_metadata(data: dict[str, Any]) -> dict[str, Any]:
    size, tokens = data["size"], data["tokens"]
    control = set(data["control"])
    return data["metadata"] | {
        "tokenizer.ggml.tokens": [tokens.get(str(i), "") for i in range(size)],
        "tokenizer.ggml.token_type": [3 if i in control else 1 for i in range(size)],
        "tokenizer.ggml.merges": data["merges"],
    }


@pytest.fixture(scope="session")
def templates() -> Iterator[dict[str, str]]:
    """Chat templates in the styles of well-known families, by name."""
    yield {path.stem: path.read_bytes().decode() for path in sorted((DATA / "templates").glob("*.jinja"))}
