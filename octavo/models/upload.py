"""Upload: tensors of a checkpoint to a GPU, several threads at a time, while the ones before are being stored.

Owns threads, pinned pieces and the order of delivery; it does not know names or layers. Reading a mapped file costs page faults
that one thread cannot hide, so threads copy pieces of a tensor into pinned memory of their own and on to the device.
Invariant: tensors come out in the order in which they went in, complete, and about AHEAD bytes of them at most are on the
device and not yet taken.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

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

    def move(source: Tensor, target: Tensor) -> None:
        if not hasattr(local, "buffer"):
            torch.cuda.set_device(main.device)  # a thread's own, too
            local.buffer = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
            local.stream = torch.cuda.Stream(device)
        part = local.buffer[: source.nbytes].view(source.dtype)
        part.copy_(source)
        with torch.cuda.stream(local.stream), torch.inference_mode():  # the mode is a thread's own, and targets are made in it
            target.copy_(part, non_blocking=True)
        local.stream.synchronize()

    def start(tensor: Tensor) -> tuple[Tensor, list[Future[None]]]:
        if tensor.nbytes < SMALL:
            return tensor, []
        flat = tensor.contiguous().view(-1)
        target = torch.empty(flat.shape, dtype=flat.dtype, device=device)
        main.synchronize()  # the memory may have been another tensor's, which the main stream still reads
        step = PIECE // flat.element_size()
        pieces = range(0, len(flat), step)
        return target.view(tensor.shape), [pool.submit(move, flat[i : i + step], target[i : i + step]) for i in pieces]

    with ThreadPoolExecutor(THREADS, thread_name_prefix="octavo-load") as pool:
        waiting: deque[tuple[str, Tensor, list[Future[None]]]] = deque()
        in_flight = 0
        for name, open_tensor in tensors:
            target, pieces = start(open_tensor())
            waiting.append((name, target, pieces))
            in_flight += target.nbytes
            while in_flight > AHEAD:
                in_flight -= waiting[0][1].nbytes
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())


def _finished(name: str, tensor: Tensor, pieces: list[Future[None]]) -> tuple[str, Tensor]:
    for piece in pieces:
        piece.result()
    return name, tensor
