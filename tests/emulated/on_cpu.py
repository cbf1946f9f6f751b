"""A pytest plugin (-p on_cpu) with which the tests of tests/gpu run without a GPU: "cuda" is the CPU, and the functions of
octavo.ops are the CUDA kernels in the emulation.

Owns the pretence and the choice of cases: those of scripts/first_of_each.py, smaller where they are too long for one core;
LEFT_OUT says what is left out, and why. Where cases are named (-k, or a node id) all of them run. Variables: OCTAVO_EMULATED is a
library to load instead of the built one, OCTAVO_EMULATED_SEED another order of threads, blocks and copies.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import first_of_each
import kernel_library

from octavo import ops
from octavo.ops import fused_reference

HOST_MEMORY = "tells the memory of the host from that of the device"
SIZE = "too many launches or elements for one core"
# Tests that are not run, and why, beside those of graphs and of sizes that first_of_each.py never takes.
LEFT_OUT = {
    "test_swap_blocks": HOST_MEMORY,
    "test_swap_blocks_across_pieces_of_pinned_memory": HOST_MEMORY,
    "test_contracts_of_blocks": HOST_MEMORY,
    "test_draws_follow_the_exact_distribution": SIZE,
    "test_tiles_of_128_rows_and_long_prompts": SIZE,
    "test_a_few_tokens_over_a_long_context": SIZE,
    "test_bits_do_not_depend_on_the_batch_or_on_chunks": SIZE,
    "test_a_row_does_not_depend_on_the_others": SIZE,
}
# Smaller parameters of a case, or globals of its module while it runs.
SMALLER: dict[str, dict[str, Any]] = {
    "test_linear": {"shapes": ((8, 17), (24, 6), (200, 100), (1000, 257), (2056, 130)), "ROWS": (1, 9, 17, 33)},
    "test_gated": {"shapes": ((8, 17), (200, 100), (1000, 257), (2056, 130)), "ROWS": (1, 9, 17, 33)},
    "test_norm_before_the_product": {"ROWS": (3,)},
}


_library: Any = None


class CpuIsCuda(TorchFunctionMode):
    """What names the device "cuda" means the CPU; a copy to or from it stays a copy."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: _cpu(value) for name, value in (kwargs or {}).items() if name != "pin_memory"}
        name = getattr(func, "__name__", "")
        if name in {"cuda", "cpu"}:
            return args[0].clone()
        if name == "pin_memory":
            return args[0]
        return func(*map(_cpu, args), **kwargs)


class CpuGenerator(torch.Generator):
    """A generator, wherever it was asked for."""

    def __new__(cls, device: Any = "cpu") -> "CpuGenerator":
        return super().__new__(cls, "cpu")  # type: ignore[no-any-return]


def _cpu(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device("cpu")
    return "cpu" if isinstance(value, str) and value.startswith("cuda") else value


def pytest_configure(config: pytest.Config) -> None:
    """Pretend, before any test is imported."""
    library = os.environ.get("OCTAVO_EMULATED") or str(kernel_library.build())
    torch.ops.load_library(library)
    global _library
    _library = ctypes.CDLL(library)
    schemas = torch.library.Library("octavo_emulated", "DEF")
    config.add_cleanup(lambda: schemas._destroy())
    for name in {*ops.library.IN_PLACE, *ops.library.GPU_NAMES} - set(ops.library.PACKED):
        schema = getattr(torch.ops.octavo, name).default._schema
        schemas.define(str(schema).removeprefix("octavo::"))
        written = 0
        for i, argument in enumerate(schema.arguments):
            alias = argument.alias_info
            if alias is not None and alias.is_write:
                written |= 1 << i
        _library.emulated_allow_writes(name.encode(), ctypes.c_uint64(written))
        if name not in kernel_library.ABSENT:
            setattr(ops, name, getattr(torch.ops.octavo_emulated, name).default)
    torch.Generator = CpuGenerator  # type: ignore[misc]
    torch.cuda.is_available = lambda: True
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *args: None  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *args: (8, 0)
    torch.cuda.mem_get_info = lambda *args: (0, 0)
    ops.load_cuda = lambda: None
    fused_reference.begin_step, fused_reference.end_step = _begin_step, ops.end_step
    CpuIsCuda().__enter__()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is listed; of the rest keep one case of each function, unless cases were named."""
    chosen = [item for item in items if _function(item) not in LEFT_OUT]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen
    if not config.option.keyword and not any("::" in argument for argument in config.args):
        os.environ["SANITIZER"] = "emulated"
        first_of_each.REPEATS["emulated"] = ()
        first_of_each.pytest_collection_modifyitems(config, items)
        for item in items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            parameters |= {name: value for name, value in SMALLER.get(_function(item), {}).items() if name in parameters}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: Any) -> Iterator[None]:
    """Cut the module's loops down, and fail where a kernel has failed."""
    globals_of = vars(item.module)
    smaller = {name: value for name, value in SMALLER.get(_function(item), {}).items() if name in globals_of}
    before = {name: globals_of[name] for name in smaller}
    globals_of.update(smaller)
    _library.emulated_seed(int(os.environ.get("OCTAVO_EMULATED_SEED", "1")))  # alone a test meets the same order as among others
    failures = _library.emulated_failures()
    try:
        result = yield
    finally:
        globals_of.update(before)
    assert _library.emulated_failures() == failures, "a kernel failed, and the test took that for an answer"
    return result


def _begin_step(*tensors: Any) -> None:
    """In place of the reference, which tests/worker/test_staging.py holds against plain lists.

    The engine never sends two values for one entry of a block table (octavo/plan.py), which the random plans there do; the
    kernel has no order among them. So the later one is sent twice.
    """
    words = tensors[0].clone()
    sequences, tokens, _, runs = words[:4].tolist()
    at = 16 + 4 * sequences + 1 + tokens
    later: dict[tuple[int, int], int] = {}
    for row, index, length, offset in reversed(words[at : at + 4 * runs].view(runs, 4).tolist()):
        for i in range(length):
            place = at + 4 * runs + offset + i
            words[place] = later.setdefault((row, index + i), int(words[place]))
    ops.begin_step(words, *tensors[1:])


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0].rpartition("::")[2]
