"""Where a parameter lives: vectors in float32, matrices in a weight format that allocates, loads and applies itself.

Owns storage types and layouts; it does not know what a matrix means in the network or what a checkpoint calls it. The CPU
multiplies packed panels, a GPU plain rows: ``matrix`` chooses, once, when a layer is built. Invariant: what is stored is a
copy of our own, never a view of the caller's tensor; the two formats answer to the same calls.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from octavo import ops
from octavo.ops.fused import SKINNY_ROWS, SKINNY_SCRATCH
from octavo.ops.reference import PANEL

TILED_ROWS = 32  # most rows that go to the tile operators, which take more: from there on cuBLAS is as fast or faster
NO_TILES = "needs a device of compute capability 9.0"  # the words of csrc/cuda/gemm_tile_sm90.cu


class Slot(NamedTuple):
    """A place that a checkpoint must fill: the shape it has there, and what takes the tensor."""

    shape: tuple[int, ...]
    store: Callable[[Tensor], None]


Slots = dict[str, Slot]


def prefixed(prefix: str, slots: Mapping[str, Slot]) -> Slots:
    """The slots under longer names."""
    return {prefix + name: slot for name, slot in slots.items()}


class Vector:
    """A float32 [size] parameter: norm weights and biases."""

    def __init__(self, size: int, device: str = "cpu") -> None:
        self.value = torch.zeros(size, dtype=torch.float32, device=device)

    def slot(self, start: int = 0, size: int | None = None) -> Slot:
        """The place of entries start .. start + size; all of them by default."""
        part = self.value[start : None if size is None else start + size]
        return Slot((len(part),), lambda tensor: _fill(part, tensor))


class Table:
    """A [rows, columns] parameter that is only looked up: kept as it comes, in its storage type."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: str = "cpu") -> None:
        self.value, self._plain = torch.empty(rows, columns, dtype=dtype, device=device), device == "cpu"

    def take(self, start: int, part: Tensor) -> None:
        """Take rows start .. start + len(part) of the weight."""
        _fill(self.value[start : start + len(part)], part)

    def gather(self, out: Tensor, ids: Tensor) -> None:
        """out [tokens, columns] = rows ids."""
        if not self._plain:
            ops.lookup(out, ids, self.value)
        elif self.value.dtype == torch.float32:
            torch.index_select(self.value, 0, ids, out=out)
        else:
            out.copy_(torch.index_select(self.value, 0, ids))


class PackedWeight:
    """A [rows, columns] matrix in the panels of ``ops.pack_linear``, for the CPU; rows are output features.

    Activations are float32. Panels are made at the moment the last rows arrive, so that loading never holds more than one
    layer's parts beside the packed weights.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        self.rows, self.columns, self.dtype = rows, columns, dtype
        self.packed = torch.empty(0, columns, PANEL, dtype=dtype)
        self._arrived: dict[int, Tensor] = {}

    def take(self, start: int, part: Tensor) -> None:
        """Take rows start .. start + len(part), in any floating type; every row comes once."""
        assert part.shape[1] == self.columns and start + len(part) <= self.rows
        self._arrived[start] = part.to(self.dtype)
        if sum(map(len, self._arrived.values())) == self.rows:
            parts = [self._arrived[key] for key in sorted(self._arrived)]
            self._arrived.clear()
            self.packed = ops.pack_linear((parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous())

    def apply(self, out: Tensor, x: Tensor, bias: Tensor | None) -> None:
        """out [tokens, rows] = x [tokens, columns] @ weight.T + bias."""
        ops.linear(out, x, self.packed, bias, self.rows)

    def apply_gated(self, out: Tensor, x: Tensor, bias: Tensor | None, kind: str, both: Tensor) -> None:
        """out [tokens, rows / 2] = act(gate) * up of the two halves of the product, which ``both`` [tokens, rows] holds."""
        self.apply(both, x, bias)
        ops.gated_activation(out, both, kind)

    def takes_norm(self, tokens: int) -> bool:
        """Whether a norm before the product can be part of it: never here."""
        return False

    def gather(self, out: Tensor, ids: Tensor) -> None:
        """out float32 [tokens, columns] = rows ids."""
        ops.embedding(out, ids, self.packed, self.rows)


class DenseWeight:
    """A [rows, columns] matrix as it is in a checkpoint, on a GPU; rows are output features.

    Up to SKINNY_ROWS tokens our own kernel streams the weight, and where there is one for more it takes up to TILED_ROWS;
    the others go to cuBLAS, whose order of summation depends on the number of tokens. Activations are of the weight's type; the
    product may be stored in float32.
    """

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: str) -> None:
        self.rows, self.columns, self.dtype = rows, columns, dtype
        self.value = torch.empty(rows, columns, dtype=dtype, device=device)
        self._turned = self.value.t()
        self._skinny = dtype != torch.float32 and columns % 8 == 0 and _has_tensor_cores(device)
        self._tile_rows = TILED_ROWS if self._skinny and _has_tiles(device, dtype) else 0
        self._scratch = _scratch(device, torch.cuda.current_stream().cuda_stream if device.startswith("cuda") else 0)

    def take(self, start: int, part: Tensor) -> None:
        """Take rows start .. start + len(part), in any floating type, from any device."""
        assert part.shape[1] == self.columns and start + len(part) <= self.rows
        _fill(self.value[start : start + len(part)], part)

    def apply(self, out: Tensor, x: Tensor, bias: Tensor | None) -> None:
        """out [tokens, rows] = x [tokens, columns] @ weight.T + bias."""
        if self._skinny and len(x) <= SKINNY_ROWS:
            ops.skinny_linear(out, x, self.value, bias, self._scratch)
            return
        if len(x) <= self._tile_rows:
            ops.tile_linear(out, x, self.value, bias)
            return
        if out.dtype == x.dtype:
            torch.mm(x, self._turned, out=out)
        else:
            torch.mm(x, self._turned, out_dtype=out.dtype, out=out)
        if bias is not None:
            out.add_(bias)

    def apply_gated(self, out: Tensor, x: Tensor, bias: Tensor | None, kind: str, both: Tensor) -> None:
        """out [tokens, rows / 2] = act(gate) * up of the two halves of the product; ``both`` is room for it."""
        if self._skinny and len(x) <= SKINNY_ROWS:
            ops.skinny_gated(out, x, self.value, bias, kind, self._scratch)
            return
        if len(x) <= self._tile_rows and self.rows % 16 == 0:
            ops.tile_gated(out, x, self.value, bias, kind)
            return
        self.apply(both, x, bias)
        ops.gated_activation(out, both, kind)

    def takes_norm(self, tokens: int) -> bool:
        """Whether ``norm_linear`` and ``norm_gated`` of ops compute the product of so many tokens with the norm before it."""
        return self._skinny and tokens <= SKINNY_ROWS

    @property
    def scratch(self) -> Tensor:
        """What those two need beside the weight."""
        return self._scratch

    def gather(self, out: Tensor, ids: Tensor) -> None:
        """out [tokens, columns] = rows ids."""
        ops.lookup(out, ids, self.value)


Weight = PackedWeight | DenseWeight


def matrix(rows: int, columns: int, dtype: torch.dtype, device: str) -> Weight:
    """A matrix in the format that the device multiplies."""
    return PackedWeight(rows, columns, dtype) if device == "cpu" else DenseWeight(rows, columns, dtype, device)


@cache
def _scratch(device: str, stream: int) -> Tensor:
    """Room for normed rows: one piece for every stream on which models are built, whose kernels use it in turn."""
    return torch.zeros(SKINNY_SCRATCH, dtype=torch.float32, device=device)


@cache
def _has_tensor_cores(device: str) -> bool:
    """Whether the device has the instructions of the skinny operators: from compute capability 8.0 on."""
    return not device.startswith("cuda") or torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _has_tiles(device: str, dtype: torch.dtype) -> bool:
    """Whether the device and the build have the tile operators: one is tried, without rows, because the toolkit decides too."""
    if not device.startswith("cuda"):
        return True
    x, weight = (torch.empty(rows, 8, dtype=dtype, device=device) for rows in (0, 8))
    try:
        ops.tile_linear(x, x, weight, None)
    except RuntimeError as error:
        if NO_TILES not in str(error):
            raise
        return False
    return True


def _fill(destination: Tensor, tensor: Tensor) -> None:
    destination.copy_(tensor)
