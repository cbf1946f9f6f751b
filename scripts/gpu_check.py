"""Builds, tests, sanitises and measures the CUDA kernels on a GPU machine: `make gpu-check PYTHON=python3`, under nine minutes.

Needs the CUDA toolkit, a C++ compiler, cmake, and a Python with torch 2.11, numpy and pytest; no network, nothing is
installed. The part "server" is left out, with a note, where the server's packages are not there. Owns the order of the
parts and their time limits, and the results file benchmarks/results/<date>-<gpu>.json; it does not know what a test or a
benchmark does. Invariant: a part that fails or runs out of time hides no other, is named at the end, and makes the exit
code 1.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "gpu-check"
EXTENSIONS = (ROOT / "octavo" / "ops" / "_C.so", ROOT / "octavo" / "ops" / "_cuda.so")
PARTS = ("build", "tests", "kernels", "engine", "server", "sanitizer")
# What the server imports beside the engine: a bare GPU machine may lack it.
SERVER_PACKAGES = ("starlette", "uvicorn", "uvloop", "httptools", "zmq", "msgspec", "prometheus_client", "llguidance", "psutil")
LIMIT = 530  # seconds for everything
QUICK = ("--quick",)  # of the engine's benchmark, and of the server's
FULL = ("--budget", "75", "--iterations", "2", "--startup")
SHOWN = 40  # lines of a failed step's output
REFERENCES = ("floor", "ceiling", "peer")
ENGINE = "from support import"  # in a test file: it runs engines, which share out the GPU's memory; nothing runs beside it


@dataclass(frozen=True)
class Step:
    """One command of a part: its name for people, the limit in seconds, and what it adds to the environment."""

    part: str
    name: str
    limit: int
    command: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    beside: bool = False  # runs side by side with its neighbours of the same part that do; what is timed runs alone
    figures: bool = False  # its last line is a JSON object of figures


def steps(
    parts: Sequence[str], engine_args: Sequence[str] = QUICK, root: Path = ROOT, python: str = sys.executable,
    server_args: Sequence[str] = QUICK,
) -> list[Step]:
    """The commands of these parts, in order. engine_args, server_args: what the benchmarks of these are called with."""
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    # Without torch's cache of memory every tensor is an allocation of its own, so that memcheck sees where it ends; a graph
    # cannot be captured then. Only our kernels are instrumented.
    plain = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    few = (*pytest, "-p", "first_of_each", "-k", "not graph and not capture and not many and not long", "-o", "timeout=0")
    sanitizer = ("compute-sanitizer", "--error-exitcode=1", "--print-limit=5", "--kernel-name", "kns=octavo")
    paths = sorted((root / "tests" / "gpu").glob("test_*.py"))
    files = {f"tests/gpu/{path.name}": path.read_text(encoding="utf-8") for path in paths}
    kernels = [file for file, text in files.items() if ENGINE not in text]
    engine = tuple(file for file in files if file not in kernels)
    benchmarks = [f"benchmarks/{path.name}" for path in sorted((root / "benchmarks").glob("kernels_*.py"))]
    every = [
        Step("build", "C++ kernels", 150, (python, "scripts/build_ext.py")),
        Step("build", "CUDA kernels", 240, (python, "scripts/build_cuda.py")),
        *(Step("tests", Path(file).stem, 120, (*pytest, file), beside=True) for file in kernels),
        *([Step("tests", "engine", 150, (*pytest, *engine))] if engine else []),
        *(Step("kernels", Path(file).stem, 60, (python, file), figures=True) for file in benchmarks),
    ]
    if (root / "benchmarks" / "engine_gpu.py").is_file():
        every.append(Step("engine", "engine_gpu", 300, (python, "benchmarks/engine_gpu.py", *engine_args), figures=True))
    if (root / "benchmarks" / "server_gpu.py").is_file():
        every.append(Step("server", "server_gpu", 160, (python, "benchmarks/server_gpu.py", *server_args), figures=True))
    every += [
        Step("sanitizer", f"{tool} {Path(file).stem}", 110, (*sanitizer, f"--tool={tool}", *few, file), plain, beside=True)
        for tool in ("memcheck", "racecheck") for file in kernels
    ]
    return [step for step in every if step.part in parts]


def default_parts(packages: Sequence[str] = SERVER_PACKAGES) -> tuple[list[str], list[str]]:
    """The parts that are run when none are named, and a note for one that this Python has not the packages for."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if not missing:
        return list(PARTS), []
    return [part for part in PARTS if part != "server"], [f"the part server was left out: there is no {', no '.join(missing)}"]


def grouped(chosen: Sequence[Step]) -> list[list[Step]]:
    """Steps that run side by side, together; every other one alone."""
    groups: list[list[Step]] = []
    for step in chosen:
        if groups and step.beside and groups[-1][-1].beside and groups[-1][-1].part == step.part:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


class Check:
    """Runs steps, keeps their logs, and collects figures and failures."""

    def __init__(self, limit: float) -> None:
        self.deadline = time.monotonic() + limit
        self.figures: dict[str, dict[str, Any]] = {}
        self.failed: list[str] = []
        self.notes: list[str] = []

    def run(self, group: Sequence[Step]) -> None:
        """Run these side by side."""
        started = time.monotonic()
        if started > self.deadline - 1:
            self.failed += [f"{step.part}/{step.name}" for step in group]
            print(f"[    - s] {group[0].part}: no time left for {', '.join(step.name for step in group)}", flush=True)
            return
        running = [(step, self.start(step)) for step in group]
        for step, process in running:
            limit = min(started + step.limit, self.deadline)
            code: int | None = 127
            if process is not None:
                try:
                    code = process.wait(max(1.0, limit - time.monotonic()))
                except subprocess.TimeoutExpired:
                    code = None
                    stop(process)
            self.finish(step, code, time.monotonic() - started)

    def start(self, step: Step) -> subprocess.Popen[bytes] | None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environ = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **step.environ}
        with log(step).open("wb") as out:
            try:
                return subprocess.Popen(
                    step.command, cwd=ROOT, env=environ, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                )
            except OSError as error:
                out.write(str(error).encode())
                return None

    def finish(self, step: Step, code: int | None, seconds: float) -> None:
        """Say how a step ended, show the end of its output when it failed, and take its figures."""
        lines = log(step).read_text(encoding="utf-8", errors="replace").splitlines()
        why = "" if code == 0 else "out of time" if code is None else f"exit code {code}"
        if step.figures and not why:
            try:
                found = json.loads(lines[-1])
                figures = found.get("figures", found)
                assert all("value" in figure and "unit" in figure for figure in figures.values())
                self.figures.update(figures)
                self.notes += found.get("notes", []) if "figures" in found else []
            except (ValueError, IndexError, AttributeError, TypeError, AssertionError):
                why = "its last line is no JSON object of figures"
        if why:
            self.failed.append(f"{step.part}/{step.name}")
            found = [line for line in lines if line.startswith("=========")] if step.part == "sanitizer" else []
            print("\n".join(f"    {line[:220]}" for line in [*found[: SHOWN // 2], *lines[-SHOWN // 2 :]]))
        words = [line for line in lines if not line.startswith("=========")]
        last = f" ({words[-1][:100]})" if words and not why and not step.figures else ""
        print(f"[{seconds:5.0f} s] {step.part}: {step.name}: {why or 'ok'}{last}", flush=True)


def log(step: Step) -> Path:
    return LOGS / f"{step.part}-{re.sub('[^a-zA-Z0-9]+', '-', step.name)}.log"


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a step and all that it started: with a warning first, so that pytest names the test that hangs."""
    for number in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(5)
            return
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def table(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures, each beside its floor, ceiling or peer and with the ratio to it."""
    rows = []
    for name, figure in sorted(figures.items()):
        beside = [
            f"{kind} {figure[kind]:,.4g} ({figure['value'] / figure[kind]:.2f})"
            for kind in REFERENCES if isinstance(figure.get(kind), int | float) and figure[kind]
        ]
        rows.append(f"{name:64} {figure['value']:>12,.4g} {figure['unit']:10} {'  '.join(beside)}")
    return "\n".join(rows)


def document(check: Check, commit: str | None, words: Sequence[str]) -> dict[str, Any]:
    """The results object: where, when, by what command, the figures, and what failed."""
    sys.path.insert(0, str(ROOT))
    from octavo.bench.report import machine

    where = machine()
    stated = ROOT / "COMMIT"  # for a tree that travelled without its .git
    where["commit"] = commit or where["commit"] or (stated.read_text(encoding="utf-8").strip() if stated.is_file() else None)
    return {
        **where,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "scripts/gpu_check.py", *words]),
        "figures": check.figures,
        "failed": check.failed,
        "notes": check.notes,
    }


def place(results: Mapping[str, Any], folder: Path) -> Path:
    """Where a results object is kept: by its day and its GPU."""
    gpu = re.sub(r"[^a-z0-9]+", "-", (results["gpu"] or "no-gpu").split(",")[0].lower()).strip("-")
    return folder / f"{results['date'][:10]}-{gpu}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, write and print what they found."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", help=f"parts to run, of {','.join(PARTS)} (default: all; server only with its packages)")
    parser.add_argument("--full", action="store_true", help="all of the benchmarks of engine and server: five minutes more")
    parser.add_argument("--engine-args", metavar="ARGS", help="arguments of benchmarks/engine_gpu.py instead of a choice of ours")
    parser.add_argument("--commit", help="the commit, where the tree has no .git (else the file COMMIT)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results file")
    options = parser.parse_args(words)
    only, left_out = default_parts() if options.only is None else (options.only.split(","), [])
    unknown = sorted(set(only) - set(PARTS))
    if unknown:
        parser.error(f"unknown part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    LOGS.mkdir(parents=True, exist_ok=True)
    check = Check(options.limit)
    check.notes += left_out
    engine_args = shlex.split(options.engine_args) if options.engine_args else FULL if options.full else QUICK
    for group in grouped(steps(only, engine_args, server_args=() if options.full else QUICK)):
        check.run(group)
    missing = [path.name for path in EXTENSIONS if not path.is_file()]
    if missing:  # build_ext.py succeeds without a compiler, because the package runs without kernels
        check.failed.append(f"build: there is no {' and no '.join(missing)}")
    results = document(check, options.commit, words)
    print(table(check.figures))
    for note in check.notes:
        print(f"note: {note}")
    if check.figures:
        path = place(results, options.results)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{results['gpu'] or 'no GPU'}: {len(check.figures)} figures in {path}")
    if check.failed:
        print(f"FAILED: {', '.join(check.failed)} (logs in {LOGS})")
    return 1 if check.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
