"""The GPU of this process: whether there is one that can be used, its memory, and its streams, events and pinned memory.

Owns the sentences for GPUs that are absent, too old or taken, and everything that the worker asks of CUDA itself, so that tests
can put a pretended device in its place. Invariant: a ``Gpu`` that exists can be used by torch and by our kernels.
"""

import gc
from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cache
from typing import Any

import psutil
import torch
from torch import Tensor

from octavo import ops
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.log import get_logger
from octavo.worker.graphs import GraphPool
from octavo.worker.host_pool import HostPool
from octavo.worker.machine import Machine

logger = get_logger(__name__)
OLDEST = 7.0  # compute capability


@cache
def usable() -> bool:
    """Whether "auto" may choose the GPU: torch sees one, and our kernels are built (said once where they are not)."""
    if not torch.cuda.is_available():
        return False
    if not ops.cuda_built():
        logger.warning("There is a GPU, but the CUDA kernels are not built, so the CPU is used. %s", ops.REBUILD_CUDA)
        return False
    return True


def check_gpu(config: EngineConfig) -> None:
    """Load the CUDA kernels.

    Raises:
        ConfigError: there is no GPU, torch cannot use it, it is too old, the kernels are not built for it, or an option asks
            for what a GPU does not do yet.
    """
    if config.batch_invariant:
        raise ConfigError("batch_invariant is not supported on a GPU yet.", "batch_invariant")
    if torch.version.cuda is None:
        raise ConfigError(f"device cuda needs a torch with CUDA; torch {torch.__version__} has none.", "device")
    if not torch.cuda.is_available():
        raise ConfigError("device cuda: no NVIDIA GPU is found, or its driver is missing or too old for this torch.", "device")
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    version = f"{capability[0]}.{capability[1]}"
    if float(version) < OLDEST:
        raise ConfigError(f"device cuda: {name} has compute capability {version}; {OLDEST} is the oldest supported.", "device")
    ops.load_cuda()
    try:
        counts = torch.zeros((1, 1), dtype=torch.int32, device="cuda")
        ops.count_tokens(counts, counts[0], counts[0])
    except RuntimeError as error:  # torch's out-of-memory errors are RuntimeErrors too
        if "out of memory" in str(error):
            text = f"device cuda: {name} has no free memory at all; other processes have taken it."
            raise ConfigError(text, "device") from error
        if "kernel image" not in str(error):
            raise
        raise ConfigError(
            f"the CUDA kernels are not built for {name} (compute capability {version}). Build them with `make cuda` on this "
            f"machine, or with OCTAVO_CUDA_ARCHS={version}.", "device") from error


class Gpu:
    """The current GPU.

    Attributes:
        name: what torch calls it, with its number: threads have a current device of their own.

    Raises:
        ConfigError: see check_gpu.
    """

    def __init__(self, config: EngineConfig) -> None:
        check_gpu(config)
        self.name = f"cuda:{torch.cuda.current_device()}"

    def memory(self) -> Machine:
        """Its memory, with what this process and others have taken of it already."""
        if torch.cuda.memory_reserved():  # of an engine that was closed: torch may hold what nobody uses any more
            gc.collect()
            self.trim()
        free, total = torch.cuda.mem_get_info()
        return Machine("cuda", total, free, int(psutil.virtual_memory().total))

    def stream(self) -> Any:
        """A new stream."""
        return torch.cuda.Stream()

    def use(self, stream: Any) -> AbstractContextManager[Any]:
        """Launch on ``stream`` while the context lasts."""
        return torch.cuda.stream(stream)

    def event(self, *, timing: bool = False) -> Any:
        """A new event; with ``timing``, one that says when it passed."""
        return torch.cuda.Event(enable_timing=timing)

    def pinned(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Host memory that the GPU reads and writes by itself."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def graphs(self) -> GraphPool:
        """An empty pool of graphs."""
        return GraphPool()

    def host_pool(self, shape: Sequence[int], dtype: torch.dtype) -> HostPool:
        """Host memory for blocks."""
        return HostPool(shape, dtype, self.name)

    def trim(self) -> None:
        """Give memory that torch holds and nobody uses back to the GPU."""
        torch.cuda.empty_cache()
