"""Time of a GPU call: what all kernel benchmarks share.

Owns the measuring; it does not know what is called. Invariant: launches are not part of a figure, because all calls are
replayed as one graph, and a figure is a median, so that one disturbed replay changes nothing.
"""

from collections.abc import Callable, Sequence
from statistics import median

import torch


def seconds(calls: Sequence[Callable[[], object]], repeats: int = 7) -> float:
    """Median time of one call, all of them captured in one graph that is replayed ``repeats`` times after one to warm up."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return median(times) / len(calls)
