"""Uploaded tensors come out complete and in their order, a bounded number of bytes ahead; what goes wrong comes out too.

Streams and pinned memory are plain stand-ins: a copy is done when it is asked for, in the thread that asks.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from octavo.errors import ModelError
from octavo.models import registry, weights
from octavo.models import upload as module
from octavo.models.source import ModelSource
from octavo.models.upload import upload

PIECE, SMALL = 1024, 64
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8,
         "rms_norm_eps": 1e-5, "hidden_act": "silu"}


class PlainStream:
    """Belongs to the thread that made it; counts how often it was waited for."""

    def __init__(self, device: str = "") -> None:
        self.device = device
        self.thread, self.waits = threading.get_ident(), 0

    def synchronize(self) -> None:
        assert self.thread == threading.get_ident()
        self.waits += 1


class PlainTorch:
    """torch, with streams and pinned memory of its own."""

    def __init__(self) -> None:
        self.main, self.streams, self.pinned = PlainStream(), list[PlainStream](), list[int]()
        self.current = threading.local()
        self.cuda = SimpleNamespace(
            current_stream=lambda: self.main, Stream=self.make_stream, stream=self.use, set_device=lambda device: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def make_stream(self, device: str) -> PlainStream:
        self.streams.append(PlainStream(device))
        return self.streams[-1]

    @contextmanager
    def use(self, stream: PlainStream) -> Iterator[None]:
        assert stream.thread == threading.get_ident(), "a stream of another thread"
        yield

    def empty(self, *shape: Any, pin_memory: bool = False, **rest: Any) -> Tensor:
        made = torch.empty(*shape, **rest)
        if pin_memory:
            self.pinned.append(made.nbytes)
        return made.fill_(77)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlainTorch]:
    plain = PlainTorch()
    monkeypatch.setattr(module, "torch", plain)
    monkeypatch.setattr(module, "PIECE", PIECE)
    monkeypatch.setattr(module, "SMALL", SMALL)
    yield plain
    assert not [t for t in threading.enumerate() if t.name.startswith("octavo-load")], "threads are left over"


def openers(tensors: dict[str, Tensor], opened: list[str]) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    def read(name: str) -> Tensor:
        opened.append(name)
        return tensors[name]

    for name in tensors:
        yield name, lambda name=name: read(name)


def checkpoint() -> dict[str, Tensor]:
    """Tensors of no bytes, of few, of one piece, of several, of many; of all types; not contiguous ones too."""
    generator = torch.Generator().manual_seed(1)
    sizes = (0, 1, SMALL // 4 - 1, SMALL // 4, PIECE // 4, PIECE // 4 + 1, 3000, 20_000)
    found = {f"float{size}": torch.randn(size, generator=generator) for size in sizes}
    found["turned"] = torch.randn(60, 50, generator=generator).t()
    found["cut"] = torch.randn(40, 90, generator=generator)[3:, 10:80:2]
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        found[str(dtype)] = torch.randn(7, 333, generator=generator).to(dtype)
    return found


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("ahead", [1, 5000, 1 << 30])
def test_tensors_come_out_complete_and_in_order(
    plain: PlainTorch, monkeypatch: pytest.MonkeyPatch, ahead: int, inference: bool
) -> None:
    monkeypatch.setattr(module, "AHEAD", ahead)
    tensors, opened = checkpoint(), list[str]()
    with torch.inference_mode(inference):
        found = list(upload(openers(tensors, opened), "cpu"))
    assert [name for name, _ in found] == opened == list(tensors)
    for name, tensor in found:
        assert tensor.dtype == tensors[name].dtype and torch.equal(tensor, tensors[name]), name
        assert (tensor is tensors[name]) == (tensor.nbytes < SMALL)  # small ones are copied where they are needed
    assert set(plain.pinned) == {PIECE} and len(plain.pinned) == len(plain.streams) <= module.THREADS
    pieces = [-(-t.numel() // (PIECE // t.element_size())) for t in tensors.values() if t.nbytes >= SMALL]
    assert sum(stream.waits for stream in plain.streams) == sum(pieces)  # a buffer is used again when its copy is done


def test_the_main_stream_is_done_with_memory_before_it_is_filled_again(plain: PlainTorch) -> None:
    """What a tensor's memory held may still be read by a kernel that stores it."""
    made = plain.empty

    def empty(*shape: Any, **rest: Any) -> Tensor:
        if not rest.get("pin_memory"):
            waits.append(plain.main.waits)
        return made(*shape, **rest)

    waits: list[int] = []
    plain.empty = empty  # type: ignore[method-assign]
    tensors = checkpoint()
    found = upload(openers(tensors, []), "cpu")
    assert len(list(found)) == len(tensors)
    assert waits == list(range(len(waits))) and plain.main.waits == len(waits) > 5


def test_no_more_than_so_many_bytes_are_ahead(plain: PlainTorch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AHEAD", 10_000)
    tensors, opened = {str(i): torch.full((1000,), float(i)) for i in range(12)}, list[str]()
    for taken, (name, tensor) in enumerate(upload(openers(tensors, opened), "cpu")):
        assert name == str(taken) and tensor[0] == taken
        assert len(opened) - taken <= 3  # the one that is handed out, and two of 4,000 bytes behind it


def test_what_an_opener_raises_is_raised(plain: PlainTorch) -> None:
    def fails() -> Tensor:
        raise ValueError("the file is cut off")

    tensors = [("a", lambda: torch.ones(5000)), ("b", fails), ("c", lambda: torch.ones(5000))]
    with pytest.raises(ValueError, match="the file is cut off"):
        list(upload(tensors, "cpu"))


def test_what_a_copy_raises_is_raised(plain: PlainTorch) -> None:
    def fails(device: str) -> PlainStream:
        raise RuntimeError("no stream is left")

    plain.cuda.Stream = fails
    with pytest.raises(RuntimeError, match="no stream is left"):
        list(upload([("a", lambda: torch.ones(5000))], "cpu"))


def test_whoever_stops_listening_leaves_no_threads(plain: PlainTorch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AHEAD", 1)
    opened: list[str] = []
    found = upload(openers(checkpoint(), opened), "cpu")
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert len(opened) < len(checkpoint())


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("ahead", [1, 1 << 30])
def test_safetensors_are_read_piece_by_piece_and_never_mapped(
    plain: PlainTorch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ahead: int
) -> None:
    monkeypatch.setattr(module, "AHEAD", ahead)
    tensors = {name: tensor.contiguous() for name, tensor in checkpoint().items()}
    names = list(tensors)
    for i in range(2):
        save_file({name: tensors[name] for name in names[i::2]}, tmp_path / f"{i}.safetensors", metadata={"format": "pt"})
    spec = registry.spec({"architectures": ["LlamaForCausalLM"], **SIZES})
    opened = weights.open_checkpoint(ModelSource("folder", tmp_path, {}), spec, torch.bfloat16)
    assert all(isinstance(one, weights.Stored) for one in opened.values()) and opened.keys() == tensors.keys()
    mapped: list[str] = []
    watched = {name: replace(one, open=lambda name=name, one=one: mapped.append(name) or one())  # type: ignore[misc]
               for name, one in opened.items()}
    before = descriptors()
    found = dict(upload(watched.items(), "cpu"))
    assert list(found) == list(opened) and descriptors() == before
    for name, tensor in found.items():
        assert tensor.dtype == tensors[name].dtype and tensor.shape == tensors[name].shape
        assert torch.equal(tensor, tensors[name]), name
    assert sorted(mapped) == sorted(name for name, tensor in tensors.items() if tensor.nbytes < SMALL)


def test_a_file_that_becomes_shorter_or_goes_is_named(plain: PlainTorch, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(9000)}, path)
    stored = weights.Stored(path, 8, (9000,), torch.float32, lambda: torch.ones(9000))
    before = descriptors()
    os.truncate(path, 20_000)
    with pytest.raises(ModelError, match=rf"{path} has become shorter while it was read"):
        list(upload([("a", stored)], "cpu"))
    path.unlink()
    with pytest.raises(ModelError, match=rf"{path} cannot be opened"):
        list(upload([("a", stored)], "cpu"))
    assert descriptors() == before


def test_nothing_is_nothing(plain: PlainTorch) -> None:
    assert list(upload([], "cpu")) == [] and plain.pinned == []
