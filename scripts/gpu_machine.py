"""What gpu_check.py asks the machine: what it lacks, and how many processes may use its GPU at once.

Owns these questions; it runs no part. Invariant: the process that asks never loads torch itself, so that nothing of it stays on
the GPU.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence

import build_ext
from cuda_toolkit import Refusal, find_nvcc

EACH = 4 << 10  # MiB of the GPU for one of the processes that run side by side: the float64 references of attention are the most
PACKAGES = ("torch", "numpy", "pytest")


def missing(parts: Sequence[str]) -> str:
    """What these parts need and this machine lacks, in one sentence; "" for nothing."""
    packages = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    lacks = [f"{sys.executable} has no {' and no '.join(packages)}"] if packages else []
    if "build" in parts:
        compiler = os.environ.get("CUDAHOSTCXX") or os.environ.get("CXX") or "g++"
        lacks += [] if shutil.which(compiler) else [f"there is no C++ compiler ({compiler} was not found)"]
        lacks += [] if build_ext.tool("cmake") else ["cmake was not found"]
        try:
            find_nvcc(os.environ)
        except Refusal as refusal:
            lacks.append(str(refusal).rstrip("."))
    if "torch" not in packages and (why := no_gpu()):
        lacks.append(why)
    return f"this machine cannot check GPU kernels: {'; '.join(lacks)}." if lacks else ""


def no_gpu() -> str:
    """Why torch sees no GPU; "" when it does."""
    words = "import torch; print(torch.__version__, torch.cuda.is_available())"
    code, said = ask(sys.executable, "-c", words)
    if code:
        return f"torch cannot be loaded ({said[-1]})"
    if said[-1].endswith("True"):
        return ""
    code, listed = ask("nvidia-smi", "-L")
    return f"torch {said[-1].split()[0]} sees no GPU (nvidia-smi: {listed[0]})"


def ask(*command: str) -> tuple[int, list[str]]:
    """Exit code and lines of a program: what it printed, or else why it failed; at least one line."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        return 127, ["not found"]
    except (OSError, subprocess.SubprocessError) as error:
        return 1, [str(error)]
    said = done.stderr if done.returncode and done.stderr else done.stdout
    return done.returncode, said.strip().splitlines() or ["no answer"]


def at_once() -> int:
    """How many processes may use the GPU side by side: by this machine's processors, and the memory that is free on the GPU.

    Two at least: the soak, which lasts until the time is over, and one that it runs beside.
    """
    processors = len(os.sched_getaffinity(0)) * 5 // 8
    try:
        query = ("nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits")
        free = int(subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        free = EACH * processors
    return max(2, min(processors, free // EACH))
