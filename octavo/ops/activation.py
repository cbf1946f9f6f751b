"""The activations of an MLP, gated and plain; kind is "silu", "gelu" (by erf), "gelu_tanh" or "relu".

Owns the signatures; what runs behind them was chosen in library.py. Invariant: elementwise, so a value depends on its
own inputs alone.
"""

from collections.abc import Callable

from torch import Tensor

from octavo.ops.library import choose

gated_activation: Callable[[Tensor, Tensor, str], None] = choose("gated_activation")
"""gated_activation(out, x, kind): out = act(x[:, :d]) * x[:, d:].

Args:
    out: float32 [tokens, d], written. x: float32 [tokens, 2 d].
    kind: the activation of the first half; an unknown one is an error.
"""

activation: Callable[[Tensor, Tensor, str], None] = choose("activation")
"""activation(out, x, kind): out = act(x).

Args:
    out: float32 [tokens, d], written (may be x itself). x: float32 [tokens, d].
    kind: as in gated_activation.
"""
