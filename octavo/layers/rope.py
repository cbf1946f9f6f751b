"""Rotary positions: one table of cosines and sines, and its application to queries and keys.

Owns the table's layout; it does not know how a checkpoint scales its frequencies (models/frequencies.py does).
Invariant: row p holds what position p rotates by, so a token's rotation depends on its position alone.
"""

import torch
from torch import Tensor

from octavo import ops


class Rope:
    """A table for positions 0 .. max_len - 1.

    Args:
        frequencies: float32 [rotary_dim / 2], radians per position. magnitude: multiplies cosines and sines.
        max_len: rows. interleaved: pairs (0, 1), (2, 3), ... instead of halves. device: where the table lives.
    """

    def __init__(
        self, frequencies: Tensor, magnitude: float, max_len: int, *, interleaved: bool, device: str = "cpu"
    ) -> None:
        assert frequencies.dtype == torch.float32
        # Angles are rounded to float32 before the cosine because that is what the networks were trained with: at
        # position 100,000 the rounding is worth milliradians, more than any later step of the computation loses.
        places = torch.arange(max_len, dtype=torch.float32, device=device)
        angles = (places[:, None] * frequencies.to(device)).double()
        half = len(frequencies)
        self.cos_sin = torch.empty(max_len, 2 * half, device=device)
        self.cos_sin[:, :half] = angles.cos().mul_(magnitude)
        self.cos_sin[:, half:] = angles.sin_().mul_(magnitude)
        self.interleaved = interleaved

    def __call__(self, q: Tensor, k: Tensor, positions: Tensor) -> None:
        """Rotate q [tokens, heads, head_dim] and k [tokens, kv_heads, head_dim] in place; positions int64 [tokens]."""
        ops.rope(q, k, positions, self.cos_sin, self.interleaved)
