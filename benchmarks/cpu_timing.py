"""Time of a call on this CPU: what its kernel benchmarks share.

Owns the measuring, and how much memory is rotated over; it does not know what is called. Invariant: a figure is a median, so that
one disturbed call changes nothing.
"""

import time
from collections.abc import Callable
from statistics import median

import torch

CACHES = 96 << 20  # bytes of operands to rotate over; more than the last-level cache of common machines
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def seconds(call: Callable[[int], object], budget: float) -> float:
    """Median time of call(i) for i = 0, 1, ... within about `budget` seconds, after two calls that do not count."""
    call(0), call(1)
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 1000):
        start = time.perf_counter()
        call(len(times))
        times.append(time.perf_counter() - start)
    return median(times)
