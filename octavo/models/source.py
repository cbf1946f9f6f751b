"""ModelSource: where a model lies on this machine and what its config says, as frozen data.

Owns the record that ``hub.resolve`` makes and that the loader, the worker and the tokenizer read, and the reading of
its JSON files. It does not know how to find, fetch or read a checkpoint. Invariant: ``path`` existed when the record was
made, and ``config`` already carries the user's overrides.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from octavo.errors import ModelError


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model on the local disk.

    Attributes:
        kind: "folder" (Hugging Face layout: config.json beside the weights) or "gguf" (one file).
        path: the folder, or the GGUF file.
        config: config.json with hf_overrides applied; for a GGUF file the same keys, made from its metadata.
        generation_config: generation_config.json, or {}.
        name: the model as the user typed it, for messages.
    """

    kind: Literal["folder", "gguf"]
    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any] = field(default_factory=dict)
    name: str = ""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ModelError names the file and the reason."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read: {error}.", "model") from error
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold a JSON object, it holds a {type(found).__name__}.", "model")
    return found
