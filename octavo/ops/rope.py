"""Rotary positions, applied in place to queries and keys.

Owns the signature; the table of angles is made by layers/rope.py. Invariant: only the first rotary_dim dims of a head
change, and each token is turned by its own position alone.
"""

from collections.abc import Callable

from torch import Tensor

from octavo.ops.library import choose

rope: Callable[[Tensor, Tensor, Tensor, Tensor, bool], None] = choose("rope")
"""rope(q, k, positions, cos_sin, interleaved): turn pairs (a, b) to (a cos - b sin, b cos + a sin).

Args:
    q: float32 [tokens, heads, head_dim], written. k: float32 [tokens, kv_heads, head_dim], written. The stride of dim 0
        is free in both.
    positions: int64 [tokens], each below max_pos.
    cos_sin: float32 [max_pos, rotary_dim], cosines in the first half of a row and sines in the second.
    interleaved: pairs are neighbours (2i, 2i + 1); else halves (i, i + rotary_dim / 2).
"""
