"""A vocabulary from the metadata of a GGUF file: byte-level BPE with a named pre-tokeniser, or SentencePiece BPE.

Owns the meaning of the ``tokenizer.*`` keys; it does not read the file (models/gguf.py does) and knows no request.
Invariant: a pre-tokeniser is used by its name or refused by its name, never guessed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from octavo.errors import ModelError
from octavo.log import get_logger
from octavo.text.facts import TokenizerFacts, frame
from octavo.text.vocab_cache import WORTH_KEEPING, cached, key_of

logger = get_logger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "\u2581"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS_UP = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LETTERS_LOW = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _TAIL
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS_UP}*{_LETTERS_LOW}+|[^\r\n\p{{L}}\p{{N}}]?{_LETTERS_UP}+{_LETTERS_LOW}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _TAIL
)
GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTERS_UP}*{_LETTERS_LOW}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_LETTERS_UP}+{_LETTERS_LOW}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _TAIL
)

# Name in the file -> expressions, each of which splits what the one before left.
_SPLITS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("gpt-2", "phi-2", "mpt", "olmo", "gigachat", "a.x-4.0", "mellum", "exaone4", "trillion"): (GPT2,),
    ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"): (r"\p{N}", GPT2),
    ("llama3", "llama-v3", "llama-bpe", "falcon3", "dbrx", "smaug-bpe", "chatglm-bpe", "glm4"): (LLAMA3,),
    ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"): (QWEN2,),
    ("qwen35",): (QWEN35,),
    ("tekken",): (TEKKEN,),
    ("gpt-4o", "llama4"): (GPT4O,),
    ("falcon",): (r"[\p{P}\$\+<=>\^~\|`]+", GPT2, "[0-9][0-9][0-9]"),
    ("default",): (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
PRE_TOKENIZERS = {name: splits for names, splits in _SPLITS.items() for name in names}
# Vocabularies that take a whole word before they merge, and those that begin a prompt with BOS unless told otherwise.
WHOLE_WORDS = frozenset({"llama3", "llama-v3", "llama-bpe", "falcon3", "tekken"})
BEGIN_DEFAULT = WHOLE_WORDS
COMPOSED = frozenset({"qwen2"})  # their own files normalise to NFC first

TEMPLATE_VARIABLES = {
    "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding", "sep_token": "seperator",
}  # "seperator" is how the format spells it


def vocabulary_from_gguf(
    metadata: Mapping[str, Any], origin: str = "GGUF file", cache: Path | None = None
) -> tuple[Backend, TokenizerFacts]:
    """Build the tokenizer that a GGUF file describes. About 0.1 s for 50,000 tokens.

    Args:
        metadata: key -> value; arrays may be lists or numpy arrays.
        origin: name of the file, for messages.
        cache: folder that keeps built vocabularies of WORTH_KEEPING tokens and more.

    Raises:
        ModelError: a key is missing or contradicts another, or a tokenizer model or pre-tokeniser is not known.
    """
    builder = _Builder(metadata, origin)
    if cache is None or len(builder.tokens) < WORTH_KEEPING:
        return builder.build(), builder.facts()
    return cached(cache, key_of(metadata), builder.build), builder.facts()


class _Builder:
    def __init__(self, metadata: Mapping[str, Any], origin: str) -> None:
        self.metadata, self.origin = metadata, origin
        self.kind = str(self.get("model", ""))
        if self.kind not in ("gpt2", "llama"):
            raise self.error(f"tokenizer.ggml.model {self.kind!r} is not supported, only gpt2 and llama are")
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.array("tokens"))]
        types = self.array("token_type", [NORMAL] * len(self.tokens))
        if not self.tokens or len(types) != len(self.tokens):
            raise self.error(f"tokenizer.ggml.token_type has {len(types)} entries for {len(self.tokens)} tokens")
        self.types = types
        if self.kind == "llama":  # these are matched in the text as it is, before spaces are replaced
            self.tokens = [
                token.replace(SPACE, " ") if kind == USER_DEFINED else token
                for token, kind in zip(self.tokens, types, strict=True)
            ]
        self.vocab = {token: i for i, token in enumerate(self.tokens)}
        if len(self.vocab) != len(self.tokens):
            twice = next(token for i, token in enumerate(self.tokens) if self.vocab[token] != i)
            raise self.error(f"tokenizer.ggml.tokens holds {twice!r:.80} twice")
        defaults = {"bos": 1, "eos": 2, "unknown": 0} if self.kind == "llama" else {}
        self.ids = {
            name: self.token_id(name, defaults.get(name))
            for name in ("bos", "eos", "unknown", "padding", "seperator", "eot", "eom")
        }

    def error(self, reason: str) -> ModelError:
        return ModelError(f"{self.origin}: {reason}.")

    def get(self, key: str, default: Any = None) -> Any:
        return self.metadata.get("tokenizer.ggml." + key, default)

    def array(self, key: str, default: list[Any] | None = None) -> list[Any]:
        value = self.get(key, default)
        if value is None:
            raise self.error(f"tokenizer.ggml.{key} is missing")
        return list(value.tolist() if hasattr(value, "tolist") else value)

    def token_id(self, name: str, default: int | None) -> int | None:
        value = self.get(f"{name}_token_id")
        if value is None:
            return default if default is not None and default < len(self.tokens) else None
        if not 0 <= int(value) < len(self.tokens):
            raise self.error(f"tokenizer.ggml.{name}_token_id {value} is beyond the {len(self.tokens)} tokens")
        return int(value)

    def build(self) -> Backend:
        backend = self.byte_level() if self.kind == "gpt2" else self.sentencepiece()
        kinds = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
        backend.add_tokens([
            AddedToken(token, special=kinds[kind], normalized=False)
            for token, kind in zip(self.tokens, self.types, strict=True) if kind in kinds
        ])
        self.add_frame(backend)
        return backend

    def facts(self) -> TokenizerFacts:
        return TokenizerFacts(
            special_tokens={
                variable: self.tokens[token] for variable, name in TEMPLATE_VARIABLES.items()
                if (token := self.ids[name]) is not None
            },
            bos_token_id=self.ids["bos"],
            eos_token_ids=tuple(t for name in ("eos", "eot", "eom") if (t := self.ids[name]) is not None),
            chat_templates=self.templates(), origin=self.origin)

    def templates(self) -> dict[str, str]:
        start = "tokenizer.chat_template"
        return {
            key.removeprefix(start).removeprefix(".") or "default": str(value)
            for key, value in self.metadata.items()
            if (key == start or key.startswith(start + ".")) and isinstance(value, str)
        }

    def add_frame(self, backend: Backend) -> None:
        """Put the begin and end tokens around a prompt that the file asks for."""
        begins = self.kind == "llama" or self.get("pre") in BEGIN_DEFAULT
        wanted = {"bos": bool(self.get("add_bos_token", begins)), "eos": bool(self.get("add_eos_token", False))}
        framed: dict[str, list[tuple[str, int]]] = {"bos": [], "eos": []}
        for name, add in wanted.items():
            token = self.ids[name]
            if add and token is not None:
                framed[name] = [(self.tokens[token], token)]
            elif add and self.get(f"add_{name}_token") is not None:
                raise self.error(f"tokenizer.ggml.add_{name}_token is set without tokenizer.ggml.{name}_token_id")
        if framed["bos"] or framed["eos"]:
            backend.post_processor = frame(framed["bos"], framed["eos"])

    def byte_level(self) -> Backend:
        name = self.get("pre")
        if name is None:
            logger.warning("%s has no tokenizer.ggml.pre: ids may differ from the model's own.", self.origin)
            name = "default"
        if name not in PRE_TOKENIZERS:
            known = ", ".join(sorted(PRE_TOKENIZERS))
            raise self.error(f"the pre-tokeniser {name!r} is not known; known are {known}")
        merges = []
        for entry in self.array("merges"):
            first, space, second = entry[1:].partition(" ")
            if not space or not second:
                raise self.error(f"tokenizer.ggml.merges holds {entry!r:.80}, which is no pair")
            merges.append((entry[0] + first, second))
        try:
            model = models.BPE(self.vocab, merges, ignore_merges=name in WHOLE_WORDS)
        except Exception as failure:  # the library's own type: a merge outside the vocabulary
            raise self.error(f"tokenizer.ggml.merges does not fit the vocabulary: {failure}") from failure
        backend = Backend(model)
        if name in COMPOSED:
            backend.normalizer = normalizers.NFC()
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in PRE_TOKENIZERS[name]]
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        backend.decoder = decoders.ByteLevel()
        return backend

    def sentencepiece(self) -> Backend:
        scores = self.array("scores")
        if len(scores) != len(self.tokens):
            raise self.error(f"tokenizer.ggml.scores has {len(scores)} entries for {len(self.tokens)} tokens")
        unknown = self.ids["unknown"]
        backend = Backend(models.BPE(
            self.vocab, merges_from_scores(self.tokens, self.types, scores), fuse_unk=True,
            unk_token=None if unknown is None else self.tokens[unknown], byte_fallback=BYTE in self.types))
        prefix = bool(self.get("add_space_prefix", True))
        steps: list[Any] = []
        if self.get("remove_extra_whitespaces", False):
            steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
        steps += [normalizers.Prepend(SPACE)] if prefix else []
        backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        backend.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
        return backend


def merges_from_scores(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose union scores best; ranked: the splits of every piece, best piece first."""
    usable = [i for i, kind in enumerate(types) if kind == NORMAL]
    pieces = {tokens[i] for i in usable}
    merges: list[tuple[str, str]] = []
    for i in sorted((i for i in usable if len(tokens[i]) > 1), key=lambda i: (-scores[i], i)):
        piece = tokens[i]
        for cut in range(1, len(piece)):
            left = piece[:cut]
            if left in pieces and piece[cut:] in pieces:
                merges.append((left, piece[cut:]))
    return merges
