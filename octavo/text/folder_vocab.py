"""A vocabulary from a folder in Hugging Face's layout: tokenizer.json, else GPT-2's two files, else transformers.

Owns the meaning of tokenizer_config.json and its neighbours; it does not know the model's own config. Invariant: ids
are those that transformers would give; what cannot be read is a ModelError that names the file.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from octavo.errors import ModelError
from octavo.text.facts import TokenizerFacts, frame

# Files of a tokenizer: what a download needs, and nothing heavy.
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "*.jinja", "chat_template.json", "generation_config.json", "config.json",
)
# One of these has to be there before transformers is asked, which makes an empty tokenizer out of nothing.
VOCABULARIES = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
FLAGS = ("lstrip", "rstrip", "single_word", "normalized", "special")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def vocabulary_from_folder(folder: Path) -> tuple[Backend, TokenizerFacts]:
    """Read the tokenizer of a model folder.

    Raises:
        ModelError: no tokenizer, a broken file, or one that needs transformers where that is not installed.
    """
    settings = {**read_json(folder / "special_tokens_map.json"), **read_json(folder / "tokenizer_config.json")}
    if (folder / "tokenizer.json").is_file():
        backend = _from_file(folder / "tokenizer.json")
    elif all((folder / name).is_file() for name in ("vocab.json", "merges.txt")) and _is_gpt2(settings):
        backend = _from_gpt2(folder, settings)
    elif any(next(folder.glob(pattern), None) for pattern in VOCABULARIES):
        backend = _from_transformers(folder)
    else:
        raise ModelError(
            f"{folder} holds no tokenizer. Name one with tokenizer, or use skip_tokenizer_init and give token ids "
            "(a folder with only config.json also needs load_format dummy).",
            "tokenizer")
    named = {name: text for name in NAMED if (text := _text(settings.get(name)))}
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, Mapping):  # names of a model's own, such as image_token
        named |= {str(name): text for name, value in extra.items() if (text := _text(value))}
    _add_tokens(backend, settings, named, folder)
    if not (folder / "tokenizer.json").is_file() and backend.post_processor is None:
        # A tokenizer.json says itself what stands around a prompt; these settings are for the older files.
        _add_frame(backend, settings, named, folder)
    eos = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
    facts = TokenizerFacts(
        special_tokens=named, bos_token_id=backend.token_to_id(named["bos_token"]) if "bos_token" in named else None,
        eos_token_ids=() if eos is None else (eos,), chat_templates=_templates(folder, settings), origin=str(folder))
    return backend, facts


def read_json(path: Path) -> dict[str, Any]:
    """An object from a JSON file, {} if there is no such file; ModelError if it is broken."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error!s:.200}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(value).__name__}.")
    return value


def _text(value: Any) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _from_file(path: Path) -> Backend:
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises its own type for anything in the file
        raise ModelError(f"{path} cannot be read: {error!s:.200}.") from error


def _is_gpt2(settings: Mapping[str, Any]) -> bool:
    return settings.get("tokenizer_class") in GPT2_CLASSES


def _from_gpt2(folder: Path, settings: Mapping[str, Any]) -> Backend:
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:
        raise ModelError(f"{folder}: vocab.json and merges.txt cannot be read: {error!s:.200}.") from error
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(settings.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    return backend


def _from_transformers(folder: Path) -> Backend:
    present = ", ".join(sorted(p.name for p in folder.glob("*token*"))) or "no tokenizer file"
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelError(
            f"{folder} has no tokenizer.json ({present}); reading it needs the package transformers: "
            "pip install transformers sentencepiece, or add a tokenizer.json.") from error
    try:
        slow = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder} has no tokenizer that can be read ({present}): {error!s:.200}.") from error
    backend = getattr(slow, "backend_tokenizer", None)
    if not isinstance(backend, Backend):
        raise ModelError(f"{folder}: {type(slow).__name__} cannot be turned into a tokenizer.json.")
    return backend


def _add_tokens(backend: Backend, settings: Mapping[str, Any], named: Mapping[str, str], folder: Path) -> None:
    """Register what tokenizer_config.json adds to tokenizer.json; named special tokens are control tokens."""
    known = backend.get_added_tokens_decoder()
    listed = settings.get("added_tokens_decoder") or {}
    file = folder / "tokenizer_config.json"
    if not isinstance(listed, Mapping):
        raise ModelError(f"{file}: added_tokens_decoder must map ids to tokens, got {listed!r:.80}.")
    for key, entry in listed.items():
        if not (key.isascii() and key.isdecimal() and len(key) < 12 and isinstance(entry, Mapping)):
            raise ModelError(f"{file}: added_tokens_decoder must map ids to tokens, got {key!r:.80}: {entry!r:.80}.")
    for key in sorted(listed, key=int):
        token, entry = int(key), listed[key]
        content = _text(entry)
        if content is None or (token in known and known[token].content == content):
            continue
        flags = {name: bool(entry.get(name, False)) for name in FLAGS}
        backend.add_tokens([AddedToken(content, **flags)])
        if backend.token_to_id(content) != token:
            raise ModelError(
                f"{file} gives {content!r:.80} the id {token}, the vocabulary "
                f"{backend.token_to_id(content)}.")
    known = backend.get_added_tokens_decoder()
    special = {token.content for token in known.values() if token.special}
    for content in named.values():
        if content not in special and backend.token_to_id(content) is not None:
            backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])


def _add_frame(backend: Backend, settings: Mapping[str, Any], named: Mapping[str, str], folder: Path) -> None:
    """Put the begin and end tokens around a prompt that add_bos_token and add_eos_token ask for."""
    sides: dict[str, list[tuple[str, int]]] = {"bos": [], "eos": []}
    for side, tokens in sides.items():
        text = named.get(f"{side}_token")
        if settings.get(f"add_{side}_token") and text is not None:
            token = backend.token_to_id(text)
            if token is None:
                raise ModelError(f"{folder}: add_{side}_token is set but {text!r:.80} is not in the vocabulary.")
            tokens.append((text, token))
    if sides["bos"] or sides["eos"]:
        backend.post_processor = frame(sides["bos"], sides["eos"])


def _templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; files of their own win over tokenizer_config.json."""
    found: dict[str, str] = {}
    name, given = "tokenizer_config.json", settings.get("chat_template")
    if given in (None, ""):
        name = "chat_template.json"
        given = read_json(folder / name).get("chat_template")
    if isinstance(given, str):
        found["default"] = given
    elif isinstance(given, list):
        for entry in given:
            if not isinstance(entry, Mapping) or not all(isinstance(entry.get(k), str) for k in ("name", "template")):
                raise ModelError(f"{folder / name}: chat_template holds {entry!r:.80}.")
            found[entry["name"]] = entry["template"]
    elif given is not None:
        raise ModelError(f"{folder / name}: chat_template must be a string or a list of named ones, got {given!r:.80}.")
    paths = {"default": folder / "chat_template.jinja"}
    paths |= {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    for title, path in paths.items():
        if path.is_file():
            try:
                found[title] = path.read_text(encoding="utf-8")
            except (OSError, UnicodeError) as error:
                raise ModelError(f"{path} cannot be read: {error!s:.200}.") from error
    return found
