"""load_tokenizer: finds and reads the vocabulary that belongs to a model.

Owns where a tokenizer comes from (the model's folder or GGUF file, another folder, the hub) and which end tokens join
it; it does not know how it works: that is ``Tokenizer``, which is offered here too. Invariant: whatever goes wrong is a
ModelError that names the place. No torch is loaded: the server's front has no use for it.
"""

from dataclasses import replace
from pathlib import Path

from octavo.config import EngineConfig
from octavo.errors import ModelError
from octavo.models.gguf import GgufFile
from octavo.models.hub import PINNED, cache_dir, resolve
from octavo.models.source import ModelSource
from octavo.text.folder_vocab import FILES, vocabulary_from_folder
from octavo.text.gguf_vocab import vocabulary_from_gguf
from octavo.text.vocabulary import Tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]


def load_tokenizer(source: ModelSource, config: EngineConfig) -> Tokenizer:
    """The tokenizer of a model, or the one that ``config.tokenizer`` names (folder, GGUF file or hub id).

    End tokens of generation_config.json (without it, of the model's config) join the tokenizer's own.

    Raises:
        ModelError: there is none, or it cannot be read.
    """
    path = source.path if config.tokenizer is None else _locate(config.tokenizer, config)
    if path.is_file():
        backend, facts = vocabulary_from_gguf(GgufFile(path).metadata, str(path), cache_dir() / "tokenizers")
    else:
        backend, facts = vocabulary_from_folder(path)
    ends = source.generation_config.get("eos_token_id")
    if ends is None:
        ends = source.config.get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return Tokenizer(backend, replace(facts, eos_token_ids=(*facts.eos_token_ids, *listed)))


def _locate(name: str, config: EngineConfig) -> Path:
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name in PINNED:
        return resolve(config.replace(model=name, hf_overrides={})).path
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"tokenizer {name!r:.200} is not a folder or file on this machine.", "tokenizer")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name, revision=config.revision, cache_dir=config.download_dir, allow_patterns=list(FILES))
    except Exception as error:  # network, login, unknown name: one of many types, some of the hub's HTTP library
        raise ModelError(
            f"tokenizer {name!r:.200} is no local folder and cannot be fetched from the hub ({type(error).__name__}); "
            "give a local folder when offline.", "tokenizer") from error
    return Path(folder)
