"""A GPU that cannot be used says why before anything is loaded; one that can is what torch says of it."""

import psutil
import pytest
import torch

from octavo import ops
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.worker.gpu import Gpu, check_gpu, usable
from octavo.worker.machine import GIB, Machine

CONFIG = EngineConfig(model="m", device="cuda")


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a good GPU; gpu(name=value, ...) changes what is said of it."""
    zeros = torch.zeros

    def change(*, cuda="12.8", available=True, capability=(9, 0), load=lambda: None, kernel=lambda *tensors: None):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * GIB, 4 * GIB))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
        monkeypatch.setattr(torch, "zeros", lambda *shape, device, **rest: zeros(*shape, **rest))
        monkeypatch.setattr(ops, "load_cuda", load)
        monkeypatch.setattr(ops, "count_tokens", kernel)

    change()
    return change


def raises(error):
    def function(*tensors):
        raise error

    return function


def test_a_good_gpu_is_used_and_its_kernels_are_tried(gpu):
    ran = []
    gpu(load=lambda: ran.append("load"), kernel=lambda *tensors: ran.append([t.shape for t in tensors]))
    assert Gpu(CONFIG).memory() == Machine("cuda", 4 * GIB, 3 * GIB, psutil.virtual_memory().total)
    assert ran == ["load", [(1, 1), (1,), (1,)]]


OUT = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
IMAGE = "CUDA error: no kernel image is available for execution on the device"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cuda": None}, "needs a torch with CUDA; torch .* has none"),
        ({"available": False}, "no NVIDIA GPU is found, or its driver is missing or too old"),
        ({"capability": (6, 1)}, r"A GPU has compute capability 6\.1; 7\.0 is the oldest supported"),
        ({"load": raises(ConfigError("the CUDA kernels are not built.", "device"))}, "kernels are not built"),
        ({"kernel": raises(torch.OutOfMemoryError("CUDA out of memory."))}, "A GPU has no free memory at all"),
        ({"kernel": raises(RuntimeError(OUT))}, "A GPU has no free memory at all"),  # when there is not enough for a context
        ({"kernel": raises(RuntimeError(IMAGE)), "capability": (12, 0)},
         r"not built for A GPU \(compute capability 12\.0\).*`make cuda`.*OCTAVO_CUDA_ARCHS=12\.0\."),
    ],
    ids=["cpu torch", "no gpu", "old", "not built", "full", "full before the context", "other architecture"],
)  # fmt: skip
def test_a_gpu_that_cannot_be_used(gpu, changes, words):
    gpu(**changes)
    with pytest.raises(ConfigError, match=words) as caught:
        check_gpu(CONFIG)
    assert caught.value.param == "device"
    with pytest.raises(ConfigError, match=words):
        Gpu(CONFIG)


def test_what_nobody_foresaw_is_not_dressed_up(gpu):
    gpu(kernel=raises(RuntimeError("CUDA error: an illegal memory access was encountered")))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        check_gpu(CONFIG)


def test_an_option_that_a_gpu_does_not_know_is_refused_before_anything_else(gpu):
    gpu(available=False)
    with pytest.raises(ConfigError, match="batch_invariant is not supported on a GPU yet") as caught:
        check_gpu(CONFIG.replace(batch_invariant=True))
    assert caught.value.param == "batch_invariant"



@pytest.mark.parametrize(
    ("there", "built", "wanted", "lines"),
    [(False, False, False, 0), (False, True, False, 0), (True, True, True, 0), (True, False, False, 1)],
)
def test_auto_takes_a_gpu_that_can_be_used_and_says_once_why_not(monkeypatch, caplog, there, built, wanted, lines):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(ops, "cuda_built", lambda: built)
    usable.cache_clear()
    with caplog.at_level("WARNING"):
        assert [usable(), usable()] == [wanted, wanted]
    assert len([r for r in caplog.records if "CUDA kernels are not built" in r.message]) == lines
    usable.cache_clear()
