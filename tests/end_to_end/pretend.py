"""A pretended GPU: CudaRunner's device made of CPU tensors, with the reference functions behind the GPU's operators.

What runs on it is everything but the kernels: staging, rows on the device, graphs (functions that are called again), results
that arrive later, the sampling of rows that ask for more. Results "arrive" when an event is awaited and not before.
"""

from collections import Counter
from contextlib import nullcontext

import torch

from octavo import ops
from octavo.ops import fused_reference, library, reference
from octavo.worker.machine import GIB, Machine

NAME = "cpu:0"  # a name of the CPU that is not "cpu": layers and pools take the GPU's paths


class PretendEvent:
    def record(self, stream=None):
        self.passed = False

    def synchronize(self):
        self.passed = True

    def query(self):
        return self.passed

    def elapsed_time(self, other):
        return 0.5


class PretendStream:
    def synchronize(self):
        pass

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass


class PretendGraphs:
    """Calls the function again where a GPU would replay it."""

    def __init__(self):
        self.captured = {}

    def __len__(self):
        return len(self.captured)

    def capture(self, key, size, function):
        assert (key, size) not in self.captured
        self.captured[key, size] = function

    def replay(self, key, size):
        self.captured[key, size](size)


class PretendHostPool:
    ready = True

    def __init__(self, shape, dtype):
        self.tensor = torch.empty(shape, dtype=dtype)

    def start(self):
        pass

    def stepped(self):
        pass

    def expect(self):
        pass

    def wait(self):
        return self.tensor

    def close(self):
        pass


class PretendGpu:
    name = NAME

    def memory(self):
        return Machine("cuda", 3 * GIB, 3 * GIB, 8 * GIB)

    def stream(self):
        return PretendStream()

    def use(self, stream):
        return nullcontext()

    def event(self, *, timing=False):
        return PretendEvent()

    def pinned(self, shape, dtype):
        return torch.zeros(shape, dtype=dtype)

    def graphs(self):
        return PretendGraphs()

    def host_pool(self, shape, dtype):
        return PretendHostPool(shape, dtype)

    def trim(self):
        pass


def use_references(monkeypatch):
    """Put plain torch behind the operators that CPU tensors of a pretended GPU reach, padding included."""
    for name in library.GPU_NAMES:
        monkeypatch.setattr(ops, name, getattr(fused_reference, name))
    for name in ("paged_attention", "sample", "penalties", "token_logprobs", "gated_activation", "rms_norm", "add_rms_norm",
                 "copy_blocks", "swap_blocks"):
        monkeypatch.setattr(ops, name, getattr(reference, name))


def count_calls(monkeypatch, *kinds):
    """How often each method of these classes is called from now on, by "class.method"."""
    calls = Counter()

    def counting(key, method):
        def counted(*args, **options):
            calls[key] += 1
            return method(*args, **options)

        return counted

    for kind in kinds:
        for name, method in [*vars(kind).items()]:
            if callable(method):
                monkeypatch.setattr(kind, name, counting(f"{kind.__name__}.{name}", method))
    return calls


def fail_at(monkeypatch, name, *calls):
    """The operator raises in its n-th calls from now on, counted from 1, and does what it did in all others."""
    operator, count = getattr(ops, name), 0

    def failing(*args):
        nonlocal count
        count += 1
        if count in calls:
            raise MemoryError("planted")
        return operator(*args)

    monkeypatch.setattr(ops, name, failing)
