"""The results object: one JSON line that says what was measured, where, and with which command.

Owns the form (design: machine, gpu, driver, versions, commit, date, command, figures) and how the machine is named; it
does not know how anything was measured. Invariant: a figure never travels without the machine it was taken on.
"""

import datetime
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from octavo import __version__

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "jinja2", "msgspec", "huggingface_hub")
ROOT = Path(__file__).resolve().parents[2]


def document(
    model: str, workload: str, figures: Mapping[str, tuple[float, str]], words: Sequence[str]
) -> dict[str, Any]:
    """The results object of one run.

    Args:
        model: as the user typed it; its last part goes into the figures' names. workload: name of the workload.
        figures: name -> (value, unit). words: the command line after ``octavo``.
    """
    prefix = f"{Path(model).name.lower()}/{workload}/"
    return {
        **machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["octavo", *words]),
        "figures": {prefix + name: {"value": rounded(value), "unit": unit} for name, (value, unit) in figures.items()},
    }


def json_line(results: Mapping[str, Any]) -> str:
    """The object on one line, for the last line of the output."""
    return json.dumps(results, ensure_ascii=False, allow_nan=False)


def rounded(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def machine() -> dict[str, Any]:
    """machine, gpu, driver, versions and commit of this process."""
    gpu, driver = gpus()
    return {"machine": cpu_name(), "gpu": gpu, "driver": driver, "versions": versions(), "commit": commit()}


def versions() -> dict[str, str]:
    """Versions of Octavo, Python and the packages it stands on; a package that is not installed is left out."""
    found = {"octavo": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The processor and how many of its threads this process may use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{name}, {len(os.sched_getaffinity(0))} threads"


def gpus() -> tuple[str | None, str | None]:
    """Names of the NVIDIA GPUs and the driver's version; (None, None) without them."""
    lines = _lines("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if not lines:
        return None, None
    names = [line.rsplit(",", 1)[0].strip() for line in lines]
    return ", ".join(names), lines[0].rsplit(",", 1)[-1].strip()


def commit() -> str | None:
    """The commit of the checkout that this package lies in, ``-dirty`` when changed; None for an installed package.

    BENCH_COMMIT overrides it: whoever runs a copy of a checkout knows it better (scripts/tree_commit.py).
    """
    if stated := os.environ.get("BENCH_COMMIT"):
        return stated
    if not (ROOT / ".git").exists():
        return None
    found = _lines("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12")
    return found[0] if found else None


def _lines(*command: str) -> list[str]:
    """Lines that a program printed; none when it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.strip().splitlines()
