"""Upload: tensors of a checkpoint to a GPU, several threads at a time, while the ones before are being stored.

Owns threads, pinned pieces and the order of delivery; it does not know names or layers. Threads bring pieces of a tensor into
pinned memory of their own and on to the device. What lies in a file as it does in memory is read piece by piece, not mapped: the
faults of a mapping cost more than the copy.
Invariant: tensors come out in the order in which they went in, complete, and about AHEAD bytes of them at most are on the
device and not yet taken.
"""

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from octavo.errors import ModelError
from octavo.models.weights import Stored

THREADS = 8
PIECE = 16 * 2**20  # bytes
AHEAD = 1 << 30
SMALL = 1 << 16  # a tensor of fewer bytes is copied where it is needed


def upload(tensors: Iterable[tuple[str, Callable[[], Tensor]]], device: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors on ``device``, each by its name, in their order; small ones stay on the host.

    Args:
        tensors: names, and functions that open a tensor (they may raise; so does the iteration then).
    """
    local = threading.local()
    main = torch.cuda.current_stream()

    def move(fill: Callable[[Tensor], object], target: Tensor) -> None:
        if not hasattr(local, "buffer"):
            torch.cuda.set_device(main.device)  # a thread's own, too
            local.buffer = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
            local.stream = torch.cuda.Stream(device)
        part = local.buffer[: target.nbytes].view(target.dtype)
        fill(part)
        with torch.cuda.stream(local.stream), torch.inference_mode():  # the mode is a thread's own, and targets are made in it
            target.copy_(part, non_blocking=True)
        local.stream.synchronize()

    def start(open_tensor: Callable[[], Tensor]) -> tuple[Tensor, list[Future[None]]]:
        fill: Callable[[int, Tensor], object]  # puts the elements from a number on into pinned memory
        if isinstance(open_tensor, Stored) and open_tensor.nbytes >= SMALL:
            shape, dtype = open_tensor.shape, open_tensor.dtype
            fill = partial(_read, open_tensor, files.open(open_tensor.path))
        else:
            tensor = open_tensor()
            if tensor.nbytes < SMALL:
                return tensor, []
            shape, dtype = tensor.shape, tensor.dtype
            fill = partial(_copy, tensor.contiguous().view(-1))
        target = torch.empty(math.prod(shape), dtype=dtype, device=device)
        main.synchronize()  # the memory may have been another tensor's, which the main stream still reads
        step = PIECE // dtype.itemsize
        pieces = range(0, len(target), step)
        return target.view(shape), [pool.submit(move, partial(fill, i), target[i : i + step]) for i in pieces]

    with _Files() as files, ThreadPoolExecutor(THREADS, thread_name_prefix="octavo-load") as pool:
        waiting: deque[tuple[str, Tensor, list[Future[None]]]] = deque()
        in_flight = 0
        for name, open_tensor in tensors:
            target, pieces = start(open_tensor)
            waiting.append((name, target, pieces))
            in_flight += target.nbytes
            while in_flight > AHEAD:
                in_flight -= waiting[0][1].nbytes
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())


class _Files:
    """Descriptors of files, one each, until the end."""

    def __init__(self) -> None:
        self._open: dict[Path, int] = {}

    def __enter__(self) -> "_Files":
        return self

    def __exit__(self, *error: object) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def open(self, path: Path) -> int:
        if path not in self._open:
            try:
                self._open[path] = os.open(path, os.O_RDONLY)
            except OSError as error:
                raise ModelError(f"{path} cannot be opened: {error}.", "model") from error
        return self._open[path]


def _read(stored: Stored, descriptor: int, first: int, target: Tensor) -> None:
    """Fill ``target`` with a tensor's elements from number ``first`` on."""
    rest, at = target.view(torch.uint8).numpy().data, stored.offset + first * target.itemsize
    while rest:
        try:
            count = os.preadv(descriptor, [rest], at)
        except OSError as error:
            raise ModelError(f"{stored.path} cannot be read: {error}.", "model") from error
        if not count:
            raise ModelError(f"{stored.path} has become shorter while it was read.", "model")
        rest, at = rest[count:], at + count


def _copy(source: Tensor, first: int, target: Tensor) -> None:
    target.copy_(source[first : first + len(target)])


def _finished(name: str, tensor: Tensor, pieces: list[Future[None]]) -> tuple[str, Tensor]:
    for piece in pieces:
        piece.result()
    return name, tensor
