"""Host blocks of a GPU: pageable memory that a background thread pins piece by piece, while the GPU is idle if it can.

Owns the memory and the pinning; it does not know what is swapped. Pinning holds a lock of the driver that launches wait for,
so it keeps out of the way: between steps it goes on only once blocks will soon be needed (``expect``), and then slowly; while
no step is launched it goes at full speed. Invariant: nobody copies to or from it before ``wait`` has returned, and it stays
pinned until it is closed.
"""

import contextlib
import enum
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
PAUSE = 0.02  # seconds between two pieces while steps run beside, at least, ...
SHARE = 60  # ... and at least so many times what a piece took
QUIET = 0.1  # seconds without a step after which the GPU counts as idle
logger = get_logger(__name__)


class Urgency(enum.IntEnum):
    """How soon blocks are needed; it only rises."""

    NONE = 0
    EXPECTED = 1
    AWAITED = 2
    CLOSED = 3  # never again


class HostPool:
    """Pinned memory of a shape, ready some time after ``start``.

    Args:
        shape, dtype: of the tensor. device: the GPU whose context pins it.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, device: str = "cuda") -> None:
        self._device = device
        self.tensor = _large_pages(shape, dtype)
        self._pinned: list[int] = []
        self._error = ""
        self._whole = not self.tensor.numel()
        self._last_step, self._pause = time.monotonic(), PAUSE
        self._changed = threading.Condition()  # guards what the thread looks at between two pieces
        self._urgency = Urgency.NONE
        self._thread = threading.Thread(target=self._pin, name="octavo-pin", daemon=True)
        self._unpin = weakref.finalize(self, _unpin, self._pinned)

    @property
    def ready(self) -> bool:
        """Whether ``wait`` would return the tensor at once."""
        return self._whole

    def start(self) -> None:
        """Let the pinning begin, once the GPU has nothing to do; before, the constructor has only taken address space."""
        self.stepped()
        if self.tensor.numel() and not self._begun:
            self._thread.start()

    def stepped(self) -> None:
        """A step was launched just now."""
        self._last_step = time.monotonic()

    def expect(self) -> None:
        """Blocks will come before long: do not wait until the GPU is idle."""
        if self._urgency < Urgency.EXPECTED:
            self._urge(Urgency.EXPECTED)

    def wait(self) -> Tensor:
        """The tensor, once all of it is pinned.

        Raises:
            ConfigError: the system refused to pin so much, or the pool was closed before.
        """
        self._urge(Urgency.AWAITED)
        self.start()
        if self._begun:
            self._thread.join()
        if not self._whole:
            why, size = self._error or "the pool is closed", self.tensor.nbytes
            raise ConfigError(f"swap_space: {size} bytes of host memory could not be pinned: {why}.", "swap_space")
        return self.tensor

    def close(self) -> None:
        """Give the pinning back."""
        self._urge(Urgency.CLOSED)
        if self._begun:
            self._thread.join()
        self._unpin()

    @property
    def _begun(self) -> bool:
        return self._thread.ident is not None

    def _urge(self, urgency: Urgency) -> None:
        with self._changed:
            self._urgency = max(self._urgency, urgency)
            self._changed.notify()

    def _pin(self) -> None:
        try:
            if torch.cuda.is_initialized():
                torch.cuda.set_device(self._device)  # a thread's own
            with torch.inference_mode():  # the tensor may have been made in it, and the mode is a thread's own
                self._pin_pieces()
        except Exception as error:
            self._error = str(error) or type(error).__name__
            logger.exception("Host memory for swapping could not be pinned.")

    def _pin_pieces(self) -> None:
        cudart = torch.cuda.cudart()
        content = self.tensor.view(-1).view(torch.uint8)
        base, end = self.tensor.data_ptr(), self.tensor.data_ptr() + self.tensor.nbytes
        # whole pages are pinned, and none may be pinned twice: pieces meet at borders of pages
        borders = [base, *range((base // PAGE + 1) * PAGE + PIECE, end, PIECE), end]
        for start, stop in pairwise(borders):
            if not self._wait_for_turn():
                return
            content[start - base : stop - base].zero_()  # the pages are made here, where no lock of the driver is held
            begun = time.monotonic()
            error = cudart.cudaHostRegister(start, stop - start, 0)
            if int(error) != 0:
                self._error = str(error)
                logger.warning("Host memory for swapping could not be pinned: %s.", error)
                return
            self._pinned.append(start)
            self._pause = max(PAUSE, SHARE * (time.monotonic() - begun))
        self._whole = True

    def _wait_for_turn(self) -> bool:
        """Return when the next piece may be pinned; False when none will be any more."""
        since = time.monotonic()
        with self._changed:
            while self._urgency < Urgency.AWAITED:
                now = time.monotonic()
                until = self._last_step + QUIET
                if self._urgency is Urgency.EXPECTED:
                    until = min(until, since + self._pause)
                if now >= until:
                    break
                self._changed.wait(until - now)
            return self._urgency is not Urgency.CLOSED


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
