"""Masks: what constrained rows may sample, found by threads while the forward pass runs, and its way into the logits.

Owns the threads, the packed bits of one step and their expansion on the device; it does not know what a constraint is made of.
Invariant: a constraint is called by one thread at a time, and its bits touch its own row of logits only.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.plan import Constraint, Int32

MAX_THREADS = 8
FEWEST = 2
"""Rows of one thread: handing over a job costs as much as a common mask."""

TILE = 16
"""Rows whose bits are expanded at a time: a copy of all logits would not be in the memory plan."""

HostMemory = Callable[[Sequence[int], torch.dtype], Tensor]
Job = tuple[Constraint, Int32]


class Masks:
    """The constrained rows of one step after the other.

    Args:
        vocab_size: of the logits. device: where they are. host: makes memory that is quick to copy there.
    """

    def __init__(self, vocab_size: int, device: str = "cpu", host: HostMemory | None = None) -> None:
        self._vocab, self._device, self._host = vocab_size, device, host
        self._threads: ThreadPoolExecutor | None = None
        self._places: list[int] = []
        self._bits = torch.empty((0, 0), dtype=torch.int32)
        self._futures: list[Future[list[bool]]] = []
        self._single: Tensor | None = None

    def begin(self, places: list[int], jobs: Sequence[Job]) -> None:
        """Start the jobs of the sampling rows at ``places``; what an earlier step left undone is awaited and forgotten."""
        for future in self._futures:
            future.result()
        self._places, self._futures = places, []
        if not jobs:
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), thread_name_prefix="octavo-masks")
        shape = (len(jobs), -(-self._vocab // 32))
        self._bits = torch.empty(shape, dtype=torch.int32) if self._host is None else self._host(shape, torch.int32)
        words = self._bits.numpy()
        share = max(-(-len(jobs) // MAX_THREADS), FEWEST)
        for start in range(0, len(jobs), share):
            part = slice(start, start + share)
            self._futures.append(self._threads.submit(_run, jobs[part], words[part]))

    def apply(self, logits: Tensor, spoiled: Tensor, failed: npt.NDArray[np.bool_]) -> None:
        """Wait for the jobs and mask the logits [S, vocab] of their rows in place.

        Args:
            spoiled: bool [S], where the logits are, set where a row had a NaN. failed: bool [S], set where a job failed.
        """
        if not self._places:
            return
        good = [done for future in self._futures for done in future.result()]
        failed[self._places] = ~np.array(good)
        self._futures = []
        everybody = len(self._places) == len(logits)
        places = torch.tensor(self._places).to(self._device, non_blocking=True)
        bits = self._bits.to(self._device, non_blocking=True).view(torch.uint8)
        for start in range(0, len(places), TILE):
            part = slice(start, start + TILE)
            tile = logits[part] if everybody else logits.index_select(0, places[part])
            spoiled.index_copy_(0, places[part], tile.amax(1).isnan())
            tile.masked_fill_(self._barred(bits[part]), -torch.inf)
            if not everybody:
                logits.index_copy_(0, places[part], tile)
        self._places = []

    def _barred(self, bits: Tensor) -> Tensor:
        """bool [rows, vocab], where packed bits, uint8 [rows, bytes], are not set."""
        if self._device == "cpu":
            return torch.from_numpy(np.unpackbits(bits.numpy(), axis=1, count=self._vocab, bitorder="little") == 0)
        if self._single is None:
            self._single = 1 << torch.arange(8, dtype=torch.uint8, device=self._device)
        return (bits.unsqueeze(2) & self._single).flatten(1)[:, : self._vocab] == 0


def words_of(ids: Sequence[int], num_words: int) -> Int32:
    """Packed bits of some ids."""
    bits = np.zeros(num_words * 32, np.bool_)
    bits[list(ids)] = True
    return np.packbits(bits, bitorder="little").view(np.int32)


def restrict(words: Int32, allowed: Int32 | None, barred: Sequence[int]) -> None:
    """Take from packed bits what is not allowed, or is barred, unless nothing would be left."""
    if allowed is None and not barred:
        return
    kept = words.copy() if allowed is None else words & allowed
    if barred:
        kept &= ~words_of(barred, len(words))
    if kept.any():
        words[:] = kept


def _run(jobs: Sequence[Job], words: Int32) -> list[bool]:
    return [constraint(output, line) for (constraint, output), line in zip(jobs, words, strict=True)]
