"""Normalisation of one row at a time: RMS and layer norm, each alone or fused with the residual add before it.

Owns the signatures; what runs behind them was chosen in library.py. Invariant: a row is reduced in one fixed order, so
its result is the same bits whatever rows stand beside it.
"""

from collections.abc import Callable

from torch import Tensor

from octavo.ops.library import choose

rms_norm: Callable[[Tensor, Tensor, Tensor, float, float], None] = choose("rms_norm")
"""rms_norm(out, x, weight, eps, offset): out = x * rsqrt(mean(x^2) + eps) * (weight + offset).

Args:
    out: float32, the shape of x, written.
    x: float32 [tokens, hidden] or [tokens, heads, head_dim]; the last dim is contiguous, the others may be strided.
    weight: [hidden] or [head_dim].
    eps: added to the mean square. offset: added to the weight (Gemma stores weight - 1).
"""

add_rms_norm: Callable[[Tensor, Tensor, Tensor, Tensor, float, float], None] = choose("add_rms_norm")
"""add_rms_norm(out, residual, x, weight, eps, offset): residual += x, then out = rms_norm(residual).

Args:
    out, residual, x: float32 [tokens, hidden]; out and residual are written.
    weight: [hidden]. eps, offset: as in rms_norm.
"""

layer_norm: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], None] = choose("layer_norm")
"""layer_norm(out, x, weight, bias, eps): out = (x - mean) * rsqrt(variance + eps) * weight + bias.

Args:
    out: float32, the shape of x, written.
    x: float32 [tokens, hidden] or [tokens, heads, head_dim]; the last dim is contiguous, the others may be strided.
    weight: [hidden]. bias: [hidden] or None. eps: added to the (biased) variance.
"""

add_layer_norm: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, float], None] = choose("add_layer_norm")
"""add_layer_norm(out, residual, x, weight, bias, eps): residual += x, then out = layer_norm(residual).

Args:
    out, residual, x: float32 [tokens, hidden]; out and residual are written.
    weight, bias, eps: as in layer_norm.
"""
