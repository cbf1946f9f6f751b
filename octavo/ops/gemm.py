"""Linear layers over packed weights, and the embedding that shares them.

Owns the signatures and the layout's description: packed [ceil(n / 32), k, 32] with packed[i // 32, j, i % 32] =
weight[i, j], zero padded. Invariant: with the kernels, a row's result is the same bits for any number of rows and
threads (k runs in ascending order into one accumulator per output); the reference promises rounding only.
"""

from collections.abc import Callable

from torch import Tensor

from octavo.ops.library import choose

pack_linear: Callable[[Tensor], Tensor] = choose("pack_linear")
"""pack_linear(weight): weight [n, k] float32, bfloat16 or float16 -> panels [ceil(n / 32), k, 32] of the same dtype."""

linear: Callable[[Tensor, Tensor, Tensor, Tensor | None, int], None] = choose("linear")
"""linear(out, x, packed, bias, n): out = x @ weight.T + bias, in float32.

Args:
    out: float32 [tokens, n], written. x: float32 [tokens, k]. The stride of dim 0 is free in both.
    packed: [ceil(n / 32), k, 32] from pack_linear. bias: float32 [n] or None. n: output features.
"""

embedding: Callable[[Tensor, Tensor, Tensor, int], None] = choose("embedding")
"""embedding(out, ids, packed, n): out[t] = weight[ids[t]], read from the panels (tied weights are stored once).

Args:
    out: float32 [tokens, k], written. ids: int64 [tokens], each in 0 .. n - 1, else an error.
    packed: [ceil(n / 32), k, 32] from pack_linear. n: rows of the weight.
"""
