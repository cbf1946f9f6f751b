"""Weights: the tensors of a checkpoint by name, whatever the files are.

Owns the file formats (safetensors, PyTorch's .bin and .pt, GGUF, and made-up ones), their shards and their indexes. It
knows no layer and no parameter of the decoder: names are those of Hugging Face. Invariant: opening a checkpoint reads
every header and no weights, so that a file that is missing, truncated or not what it says is a ModelError before any
work is lost; a tensor is read when it is asked for, through a memory map, and nothing keeps it afterwards.
"""

import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from octavo.errors import ModelError
from octavo.models import gguf_names
from octavo.models.gguf import GgufFile
from octavo.models.gguf_blocks import read_tensor
from octavo.models.names import IGNORED, Name, match
from octavo.models.source import ModelSource, read_json
from octavo.models.spec import DecoderSpec

# A checkpoint: tensor name -> a function that reads it. The order is that of the files.
Checkpoint = dict[str, Callable[[], torch.Tensor]]


@dataclass(frozen=True)
class Stored:
    """A function of a checkpoint whose tensor lies in a file as it does in memory, so that parts of it can be read alone.

    Attributes:
        path: the file. offset: of the first byte in it. shape, dtype: of the tensor. open: maps it, which calling does too.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    open: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __call__(self) -> torch.Tensor:
        return self.open()

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SAFETENSORS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# What training leaves beside the weights.
NOT_WEIGHTS = {
    "training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.bin", "scheduler.pt", "scaler.pt", "rng_state.pth",
}
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
DUMMY_BLOCK = 1 << 20
DUMMY_SCALE = 0.02


def open_checkpoint(
    source: ModelSource, spec: DecoderSpec, dtype: torch.dtype, load_format: str = "auto"
) -> Checkpoint:
    """Open the weights of a model.

    Args:
        source: where they are. spec: the network; GGUF needs its number of heads.
        dtype: what quantised blocks are turned into; plain tensors come in their own type.
        load_format: "auto" (safetensors before .bin), "safetensors", "pt" or "gguf".

    Raises:
        ModelError: no weights, or a file that cannot be used; the message names file and reason.
    """
    if source.kind == "gguf":
        if load_format not in ("auto", "gguf"):
            text = f"load_format {load_format!r} does not fit {source.path}, which is a GGUF file."
            raise ModelError(text, "load_format")
        return _gguf(source.path, spec, dtype)
    if load_format == "gguf":
        raise ModelError(f"load_format 'gguf' needs a .gguf file, {source.path} is a folder.", "load_format")
    if load_format != "pt" and (files := _files(source.path, "model.safetensors", "*.safetensors")):
        return _merge(_safetensors(path) for path in files)
    if load_format != "safetensors" and (files := _files(source.path, "pytorch_model.bin", "*.bin", "*.pt", "*.pth")):
        return _merge(_torch(path) for path in files)
    wanted = {"auto": "*.safetensors, *.bin or *.pt", "safetensors": "*.safetensors", "pt": "*.bin or *.pt"}
    hint = "use load_format dummy to run it with made-up ones"
    if not any((source.path / name).is_file() for name in TOKENIZERS):
        hint += ", and skip_tokenizer_init because it has no tokenizer either"
    raise ModelError(f"{source.path} holds no weights ({wanted[load_format]}); {hint}.", "model")


def dummy(
    expected: Mapping[str, tuple[int, ...]], spec: DecoderSpec, dtype: torch.dtype, device: str = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """Made-up weights for every parameter of a decoder: the same ones in every run, of the scale of trained ones.

    Norms are the identity, biases zero, matrices normal with deviation 0.02. All matrices are views of one buffer that
    repeats a random block, each from another offset: drawing billions of numbers would take minutes for nothing.
    """
    block = (torch.randn(DUMMY_BLOCK, generator=torch.Generator().manual_seed(0)) * DUMMY_SCALE).to(dtype).to(device)
    buffer = block.repeat(1 + -(-max(map(math.prod, expected.values())) // DUMMY_BLOCK))
    for number, (name, shape) in enumerate(expected.items()):
        if len(shape) == 1:
            value = 1.0 - spec.norm_offset if "norm" in name and name.endswith("weight") else 0.0
            yield name, torch.full(shape, value)
            continue
        start = number * 7919 % DUMMY_BLOCK
        yield name, buffer[start : start + math.prod(shape)].view(shape)


def _files(folder: Path, whole: str, *patterns: str) -> list[Path]:
    """The files of a format: those that the index names, else the one usual file, else all that match."""
    index = folder / f"{whole}.index.json"
    if index.is_file():
        return _shards(index)
    if (folder / whole).is_file():
        return [folder / whole]
    found = sorted(p for pattern in patterns for p in folder.glob(pattern) if p.is_file())
    return [p for p in found if p.name not in NOT_WEIGHTS]


def _shards(index: Path) -> list[Path]:
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(v, str) for v in names.values()):
        raise ModelError(f"{index} has no usable weight_map.", "model")
    shards = sorted(set(names.values()))
    for shard in shards:
        if Path(shard).name != shard:
            raise ModelError(f"{index} names {shard!r}, which is not a file of its folder.", "model")
        if not (index.parent / shard).is_file():
            raise ModelError(f"{index} names the shard {shard}, which is missing.", "model")
    return [index.parent / shard for shard in shards]


def _merge(parts: Iterable[Checkpoint]) -> Checkpoint:
    merged: Checkpoint = {}
    for part in parts:
        if both := merged.keys() & part.keys():
            raise ModelError(f"two files of the checkpoint hold the tensor {min(both)!r}.", "model")
        merged |= part
    return merged


def _safetensors(path: Path) -> Checkpoint:
    try:
        file: Any = safetensors.safe_open(path, framework="pt")
        names: list[str] = list(file.keys())
    except (safetensors.SafetensorError, OSError) as error:
        text = f"{path} is not a usable safetensors file (truncated or corrupt?): {error}."
        raise ModelError(text, "model") from error

    def read(name: str) -> torch.Tensor:
        try:
            return _float(file.get_tensor(name), name, path)
        except (safetensors.SafetensorError, OSError) as error:
            raise ModelError(f"{path}: tensor {name!r} cannot be read: {error}.", "model") from error

    header, start = _safetensors_header(path)
    found: Checkpoint = {}
    for name in names:
        entry, opened = header[name], functools.partial(read, name)
        dtype = SAFETENSORS.get(entry["dtype"])
        found[name] = opened if dtype is None else Stored(
            path, start + entry["data_offsets"][0], tuple(entry["shape"]), dtype, opened)
    return found


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int]:
    """What a file that the library has opened, and so checked, says of its tensors, and where the first of them begins."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


def _torch(path: Path) -> Checkpoint:
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # files older than torch 1.6 are not archives and cannot be mapped
            if "mmap can only be used" not in str(error):
                raise
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a corrupt archive or pickle fails in any way it likes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        text = f"{path} is not a usable PyTorch file (truncated, corrupt, or not only weights?): {reason}"
        raise ModelError(text, "model") from error
    if not isinstance(state, dict):
        raise ModelError(f"{path} must hold a dictionary of tensors, it holds a {type(state).__name__}.", "model")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ModelError(f"{path}: entry {name!r} is a {type(tensor).__name__}, not a tensor.", "model")
        if tensor.is_meta or tensor.layout != torch.strided:
            kind = "on the meta device and has no values" if tensor.is_meta else f"sparse ({tensor.layout})"
            raise ModelError(f"{path}: tensor {name!r} is {kind}; only plain tensors can be loaded.", "model")
    return {name: functools.partial(_float, tensor, name, path) for name, tensor in state.items()}


def _float(tensor: torch.Tensor, name: str, path: Path) -> torch.Tensor:
    """The tensor, if it holds plain numbers: whole or 8-bit types are quantised weights whose scales lie elsewhere."""
    if tensor.dtype not in FLOATS:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ModelError(f"{path}: tensor {name!r} has type {kind}, which is not supported.", "model")
    return tensor


def _gguf(path: Path, spec: DecoderSpec, dtype: torch.dtype) -> Checkpoint:
    file = GgufFile(path)
    table = gguf_names.TABLES[file.metadata["general.architecture"]]
    found: Checkpoint = {}

    def read(name: str, entry: Name) -> torch.Tensor:
        return entry.apply(read_tensor(file, name, dtype), spec)[0]

    for name in file.tensors:
        claim = match(name, table, gguf_names.IGNORED)
        if claim is IGNORED:
            continue
        if claim is None:  # keeps its name, so that it ends among the left-over ones
            found[name] = functools.partial(read_tensor, file, name, dtype)
        else:
            entry, layer = claim
            found[entry.targets(layer)[0]] = functools.partial(read, name, entry)
    return found
