"""Builds the C++ kernels in place: octavo/ops/_C.so, for a checkout (`make ext`).

Runs CMake on the repository with the interpreter that runs this script, in build/ext; a second run compiles only what
changed. What the tools print goes to build/ext.log and is shown when one of them fails. Without a C++ compiler or
without torch it builds nothing, says why, and succeeds: the package then uses its reference operators.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOG = ROOT / "build" / "ext.log"
LIBRARY = ROOT / "octavo" / "ops" / "_C.so"


def tool(name: str) -> str | None:
    """The path of a build tool: beside this interpreter (pip installs cmake and ninja there), else on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def main() -> int:
    cmake = tool("cmake")
    if cmake is None:
        print("octavo: cmake was not found (pip install cmake ninja), so no kernels are built.")
        return 0
    build = ROOT / "build" / "ext"
    configure = [cmake, "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}", "-DOCTAVO_CUDA=OFF"]
    ninja = tool("ninja")
    if ninja is not None and not (build / "CMakeCache.txt").exists():
        configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    if not LIBRARY.exists():
        print("Building the C++ kernels; this may take minutes, once.", flush=True)
    LOG.parent.mkdir(exist_ok=True)
    with LOG.open("w", encoding="utf-8") as log:
        for command in (
            configure,
            [cmake, "--build", str(build), "--parallel", *sys.argv[1:]],
            [cmake, "--install", str(build), "--prefix", str(ROOT)],
        ):
            code = subprocess.run(command, cwd=ROOT, check=False, stdout=log, stderr=subprocess.STDOUT).returncode
            if code:
                log.flush()
                sys.stderr.write(LOG.read_text(encoding="utf-8", errors="replace"))
                print(f"octavo: {' '.join(command[:2])} ended with {code}; the output above is {LOG}.", file=sys.stderr)
                return code
    for line in LOG.read_text(encoding="utf-8", errors="replace").splitlines():
        if "octavo: " in line:  # CMakeLists.txt says why it builds nothing
            print(line.removeprefix("-- "))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
