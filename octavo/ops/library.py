"""The only door to the compiled kernels: loads ``_C.so`` beside this file, or says once that it is not there.

Owns the loading, the fake (meta) versions and the choice between kernel and reference; it does not know what an
operator computes. ``_C.so`` has every schema and the kernels of the CPU; ``_cuda.so``, loaded only when a GPU is to be
used, adds those of CUDA under the same names. Invariant: the choice is made once, at import, for all operators together:
either every name is a kernel or every one is a function of reference.py or fused_reference.py. An extension that is there
and cannot be used is a ConfigError.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import octavo.ops.fused_reference as fused_reference
import octavo.ops.reference as reference
from octavo.errors import ConfigError
from octavo.log import get_logger

EXTENSION = Path(__file__).with_name("_C.so")
CUDA_EXTENSION = Path(__file__).with_name("_cuda.so")
REBUILD = "Build it with `make ext` in a checkout, or install Octavo again where a C++ compiler is found."
REBUILD_CUDA = "Build them with `make cuda` in a checkout, on a machine with the CUDA toolkit (11.8 or newer)."
IN_PLACE = (
    "rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "rope", "gated_activation", "activation",
    "write_kv", "gather_kv", "copy_blocks", "swap_blocks", "paged_attention", "linear", "embedding",
    "penalties", "sample", "token_logprobs",
)
NAMES = (*IN_PLACE, "pack_linear")
PACKED = ("linear", "embedding", "pack_linear")  # operators without a CUDA kernel: a GPU multiplies plain rows
GPU_NAMES = (  # operators without a CPU kernel, all in place
    "rms_norm_fp8", "add_rms_norm_fp8", "layer_norm_fp8", "gated_activation_fp8", "activation_fp8", "lookup",
    "rotate_and_cache", "attention_plan", "skinny_linear", "skinny_gated", "norm_linear",
    "norm_gated", "tile_linear", "tile_gated", "count_tokens", "begin_step", "end_step",
)


def _load(path: Path) -> bool:
    """Load the extension if the file is there; True when its operators are registered."""
    if not path.is_file():
        get_logger("octavo.ops").warning(
            "The compiled kernels are not built (no %s): the slow reference operators are in use. %s",
            path.name, REBUILD,
        )
        return False
    load: Callable[[str], None] = torch.ops.load_library
    try:
        load(str(path))
    except (OSError, RuntimeError) as error:
        reason = error.__cause__ or error  # torch wraps the loader's own words
        raise ConfigError(f"{path} cannot be loaded with torch {torch.__version__}: {reason}. {REBUILD}") from error
    missing = [name for name in (*NAMES, *GPU_NAMES) if not hasattr(torch.ops.octavo, name)]
    if missing:
        raise ConfigError(f"{path} is from another version of Octavo: it lacks {', '.join(missing)}. {REBUILD}")
    return True


def _register_fakes() -> None:
    """Shapes without data, for tracing: the out-variants return nothing, so there is nothing to work out."""
    for name in (*IN_PLACE, *GPU_NAMES):
        torch.library.register_fake(f"octavo::{name}", lambda *args: None)
    torch.library.register_fake("octavo::pack_linear", _fake_pack_linear)


def _fake_pack_linear(weight: Tensor) -> Tensor:
    n, k = weight.shape
    return weight.new_empty(((n + reference.PANEL - 1) // reference.PANEL, k, reference.PANEL))


_BUILT = _load(EXTENSION)
if _BUILT:
    _register_fakes()


def choose(name: str) -> Callable[..., Any]:
    """The callable behind an operator's public name: the kernel where built, else the reference function.

    The kernel is returned as torch's own overload, without a Python function around it: a layer calls about ten.
    """
    if name not in NAMES and name not in GPU_NAMES:
        raise AttributeError(f"{name} is not an operator of Octavo")
    module = torch.ops.octavo if _BUILT else reference if name in NAMES else fused_reference
    chosen: Callable[..., Any] = getattr(module, name).default if _BUILT else getattr(module, name)
    return chosen


def load_cuda() -> None:
    """Add the CUDA kernels to the operators; further calls do nothing.

    Raises:
        ConfigError: they are not built, cannot be loaded, or are from another version of Octavo.
    """
    if not _BUILT or not CUDA_EXTENSION.is_file():
        absent = (CUDA_EXTENSION if _BUILT else EXTENSION).name
        raise ConfigError(f"the CUDA kernels are not built (no {absent}). {REBUILD_CUDA}", "device")
    load: Callable[[str], None] = torch.ops.load_library
    try:
        load(str(CUDA_EXTENSION))
    except (OSError, RuntimeError) as error:
        reason = error.__cause__ or error
        raise ConfigError(f"{CUDA_EXTENSION} cannot be loaded: {reason}. {REBUILD_CUDA}", "device") from error
    needed = (name for name in (*NAMES, *GPU_NAMES) if name not in PACKED)
    missing = [name for name in needed if not torch._C._dispatch_has_kernel_for_dispatch_key(f"octavo::{name}", "CUDA")]
    if missing:
        words = f"{CUDA_EXTENSION} is from another version of Octavo: it lacks {', '.join(missing)}. {REBUILD_CUDA}"
        raise ConfigError(words, "device")


def cuda_built() -> bool:
    """True when there are CUDA kernels that ``load_cuda`` can load."""
    return _BUILT and CUDA_EXTENSION.is_file()


def built() -> bool:
    """True when the compiled kernels are in use."""
    return _BUILT


def isa() -> str:
    """The instruction set that the kernels chose on this machine, such as ``avx512``; ``reference`` without kernels."""
    return str(torch.ops.octavo.isa()) if _BUILT else "reference"
