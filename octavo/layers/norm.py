"""RMSNorm and LayerNorm, alone or fused with the residual addition that comes before them.

Owns weight, bias and epsilon; it does not know where in a block it stands. Invariant: the two classes answer to the
same calls, so that a block is built with either and never asks which one it has.
"""

from torch import Tensor

from octavo import ops
from octavo.layers.weight import Slots, Vector


class RMSNorm:
    """x * rsqrt(mean(x^2) + eps) * (weight + offset) over the last dim.

    Args:
        size: of the last dim. eps: under the root. offset: added to the weight (1.0 in Gemma).
    """

    def __init__(self, size: int, eps: float, offset: float = 0.0, device: str = "cpu") -> None:
        self._weight = Vector(size, device)
        self.weight, self.eps, self.offset = self._weight.value, eps, offset

    def slots(self) -> Slots:
        """``weight`` [size]."""
        return {"weight": self._weight.slot()}

    def __call__(self, out: Tensor, x: Tensor) -> None:
        """out = norm(x); [tokens, size] or [tokens, heads, size]; out may be x."""
        ops.rms_norm(out, x, self.weight, self.eps, self.offset)

    def add(self, out: Tensor, residual: Tensor, x: Tensor) -> None:
        """residual += x, then out = norm(residual); three different tensors [tokens, size]."""
        ops.add_rms_norm(out, residual, x, self.weight, self.eps, self.offset)


class LayerNorm:
    """(x - mean) * rsqrt(variance + eps) * weight + bias over the last dim."""

    def __init__(self, size: int, eps: float, *, bias: bool, device: str = "cpu") -> None:
        self._weight, self._bias = Vector(size, device), Vector(size, device) if bias else None
        self.weight, self.eps = self._weight.value, eps
        self.bias: Tensor | None = self._bias.value if self._bias else None

    def slots(self) -> Slots:
        """``weight`` [size] and, where there is one, ``bias`` [size]."""
        return {"weight": self._weight.slot()} | ({"bias": self._bias.slot()} if self._bias else {})

    def __call__(self, out: Tensor, x: Tensor) -> None:
        """out = norm(x), both [tokens, size]."""
        ops.layer_norm(out, x, self.weight, self.bias, self.eps)

    def add(self, out: Tensor, residual: Tensor, x: Tensor) -> None:
        """residual += x, then out = norm(residual); three different tensors [tokens, size]."""
        ops.add_layer_norm(out, residual, x, self.weight, self.bias, self.eps)


class NoNorm:
    """Nothing but the addition: what ends a network whose last layer has normed its own output."""

    def slots(self) -> Slots:
        """No parameters."""
        return {}

    def add(self, out: Tensor, residual: Tensor, x: Tensor) -> None:
        """residual += x, then out = residual."""
        out.copy_(residual.add_(x))


Norm = RMSNorm | LayerNorm
