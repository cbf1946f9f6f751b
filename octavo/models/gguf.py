"""GGUF: our own reader of the file format, and the dequantisation of its blocks.

Owns the bytes: header, metadata, tensor table, and the arithmetic of every block type we support. It does not know what
a key or a tensor name means (gguf_config.py and gguf_names.py do). Invariant: nothing in the file is believed before it
is checked against the length of the file, so that a truncated or hostile one is a ModelError and never costs more
memory than a small multiple of its own size; dequantised values are bit for bit those of the reference implementation.
"""

import mmap
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from octavo.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
CHUNK = 1 << 19  # elements dequantised at a time: the temporaries stay in the cache, and small beside the result

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
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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

    Raises:
        ModelError: the file is not GGUF 2 or 3, is truncated, or contradicts itself; the message names it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._map = _map_file(path)
        cursor = _Cursor(path, self._map)
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

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values of a tensor in its shape.

        Args:
            name: a key of ``tensors``.
            dtype: what quantised blocks are rounded to. F32, F16 and BF16 come as they are stored, without a copy: a
                view of the mapped file that lives as long as the tensor does.
        """
        info = self.tensors[name]
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=info.num_bytes, offset=info.start)
        if info.type in PLAIN:
            # Offsets are aligned by the format, but an alignment of 1 is legal: such a view needs a copy.
            width = BLOCKS[info.type][1]
            raw = raw if raw.data_ptr() % width == 0 else raw.clone()
            return raw.view(PLAIN[info.type]).view(info.shape)
        return dequantize(raw, info.type, dtype).view(info.shape)


def dequantize(raw: torch.Tensor, kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Values of packed blocks.

    Args:
        raw: uint8 [num_blocks * bytes of a block].
        kind: a quantised type of BLOCKS.
        dtype: float32 gives the exact values; a shorter type gives them rounded to nearest even.

    Returns:
        [num_blocks * elements of a block] of dtype.
    """
    elements, width = BLOCKS[kind]
    blocks = raw.view(-1, width)
    out = torch.empty(blocks.shape[0], elements, dtype=dtype)
    step = max(1, CHUNK // elements)
    for start in range(0, blocks.shape[0], step):
        out[start : start + step] = _DEQUANTIZE[kind](blocks[start : start + step])
    return out.view(-1)


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


# Block layouts. Each function takes uint8 [n, bytes] and gives float32 [n, elements]. Products and sums are separate
# roundings in the order of the reference, never fused. Low nibbles are the first half of a group, high ones the second.


def _half(blocks: torch.Tensor, at: int) -> torch.Tensor:
    """The float16 at a byte offset of each block, as float32 [n, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, ..., w] -> uint8 [n, ..., 2, w]: low nibbles, then high nibbles."""
    out = torch.empty(*packed.shape[:-1], 2, packed.shape[-1], dtype=torch.uint8)
    torch.bitwise_and(packed, 15, out=out[..., 0, :])
    torch.bitwise_right_shift(packed, 4, out=out[..., 1, :])
    return out


def _fifth_bits(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [n, 4] -> uint8 [n, 32]: bit i of the little-endian word, times 16."""
    shift = torch.arange(8, dtype=torch.uint8)
    return (((packed.unsqueeze(-1) >> shift) & 1) << 4).view(-1, 32)


def _q8_0(b: torch.Tensor) -> torch.Tensor:
    return b[:, 2:34].view(torch.int8).float().mul_(_half(b, 0))


def _q4_0(b: torch.Tensor) -> torch.Tensor:
    return _nibbles(b[:, 2:18]).view(-1, 32).float().sub_(8.0).mul_(_half(b, 0))


def _q4_1(b: torch.Tensor) -> torch.Tensor:
    return _nibbles(b[:, 4:20]).view(-1, 32).float().mul_(_half(b, 0)).add_(_half(b, 2))


def _q5_0(b: torch.Tensor) -> torch.Tensor:
    q = _nibbles(b[:, 6:22]).view(-1, 32) | _fifth_bits(b[:, 2:6])
    return q.float().sub_(16.0).mul_(_half(b, 0))


def _q5_1(b: torch.Tensor) -> torch.Tensor:
    q = _nibbles(b[:, 8:24]).view(-1, 32) | _fifth_bits(b[:, 4:8])
    return q.float().mul_(_half(b, 0)).add_(_half(b, 2))


def _scale_min(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8 scales and 8 minima of 6 bits that Q4_K and Q5_K pack into 12 bytes, as float32 [n, 8] each.

    Bytes 0-3 and 4-7 hold scales and minima 0-3 in their low 6 bits; bytes 8-11 hold the low 4 bits of scales and
    minima 4-7, whose upper 2 bits are the top bits of bytes 0-3 and 4-7.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scale = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], dim=1)
    minimum = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], dim=1)
    return scale.float(), minimum.float()


def _q4_k(b: torch.Tensor) -> torch.Tensor:
    scale, minimum = _scale_min(b[:, 4:16])
    scale, minimum = scale.mul_(_half(b, 0)), minimum.mul_(_half(b, 2))
    q = _nibbles(b[:, 16:144].view(-1, 4, 32)).view(-1, 8, 32).float()
    return q.mul_(scale.unsqueeze(-1)).sub_(minimum.unsqueeze(-1)).view(-1, 256)


def _q5_k(b: torch.Tensor) -> torch.Tensor:
    scale, minimum = _scale_min(b[:, 4:16])
    scale, minimum = scale.mul_(_half(b, 0)), minimum.mul_(_half(b, 2))
    high = ((b[:, 16:48].unsqueeze(1) >> torch.arange(8, dtype=torch.uint8).view(8, 1)) & 1) << 4
    q = (_nibbles(b[:, 48:176].view(-1, 4, 32)).view(-1, 8, 32) | high).float()
    return q.mul_(scale.unsqueeze(-1)).sub_(minimum.unsqueeze(-1)).view(-1, 256)


def _q6_k(b: torch.Tensor) -> torch.Tensor:
    scale = b[:, 192:208].view(torch.int8).float().mul_(_half(b, 208))
    low = _nibbles(b[:, 0:128].view(-1, 2, 64)).view(-1, 2, 4, 32)
    shift = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
    high = ((b[:, 128:192].view(-1, 2, 32).unsqueeze(2) >> shift) & 3) << 4
    q = (low | high).view(-1, 16, 16).float().sub_(32.0)
    return q.mul_(scale.unsqueeze(-1)).view(-1, 256)


_DEQUANTIZE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Q8_0": _q8_0, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q4_K": _q4_k,
    "Q5_K": _q5_k, "Q6_K": _q6_k,
}
