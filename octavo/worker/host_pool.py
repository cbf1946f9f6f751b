"""Host blocks of a GPU: pageable memory that a background thread pins piece by piece.

Owns the memory and the pinning; it does not know what is swapped. Invariant: nobody copies to or from it before ``wait`` has
returned, and it stays pinned until it is closed.
"""

import contextlib
import math
import mmap
import threading
import time
import weakref
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from octavo.errors import ConfigError
from octavo.log import get_logger

PAGE = mmap.PAGESIZE
PIECE = 2**20  # bytes pinned at once: the driver's lock is held for as long, and launches wait for it
PAUSE = 0.02  # seconds between two pieces while nobody waits for them, at least, ...
SHARE = 60  # ... and at least so many times what a piece took
logger = get_logger(__name__)


class HostPool:
    """Pinned memory of a shape, ready some time after it was made.

    Args:
        shape, dtype: of the tensor. device: the GPU whose context pins it.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: str = "cuda") -> None:
        self._device = device
        self.tensor = _large_pages(shape, dtype)
        self._pinned: list[int] = []
        self._error = ""
        self._stop = threading.Event()
        self._hurry = threading.Event()
        self._thread = threading.Thread(target=self._pin, name="octavo-pin", daemon=True)
        self._unpin = weakref.finalize(self, _unpin, self._pinned)
        if self.tensor.numel():
            self._thread.start()

    @property
    def ready(self) -> bool:
        """Whether ``wait`` would return the tensor at once."""
        return not self._error and (self._thread.ident is None or not self._thread.is_alive())

    def wait(self) -> Tensor:
        """The tensor, once all of it is pinned.

        Raises:
            ConfigError: the system refused to pin so much.
        """
        self._hurry.set()
        if self._thread.ident is not None:
            self._thread.join()
        if self._error:
            size = self.tensor.nbytes
            raise ConfigError(f"swap_space: {size} bytes of host memory could not be pinned: {self._error}.", "swap_space")
        return self.tensor

    def close(self) -> None:
        """Give the pinning back."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self._unpin()

    def _pin(self) -> None:
        try:
            if torch.cuda.is_initialized():
                torch.cuda.set_device(self._device)  # a thread's own
            with torch.inference_mode():  # the tensor may have been made in it, and the mode is a thread's own
                self._pin_pieces()
        except Exception as error:
            self._error = str(error)
            logger.exception("Host memory for swapping could not be pinned.")

    def _pin_pieces(self) -> None:
        cudart = torch.cuda.cudart()
        content = self.tensor.view(-1).view(torch.uint8)
        base, end = self.tensor.data_ptr(), self.tensor.data_ptr() + self.tensor.nbytes
        # whole pages are pinned, and none may be pinned twice: pieces meet at borders of pages
        borders = [base, *range((base // PAGE + 1) * PAGE + PIECE, end, PIECE), end]
        for start, stop in pairwise(borders):
            if self._stop.is_set():
                return
            content[start - base : stop - base].zero_()  # the pages are made here, where no lock of the driver is held
            begun = time.monotonic()
            error = cudart.cudaHostRegister(start, stop - start, 0)
            if int(error) != 0:
                self._error = str(error)
                logger.warning("Host memory for swapping could not be pinned: %s.", error)
                return
            self._pinned.append(start)
            if not self._hurry.is_set():
                self._stop.wait(max(PAUSE, SHARE * (time.monotonic() - begun)))


def _large_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor in memory of large pages where the system has them: fewer to make and to pin."""
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype).view(shape)


def _unpin(starts: list[int]) -> None:
    """Give pinned pieces back, before their memory goes."""
    for start in starts:
        torch.cuda.cudart().cudaHostUnregister(start)
    starts.clear()
