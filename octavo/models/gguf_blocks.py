"""GGUF blocks: the values of a GGUF file's tensors.

Owns the arithmetic of every block type we support; it does not know the file's header. Invariant: dequantised values are
bit for bit those of the reference implementation, and the temporaries of dequantising stay small.
"""

from collections.abc import Callable

import torch

from octavo.models.gguf import BLOCKS, GgufFile

CHUNK = 1 << 19  # elements dequantised at a time: the temporaries stay in the cache, and small beside the result
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_tensor(file: GgufFile, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values of a tensor in its shape.

    Args:
        name: a key of ``file.tensors``.
        dtype: what quantised blocks are rounded to. F32, F16 and BF16 come as they are stored, without a copy: a
            view of the mapped file that lives as long as the tensor does.
    """
    info = file.tensors[name]
    raw = torch.frombuffer(file.data, dtype=torch.uint8, count=info.num_bytes, offset=info.start)
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
