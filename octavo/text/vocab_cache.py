"""A folder of built vocabularies: very large ones take seconds to build and well under one to read back.

Owns the files and their keys; it does not know how a vocabulary is built. Invariant: a file is named by the hash of all
that it was built from, gets its name when it is complete, and one that cannot be read is built again.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Tokenizer as Backend

from octavo.log import get_logger

FORMAT = 1  # to be raised when the building changes, so that old files are not found
WORTH_KEEPING = 200_000  # tokens; smaller vocabularies are built in less than a second

logger = get_logger(__name__)


def key_of(metadata: Mapping[str, Any]) -> str:
    """SHA-256 over every tokenizer key of a GGUF file, this file's format and the library's version."""
    found = hashlib.sha256(f"{FORMAT} {tokenizers.__version__}".encode())
    for name in sorted(name for name in metadata if name.startswith("tokenizer.ggml.")):
        value = metadata[name]
        raw = value.tobytes() if hasattr(value, "tobytes") else repr(value).encode()
        for part in (name.encode(), raw):
            found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


def cached(folder: Path, key: str, build: Callable[[], Backend]) -> Backend:
    """The vocabulary kept under ``key``, or the one that ``build`` makes, which is kept for the next time.

    A folder that cannot be written costs the caching only, and is said in the log.
    """
    path = folder / f"{key}.json"
    if path.is_file():
        try:
            return Backend.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library's own type, or the disk's
            logger.warning("%s cannot be read (%s) and is built again.", path, error)
    backend = build()
    written: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, delete=False) as file:
            written = Path(file.name)
            file.write(backend.to_str())
        os.replace(written, path)
        written = None
    except OSError as error:
        logger.warning("The built vocabulary cannot be kept in %s: %s.", folder, error)
    finally:
        if written is not None:
            written.unlink(missing_ok=True)
    return backend
