"""``octavo info``: versions, devices, and which kernels are built; the first thing to paste into a bug report.

Owns the listing only. Invariant: it works on every machine on which ``octavo`` starts, and loads no model.
"""

import argparse
import os
from typing import Any

from octavo.config import ENVIRONMENT, nearest, unknown_environment
from octavo.errors import ConfigError


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("info", help="show versions, devices and kernels",
                                 description="Show versions, devices, and which kernels are built.")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what this installation is and what it runs on."""
    for title, facts in (("versions", _versions()), ("devices", _devices()), ("kernels", _kernels()),
                         ("environment", _environment())):
        print(title)
        for name, text in facts.items():
            print(f"  {name:<18} {text}")
    return 0


def _versions() -> dict[str, str]:
    from octavo.bench.report import commit, versions

    found = commit()
    return {**versions(), **({"commit": found} if found else {})}


def _devices() -> dict[str, str]:
    import torch

    from octavo.bench.report import cpu_name, gpus
    from octavo.worker.machine import machine_memory, size_text

    memory = machine_memory()
    names, driver = gpus()
    return {
        "cpu": f"{cpu_name()}, torch uses {torch.get_num_threads()}",
        "memory": f"{size_text(memory.total)}, {size_text(memory.available)} available",
        "gpu": "none found" if names is None else f"{names}, driver {driver}{_gpu_note()}",
    }


def _kernels() -> dict[str, str]:
    from octavo import ops
    from octavo.ops.library import NAMES

    if not ops.built():
        return {"cpu": "not built: the reference operators in plain torch are used (slow); make ext builds them"}
    cuda = "built" if ops.cuda_built() else "not built; make cuda builds them where the CUDA toolkit is"
    return {"cpu": f"built, {len(NAMES)} operators, instruction set {ops.isa()}", "cuda": cuda}


def _gpu_note() -> str:
    """Why a GPU that is there would not be used; nothing when it would."""
    from octavo.config import EngineConfig
    from octavo.worker.gpu import check_gpu

    try:
        check_gpu(EngineConfig(model="-", device="cuda"))
    except ConfigError as error:
        return f" (not used: {error})"
    return ""


def _environment() -> dict[str, str]:
    """The variables that Octavo reads; of any other only that nothing reads it: it may hold a secret."""
    found = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    known = set(ENVIRONMENT)
    found |= {name: f"(set, but read by nothing{nearest(name, known)})" for name in unknown_environment()}
    return found or {"-": "no OCTAVO_* variable is set"}
