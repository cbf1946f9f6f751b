"""GGUF: our own reader of the file format.

Owns the bytes of header, metadata and tensor table, without torch. It does not know what a key or a tensor name means
(gguf_config.py and gguf_names.py do) or how a block is packed (gguf_blocks.py does). Invariant: nothing in the file is
believed before it is checked against the length of the file, so that a truncated or hostile one is a ModelError and
never costs more memory than a small multiple of its own size.
"""

import mmap
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from octavo.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

_STRING, _ARRAY = 8, 9
_SCALARS: dict[int, str] = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}

# Names of the types of the format, so that an error can name what we cannot read.
TYPE_NAMES: dict[int, str] = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4",
}

# Types we read: elements and bytes of a block.
BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q4_1": (32, 20),
    "Q5_0": (32, 22), "Q5_1": (32, 24), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
}


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One entry of the tensor table: name, shape in torch's order (rows first), type, and where its bytes lie."""

    name: str
    shape: tuple[int, ...]
    type: str
    start: int
    num_bytes: int


class GgufFile:
    """An open GGUF file.

    Attributes:
        metadata: key -> value; numeric arrays are numpy arrays, arrays of strings are lists.
        tensors: name -> GgufTensor in the order of the file.
        data: the mapped bytes of the whole file.

    Raises:
        ModelError: the file is not GGUF 2 or 3, is truncated, or contradicts itself; the message names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = _map_file(path)
        cursor = _Cursor(path, self.data)
        num_tensors, num_values = cursor.header()
        self.metadata: dict[str, Any] = {}
        for _ in range(num_values):
            key = cursor.string("a metadata key")
            if key in self.metadata:
                raise cursor.error(f"the metadata key {key!r} appears twice")
            self.metadata[key] = cursor.value(cursor.scalar("<u4"), key)
        table = [cursor.tensor_info() for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise cursor.error(f"general.alignment must be a power of two, got {alignment!r}")
        data_start = -(-cursor.at // alignment) * alignment
        self.tensors: dict[str, GgufTensor] = {}
        for name, shape, number, offset in table:
            if name in self.tensors:
                raise cursor.error(f"the tensor {name!r} appears twice")
            self.tensors[name] = cursor.place(name, shape, number, offset, data_start, alignment)

    def floats(self, name: str) -> npt.NDArray[np.floating[Any]]:
        """The values of a short F32 or F16 tensor, flat; ModelError for other types (gguf_blocks.py reads them all)."""
        info = self.tensors[name]
        if info.type not in ("F32", "F16"):
            raise ModelError(f"{self.path}: tensor {name!r} must be F32 or F16, it is {info.type}.", "model")
        return np.frombuffer(self.data[info.start : info.start + info.num_bytes], "<f4" if info.type == "F32" else "<f2")


def _map_file(path: Path) -> mmap.mmap:
    """Map the file privately: torch wants writable memory, and what is never written is never copied."""
    flags = mmap.MAP_PRIVATE
    if sys.platform == "linux":
        flags |= 0x4000  # MAP_NORESERVE (a name only since Python 3.13): a private map must not count as memory
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
        raise ModelError(f"{path} cannot be read as GGUF: {error}.", "model") from error


class _Cursor:
    """Reads forward through the header; every step is checked against the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.end = path, data, 0, len(data)

    def error(self, reason: str) -> ModelError:
        where = f"(at byte {self.at} of {self.end})"
        return ModelError(f"{self.path} is not a usable GGUF file: {reason} {where}.", "model")

    def take(self, count: int, what: str) -> int:
        """Advance by count bytes and return where they start."""
        start = self.at
        if count > self.end - start:
            raise self.error(f"it is truncated, {what} needs {count} bytes")
        self.at = start + count
        return start

    def scalar(self, kind: str) -> int:
        return int.from_bytes(self.data[self.take(int(kind[2:]), "a number") : self.at], "little")

    def string(self, what: str) -> str:
        start = self.take(self.scalar("<u8"), what)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8") from error

    def header(self) -> tuple[int, int]:
        """Check magic and version; return the number of tensors and of metadata values."""
        if self.data[self.take(4, "the magic") : self.at] != MAGIC:
            raise self.error("it does not begin with GGUF")
        version = self.scalar("<u4")
        if version not in VERSIONS:
            big = " (big-endian)" if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS else ""
            raise self.error(f"version {version}{big} is not supported, only {VERSIONS[0]} and {VERSIONS[1]}")
        num_tensors, num_values = self.scalar("<u8"), self.scalar("<u8")
        # The shortest entries there can be: a value of one byte after key length and type; a tensor without a name.
        if num_values * 13 + num_tensors * 24 > self.end - self.at:
            raise self.error(f"it is truncated, {num_values} values and {num_tensors} tensors do not fit")
        return num_tensors, num_values

    def value(self, kind: int, key: str) -> Any:
        """A metadata value of a type number."""
        if kind == _STRING:
            return self.string(f"the value of {key}")
        if kind == _ARRAY:
            return self.array(key)
        return self.numbers(kind, 1, key)[0].item()

    def numbers(self, kind: int, count: int, key: str) -> Any:
        if kind not in _SCALARS:
            raise self.error(f"{key} has the unknown value type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        start = self.take(count * dtype.itemsize, f"the value of {key}")
        return np.frombuffer(self.data[start : self.at], dtype=dtype)

    def array(self, key: str) -> Any:
        kind, count = self.scalar("<u4"), self.scalar("<u8")
        if kind == _ARRAY:
            raise self.error(f"{key} is an array of arrays, which is not supported")
        if kind != _STRING:
            return self.numbers(kind, count, key)
        return self.strings(count, key)

    def strings(self, count: int, key: str) -> list[str]:
        """The hot loop of opening a file: a vocabulary and its merges are a hundred thousand strings and more."""
        data, at, end, length = self.data, self.at, self.end, struct.Struct("<Q").unpack_from
        found = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + length(data, at)[0]
                if at > end:
                    raise self.error(f"it is truncated inside {key}")
                found.append(data[start:at].decode("utf-8"))
        except struct.error as error:
            raise self.error(f"it is truncated inside {key}") from error
        except UnicodeDecodeError as error:
            raise self.error(f"{key} holds a string that is not UTF-8") from error
        self.at = at
        return found

    def tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape (rows first), type number and offset of the next tensor."""
        name = self.string("a tensor name")
        num_dims = self.scalar("<u4")
        if not 1 <= num_dims <= MAX_DIMS:
            raise self.error(f"tensor {name!r} has {num_dims} dimensions")
        dims = [self.scalar("<u8") for _ in range(num_dims)]
        return name, tuple(reversed(dims)), self.scalar("<u4"), self.scalar("<u8")

    def place(
        self, name: str, shape: tuple[int, ...], number: int, offset: int, base: int, alignment: int
    ) -> GgufTensor:
        """Check an entry of the tensor table against its type and the file."""
        kind = TYPE_NAMES.get(number, f"number {number}")
        if kind not in BLOCKS:
            supported = ", ".join(BLOCKS)
            raise ModelError(f"{self.path}: tensor {name!r} has type {kind}; supported are {supported}.", "model")
        elements, width = BLOCKS[kind]
        count = 1
        for dim in shape:
            count *= dim
        if count == 0 or shape[-1] % elements:
            raise self.error(f"tensor {name!r} of shape {shape} does not divide into {kind} blocks of {elements}")
        num_bytes = count // elements * width
        if offset % alignment:
            raise self.error(f"tensor {name!r} begins at {offset}, which is not aligned to {alignment}")
        needed = base + offset + num_bytes
        if needed > self.end:
            text = f"is truncated: tensor {name!r} needs bytes up to {needed}, the file has {self.end}"
            raise ModelError(f"{self.path} {text}.", "model")
        return GgufTensor(name, shape, kind, base + offset, num_bytes)
