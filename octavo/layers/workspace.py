"""What all layers of one forward pass share: buffers, positions, and the metadata of attention.

Owns the layout of the buffers; it does not know what is written into them. Attention's buffers and the MLP's never live at
the same time, so they share memory. Invariant: between two blocks the network's state is ``residual + delta``, and no
other buffer means anything.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from octavo.ops.attention import AttentionMeta
from octavo.ops.fused import SKINNY_ROWS

_ALIGN = 256  # bytes: kernels load whole cache lines


class Memory(Protocol):
    """Where the buffers of a pass come from."""

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor that belongs to this pass."""


class Fresh:
    """New memory for every buffer: what a CPU does."""

    def __init__(self, device: str = "cpu") -> None:
        self._device = device

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See Memory."""
        return torch.empty(shape, dtype=dtype, device=self._device)


class Arena:
    """One piece of device memory that is handed out from its start for each pass, so that a captured pass finds its buffers
    where they were.

    Args:
        size: bytes. device: where.
    """

    def __init__(self, size: int, device: str) -> None:
        self._bytes = torch.empty(aligned(size), dtype=torch.uint8, device=device)
        self._used = 0

    def restart(self) -> None:
        """Begin a pass; the buffers of the one before are up for reuse."""
        self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See Memory; RuntimeError when the plan was too small, which is a bug."""
        size = math.prod(shape) * dtype.itemsize
        end = self._used + aligned(size)
        if end > len(self._bytes):
            raise RuntimeError(f"the arena of {len(self._bytes)} bytes has no room for {size} more than {self._used}.")
        part = self._bytes[self._used : self._used + size].view(dtype).view(*shape)
        self._used = end
        return part


class Workspace:
    """One forward pass.

    Args:
        delta: the embedded tokens [tokens, hidden], which become the first state. normed: a buffer of that shape and type.
        positions: int64 [tokens].
        meta: where the tokens' sequences are in the cache. memory: where buffers come from.
        residual_dtype: of the sum of all sublayers; the other buffers have the type of delta. The others: sizes of the
            network.

    Attributes:
        residual, delta, normed: [tokens, hidden]. qkv: [tokens, (heads + 2 kv_heads) * head_dim] with its views
        q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]. heads: [tokens, heads, head_dim], flat
        as mixed [tokens, heads * head_dim]. up: [tokens, up_size], the MLP's first product.
        act: [tokens, intermediate]. fuses: the residual stream is float32 beside narrower activations, as products that norm
        their input want it; total: room for the stream's next value, for up to SKINNY_ROWS tokens.
    """

    __slots__ = (
        "act", "delta", "fuses", "heads", "k", "meta", "mixed", "normed", "positions", "q", "qkv", "residual", "total", "up", "v",
    )

    def __init__(
        self, delta: Tensor, normed: Tensor, positions: Tensor, meta: AttentionMeta, memory: Memory,
        residual_dtype: torch.dtype, *, num_heads: int, num_kv_heads: int, head_dim: int, up_size: int, intermediate: int,
    ) -> None:
        tokens, dtype = len(delta), delta.dtype
        self.positions, self.meta = positions, meta
        self.delta = delta
        self.residual = memory.take(delta.shape, residual_dtype).zero_()
        self.fuses = residual_dtype == torch.float32 and dtype != torch.float32
        self.total = memory.take((min(tokens, SKINNY_ROWS), delta.shape[1]), residual_dtype) if self.fuses else self.residual
        self.normed = normed
        q_size, qkv_size = num_heads * head_dim, (num_heads + 2 * num_kv_heads) * head_dim
        unit = _ALIGN // dtype.itemsize
        mixed_at, act_at = (math.ceil(tokens * size / unit) * unit for size in (qkv_size, up_size))
        shared = memory.take((max(mixed_at + tokens * q_size, act_at + tokens * intermediate),), dtype)
        self.qkv = shared[: tokens * qkv_size].view(tokens, qkv_size)
        per_token = self.qkv.view(tokens, num_heads + 2 * num_kv_heads, head_dim)
        self.q, self.k, self.v = torch.split(per_token, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        self.mixed = shared[mixed_at : mixed_at + tokens * q_size].view(tokens, q_size)
        self.heads = self.mixed.view(tokens, num_heads, head_dim)
        self.up = shared[: tokens * up_size].view(tokens, up_size)
        self.act = shared[act_at : act_at + tokens * intermediate].view(tokens, intermediate)

    def exchange(self) -> None:
        """The stream's next value has been written into ``total``, which becomes ``residual``."""
        self.residual, self.total = self.total, self.residual


def aligned(size: int) -> int:
    """Bytes rounded up to what a buffer of an Arena takes."""
    return math.ceil(size / _ALIGN) * _ALIGN
