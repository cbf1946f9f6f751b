"""What all layers of one forward pass share: buffers, positions, and the metadata of attention.

Owns the buffers' memory; it does not know what is written into them. Attention's buffers and the MLP's never live at
the same time, so they share an arena. Invariant: between two blocks the network's state is ``residual + delta``, and no
other buffer means anything.
"""

import math

import torch
from torch import Tensor

from octavo.ops.attention import AttentionMeta

_ALIGN = 16  # float32 values in 64 bytes: kernels load whole cache lines


class Workspace:
    """One forward pass; its buffers are float32.

    Args:
        delta: the embedded tokens [tokens, hidden], which become the first state. positions: int64 [tokens].
        meta: where the tokens' sequences are in the cache. The others: sizes of the network.

    Attributes:
        residual, delta, normed: [tokens, hidden]. qkv: [tokens, (heads + 2 kv_heads) * head_dim] with its views
        q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim]. heads: [tokens, heads, head_dim], flat
        as mixed [tokens, heads * head_dim]. up: [tokens, up_size], the MLP's first product.
        act: [tokens, intermediate].
    """

    __slots__ = (
        "act", "delta", "heads", "k", "meta", "mixed", "normed", "positions", "q", "qkv", "residual", "up", "v",
    )

    def __init__(
        self, delta: Tensor, positions: Tensor, meta: AttentionMeta, *, num_heads: int, num_kv_heads: int,
        head_dim: int, up_size: int, intermediate: int,
    ) -> None:
        tokens = len(delta)
        self.positions, self.meta = positions, meta
        self.delta = delta
        self.residual = torch.zeros_like(delta)
        self.normed = torch.empty_like(delta)
        q_size, qkv_size = num_heads * head_dim, (num_heads + 2 * num_kv_heads) * head_dim
        mixed_at, act_at = _aligned(tokens * qkv_size), _aligned(tokens * up_size)
        arena = torch.empty(max(mixed_at + tokens * q_size, act_at + tokens * intermediate))
        self.qkv = arena.as_strided((tokens, qkv_size), (qkv_size, 1), 0)
        per_token = self.qkv.view(tokens, num_heads + 2 * num_kv_heads, head_dim)
        self.q, self.k, self.v = torch.split(per_token, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        self.mixed = arena.as_strided((tokens, q_size), (q_size, 1), mixed_at)
        self.heads = self.mixed.view(tokens, num_heads, head_dim)
        self.up = arena.as_strided((tokens, up_size), (up_size, 1), 0)
        self.act = arena.as_strided((tokens, intermediate), (intermediate, 1), act_at)


def _aligned(values: int) -> int:
    return math.ceil(values / _ALIGN) * _ALIGN
