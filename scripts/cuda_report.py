"""What ptxas says of the compiled kernels: their registers and memory, and which of them spill although they may not."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cuda_toolkit import Refusal, order

STRICT = "9.0a"  # what the kernels are tuned for: no local memory at all
TOLERATED = 64  # bytes of stack on other architectures, where ptxas spills a few registers outside the loops
# Kernels that may use more, as (file, part of the kernel's mangled name), each with its reason.
MAY_SPILL: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel: registers a thread, and bytes of static shared memory, stack and spills."""

    name: str
    arch: str
    registers: int
    shared: int
    stack: int
    spills: int


def read_ptxas(text: str) -> list[Kernel]:
    """The kernels in what `ptxas -v` printed."""
    kernels = []
    for part in re.split(r"Compiling entry function ", text)[1:]:
        head = re.match(r"'(\S+)' for 'sm_(\d+)(\d)(a?)'", part)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if not head or not frame or not registers:
            raise Refusal(f"ptxas printed something unexpected: {part[:200]!r}.")
        shared = re.search(r"(\d+) bytes smem", part)
        kernels.append(Kernel(
            name=head[1], arch=f"{head[2]}.{head[3]}{head[4]}", registers=int(registers[1]),
            shared=int(shared[1]) if shared else 0, stack=int(frame[1]), spills=int(frame[2]) + int(frame[3]),
        ))
    return kernels


def losses(text: str) -> list[str]:
    """What ptxas said of code that it had to make slow, such as matrix instructions one at a time; no warning, only words."""
    return re.findall(r"^.*Performance Loss.*$", text, re.MULTILINE)


def spilling(file: str, kernels: Iterable[Kernel]) -> list[Kernel]:
    """Kernels that use more local memory than they may."""
    allowed = [part for name, part in MAY_SPILL if name == file]
    return [
        k for k in kernels
        if (k.spills or k.stack if k.arch == STRICT else k.stack > TOLERATED) and not any(part in k.name for part in allowed)
    ]


def table(reports: Mapping[str, list[Kernel]]) -> str:
    """All kernels, one a line, with their names as in the source where c++filt is there."""
    rows = [(file, k) for file, kernels in reports.items() for k in kernels]
    rows.sort(key=lambda row: (row[0], row[1].name, order(row[1].arch)))
    names = [k.name for _, k in rows]
    if shutil.which("c++filt") and names:
        done = subprocess.run(["c++filt"], input="\n".join(names), check=True, capture_output=True, text=True)
        names = done.stdout.splitlines()
    lines = [f"{'arch':5} {'regs':>4} {'shared':>6} {'stack':>5} {'spill':>5}  kernel"]
    for (file, k), name in zip(rows, names, strict=True):
        short = re.sub(r"\(anonymous namespace\)::|octavo::cuda::|^void |\([^()]*\)$|__nv_|\(int\)|\(bool\)", "", name)
        lines.append(f"{k.arch:5} {k.registers:4} {k.shared:6} {k.stack:5} {k.spills:5}  {file}: {short}")
    return "\n".join(lines)
