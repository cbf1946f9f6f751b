"""Checks that csrc/cuda compiles for compute capability 7.0 with a toolkit that no longer makes code for it (CUDA 13).

nvcc compiles each file to PTX of 7.5 while the source is told that it is 7.0, so that every guard on __CUDA_ARCH__ goes the
way of 7.0; ptxas of CUDA 12.9, the last that knows 7.0, then assembles it as PTX of 7.0 and refuses what that lacks. What is
made is thrown away: a build that runs on such a GPU needs CUDA 12.9 or older, and there OCTAVO_CUDA_ARCHS="7.0" is enough.

    python scripts/cuda_sm70.py     ptxas comes from PyPI (nvidia-cuda-nvcc-cu12), once
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from build_cuda import OBJECTS, ROOT, digest, locked, noiseless, stage
from cuda_toolkit import Refusal, Toolkit, find_nvcc, probe

PACKAGE = "nvidia-cuda-nvcc-cu12==12.9.86"
PRETEND = "#ifdef __CUDA_ARCH__\n#undef __CUDA_ARCH__\n#define __CUDA_ARCH__ 700\n#endif\n"
FLAGS = (
    "-std=c++17", "-O3", "-DNDEBUG", "--expt-relaxed-constexpr", "-Werror", "all-warnings", "-Wno-deprecated-gpu-targets",
    "-gencode", "arch=compute_75,code=compute_75", "-include", "pretend.h", "-Icsrc", "-Icsrc/cuda",
)
TARGET = (re.compile(r"^\.target sm_75", re.MULTILINE), ".target sm_70")
VERSION = (re.compile(r"^\.version .*", re.MULTILINE), ".version 8.8")  # of CUDA 12.9


def fetch(folder: Path) -> Path:
    """ptxas of CUDA 12.9, installed into folder unless it is there."""
    ptxas = folder / "nvidia" / "cuda_nvcc" / "bin" / "ptxas"
    if ptxas.is_file():
        return ptxas
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-q", "--no-deps"]
    if subprocess.run([*pip, "--target", str(folder), PACKAGE], check=False).returncode:
        raise Refusal(f"{PACKAGE} could not be installed into {folder}.")
    ptxas.chmod(0o755)
    return ptxas


def refuses(toolkit: Toolkit, ptxas: Path, name: Path, source: Path) -> str:
    """Compile one file as for 7.0; the compiler's words where that fails, else nothing. What has passed is remembered."""
    passed = source.parent / f"{name.stem}-{digest(name, source, toolkit.version, PACKAGE, PRETEND, *FLAGS)}.sm70"
    if passed.is_file():
        os.utime(passed)
        return ""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        commands: list[list[str | Path]] = [
            [toolkit.nvcc, *FLAGS, "-ptx", name, "-o", ptx], [ptxas, "-arch=sm_70", ptx, "-o", f"{ptx}.cubin"],
        ]
        for command in commands:
            done = subprocess.run(command, cwd=source, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                return f"--- {name}\n{noiseless(done.stdout)}"
            if command[0] == toolkit.nvcc:
                text = ptx.read_text(encoding="utf-8")
                ptx.write_text(VERSION[0].sub(VERSION[1], TARGET[0].sub(TARGET[1], text)), encoding="utf-8")
    passed.touch()
    return ""


def main() -> int:
    """Check all files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--objects", type=Path, default=OBJECTS, help="folder for ptxas and for what has passed")
    folder = parser.parse_args().objects.absolute()
    started = time.monotonic()
    try:
        toolkit = probe(find_nvcc(os.environ))
        if "7.0" in toolkit.known:
            print("octavo: this toolkit compiles for 7.0 itself; nothing to check here.")
            return 0
        ptxas = fetch(folder / "ptxas12")
    except Refusal as refusal:
        print(f"octavo: {refusal}", file=sys.stderr)
        return 1
    source = folder / "source-sm70"
    source.mkdir(parents=True, exist_ok=True)
    with locked(folder), ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        (source / "pretend.h").write_text(PRETEND, encoding="utf-8")
        wanted = [name for name in stage(ROOT, source) if name.suffix == ".cu"]
        words = [w for w in pool.map(lambda name: refuses(toolkit, ptxas, name, source), wanted) if w]
    for word in words:
        print(word, file=sys.stderr)
    print(f"octavo: {len(wanted) - len(words)} of {len(wanted)} files compile for 7.0, {time.monotonic() - started:.0f} s.")
    return 1 if words else 0


if __name__ == "__main__":
    raise SystemExit(main())
