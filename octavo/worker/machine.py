"""A device's memory: what a machine has, and what is free now.

Owns the reading of the host's memory and its limits; it does not know models. Invariant: sizes are bytes.
"""

from dataclasses import dataclass
from pathlib import Path

import psutil

MIB, GIB = 2**20, 2**30
CGROUPS = (  # folder, limit, use, and the line of memory.stat with file pages: versions 2 and 1
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "inactive_file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


@dataclass(frozen=True, slots=True)
class Machine:
    """A device's memory in bytes: "cpu" or "cuda", all of it, what is free now, and the host's."""

    device: str
    total: int
    available: int
    host_total: int


def machine_memory() -> Machine:
    """This host's memory; the limit of a control group (a container) counts where it is smaller."""
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    for folder, limit, used, cached in CGROUPS:
        try:
            most = int((folder / limit).read_text())
            taken = int((folder / used).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # not this version of control groups, or no limit ("max")
            continue
        left = most - taken + int(stat.get(cached, 0))  # file pages in the cache make room when asked
        total, available = min(total, most), min(available, max(left, 0))
    return Machine("cpu", total, available, total)


def size_text(num_bytes: int) -> str:
    """Bytes for people."""
    return (
        f"{num_bytes / GIB:.2f} GiB"
        if num_bytes >= GIB
        else f"{num_bytes / MIB:.2f} MiB"
        if num_bytes >= MIB
        else f"{num_bytes} bytes"
    )
