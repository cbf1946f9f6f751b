"""Graphs: which sizes of a step are captured, and the captured steps themselves.

Owns sizes, capture and replay; it does not know what a step computes: it is given functions. Invariant: a replay runs exactly
what its function did when it was captured, on the same buffers; nothing is captured twice.
"""

from collections.abc import Callable, Hashable

import torch

MIXED_SIZES = (16, 32, *range(64, 513, 64))  # tokens of the mixed steps that are captured
FINEST = 32  # rows between two sizes of large steps: products compute every row of padding there


def sizes(most: int) -> tuple[int, ...]:
    """1 to 8, then four sizes an octave, but none more than 32 rows from the next, up to ``most``: a step has little padding."""
    found = list(range(1, 9))
    step = 2
    while found[-1] < most:
        found += [found[-1] + step * i for i in range(1, 5)]
        step = min(2 * step, FINEST)
    return (*(size for size in found if size < most), most)


class GraphPool:
    """Captured functions by key and size; captured and replayed on the current stream, which is always the same one."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[tuple[Hashable, int], torch.cuda.CUDAGraph] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def capture(self, key: Hashable, size: int, function: Callable[[int], None]) -> None:
        """Record ``function(size)``; every kernel of it must have run before."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            function(size)
        finally:
            graph.capture_end()
        self._graphs[key, size] = graph

    def replay(self, key: Hashable, size: int) -> None:
        """Run a captured function on the current stream."""
        self._graphs[key, size].replay()
