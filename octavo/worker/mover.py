"""BlockMover: blocks on their way between the KV pool of a GPU and the host's, beside the step.

Owns the side stream and the staging through which blocks travel; it does not know why they move. Out of the pool: the step's
stream gathers blocks into staging at the speed of the device's memory and goes on, and a few thread blocks take them from there
over the bus while the step computes. Into the pool: they fill staging, and the step waits for it.

Invariant: everything that touches the host's blocks runs on the side stream, so moves happen there in the order of the plans;
a half of staging is written again only after it has been read.
"""

from typing import Any

import torch
from torch import Tensor

from octavo import ops
from octavo.errors import ConfigError
from octavo.worker.gpu import Gpu
from octavo.worker.host_pool import HostPool

HALVES = 2
Moves = list[tuple[Any, Any]]


class BlockMover:
    """Moves blocks between two pools.

    Args:
        kv: the pool [layers, 2, blocks, block_size, kv_heads, head_dim] of the device. host: the other one.
        staged: blocks in a half of staging; 0 when the host has none. gpu, stream: where steps run.
    """

    def __init__(self, kv: Tensor, host: HostPool, staged: int, gpu: Gpu, stream: Any) -> None:
        self._kv, self._host, self._gpu, self._stream, self._side = kv, host, gpu, stream, gpu.stream()
        shape = (HALVES, *kv.shape[:2], staged, *kv.shape[3:])
        self._halves = list(torch.empty(shape, dtype=kv.dtype, device=kv.device))
        self._free: list[Any] = [None] * HALVES  # what must have passed before a half is written again
        self._next, self._staged = 0, staged

    def out(self, pairs: Tensor) -> Moves:
        """Copy blocks pairs[:, 0] of the device to blocks pairs[:, 1] of the host; pairs int32 [n, 2] in host memory.

        Returns:
            events around each piece of the way over the bus.
        """
        if not self._pinned():
            return self._plainly(self._kv, self._host.tensor, pairs)
        moves: Moves = []
        for part in pairs.split(self._staged):
            half, index = self._take(self._stream)
            ops.swap_blocks(self._kv, half, _beside(part[:, 0], first=False))
            self._side.wait_event(self._record(self._stream))
            with self._gpu.use(self._side):
                moves.append(self._timed(half, self._host.tensor, _beside(part[:, 1], first=True)))
            self._free[index] = moves[-1][1]
        return moves

    def into(self, pairs: Tensor) -> Moves:
        """Copy blocks pairs[:, 0] of the host to blocks pairs[:, 1] of the device, before anything that is launched later."""
        if not self._pinned():
            return self._plainly(self._host.tensor, self._kv, pairs)
        moves: Moves = []
        for part in pairs.split(self._staged):
            half, index = self._take(self._side)
            with self._gpu.use(self._side):
                moves.append(self._timed(self._host.tensor, half, _beside(part[:, 0], first=False)))
            self._stream.wait_event(moves[-1][1])
            ops.swap_blocks(half, self._kv, _beside(part[:, 1], first=True))
            self._free[index] = self._record(self._stream)
        return moves

    def settle(self) -> None:
        """Wait for all moves."""
        self._side.synchronize()

    def _take(self, stream: Any) -> tuple[Tensor, int]:
        """A half of staging that ``stream`` may write from now on."""
        index = self._next
        self._next = (index + 1) % HALVES
        if (event := self._free[index]) is not None:
            stream.wait_event(event)
        return self._halves[index], index

    def _timed(self, source: Tensor, target: Tensor, pairs: Tensor) -> tuple[Any, Any]:
        begin, end = self._gpu.event(timing=True), self._gpu.event(timing=True)
        begin.record(self._side)
        ops.swap_blocks(source, target, pairs)
        end.record(self._side)
        return begin, end

    def _record(self, stream: Any) -> Any:
        event = self._gpu.event()
        event.record(stream)
        return event

    def _pinned(self) -> bool:
        try:
            self._host.wait()
        except ConfigError:  # said in the log
            return False
        return True

    def _plainly(self, source: Tensor, target: Tensor, pairs: Tensor) -> Moves:
        """With memory that could not be pinned: torch's own copies on the step's stream, slow and correct."""
        reads, writes = pairs.long().unbind(1)
        part = source.view(torch.uint8)[:, :, reads.to(source.device)]  # bytes: an 8-bit float cannot be indexed everywhere
        target.view(torch.uint8)[:, :, writes.to(target.device)] = part.to(target.device)
        return []


def _beside(blocks: Tensor, *, first: bool) -> Tensor:
    """Pairs of these blocks and the places 0, 1, ... of staging, which are the ``first`` of each pair or the second."""
    places = torch.arange(len(blocks), dtype=torch.int32)
    return torch.stack((places, blocks) if first else (blocks, places), 1)
