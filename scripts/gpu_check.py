"""Builds, tests, sanitises and measures the CUDA kernels on a GPU machine: `make gpu-check PYTHON=python3`, under nine minutes.

Needs a GPU, the CUDA toolkit, a C++ compiler, cmake, and a Python with torch 2.11, numpy and pytest; no network, nothing is
installed. Where one of these is missing nothing is begun. The part "server" is left out, with a note, where the server's
packages are not there. Owns the order of the parts, what runs side by side, the time limits, and the results file
benchmarks/results/<date>-<gpu>.json (with --only its name ends in the parts); it does not know what a test or a benchmark
does. Invariant: what fails or runs out of time hides nothing else, is named at the end, and makes the exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import hazards
import tree_commit
from gpu_machine import at_once, missing
from hazards import BEGINS, LEFT

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "build" / "gpu-check"
EXTENSIONS = (ROOT / "octavo" / "ops" / "_C.so", ROOT / "octavo" / "ops" / "_cuda.so")
PARTS = ("build", "tests", "kernels", "engine", "steps", "server", "soak", "sanitizer")
# What the server imports beside the engine: a bare GPU machine may lack it.
SERVER_PACKAGES = ("starlette", "uvicorn", "uvloop", "httptools", "zmq", "msgspec", "prometheus_client", "llguidance", "psutil")
LIMIT = 530  # seconds for everything
GRACE = 5.0  # seconds that a step has to end by itself once its time is over
QUICK = ("--quick",)  # of the engine's benchmark, and of the server's
FULL = ("--budget", "75", "--iterations", "2", "--startup")
SHOWN = 40  # lines of a failed step's output
REFERENCES = ("floor", "ceiling", "peer")
ENGINE = "from support import"  # in a test file: it runs engines, which share out the GPU's memory; nothing runs beside it
OFFLINE = "llama-3.2-1b/sharegpt_like/t0/output_tok_s"  # what arrivals are a share of
SOAK_MINUTES, SOAK_ENDS = 6.0, 60.0  # the whole of it; seconds for its start, and for the requests of its last round among others
# Of an H100's 16 processors ten run one of these each. First those whose races no comparison of values would show, which are also
# the slowest: 8 of 17 cases of sampling and 1 of 7 of gemm in 50 s of racecheck, 16 side by side; memcheck of the others takes 7
# to 37 s, racecheck of activation, kv and norm 18 to 30. So nine begin at once, and nine follow as these end.
SHARING = ("gemm_tile", "gemm", "attention_decode", "attention_prefill", "attention_sm90", "sampling")
SANITIZED = 85  # seconds for each; first_of_each.py ends the cases ten seconds before


@dataclass(frozen=True)
class Step:
    """One command of a part.

    Attributes:
        name: for people. limit: seconds. environ: what it adds to the environment. beside: neighbours with the same word here
            run side by side; what is timed runs alone. figures: its last line is a JSON object of figures. late: words that are
            known when it starts only, None for no time left. judge: why it failed, and notes, of its exit code and its output.
    """

    part: str
    name: str
    limit: float
    command: tuple[str, ...]
    environ: Mapping[str, str] = field(default_factory=dict)
    beside: str = ""
    figures: bool = False
    late: Callable[[Check], Sequence[str] | None] | None = None
    judge: Callable[[int, Sequence[str]], tuple[str, list[str]]] | None = None


def steps(
    parts: Sequence[str], engine_args: Sequence[str] = QUICK, root: Path = ROOT, python: str = sys.executable,
    server_args: Sequence[str] = QUICK, minutes: float = SOAK_MINUTES, sanitizer: hazards.Version = hazards.FOLLOWS,
) -> list[Step]:
    """The commands of these parts, in order.

    Args:
        engine_args, server_args: what the benchmarks of these are called with. sanitizer: the version of compute-sanitizer.
    """
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    paths = sorted((root / "tests" / "gpu").glob("test_*.py"))
    files = {f"tests/gpu/{path.name}": path.read_text(encoding="utf-8") for path in paths}
    kernels = [file for file, text in files.items() if ENGINE not in text]
    engine = tuple(file for file in files if file not in kernels)
    benchmarks = [f"benchmarks/{path.name}" for path in sorted((root / "benchmarks").glob("kernels_*.py"))]

    def script(part: str, name: str, limit: float, *words: str, beside: str = "", late: Any = None) -> list[Step]:
        command = (python, f"benchmarks/{name}.py", *words)
        return [Step(part, name, limit, command, {}, beside, True, late)] if (root / command[1]).is_file() else []

    every = [
        Step("build", "C++ kernels", 150, (python, "scripts/build_ext.py")),
        Step("build", "CUDA kernels", 240, (python, "scripts/build_cuda.py")),
        *(Step("tests", Path(file).stem, 120, (*pytest, file), beside="tests") for file in kernels),
        *([Step("tests", "engine", 150, (*pytest, *engine))] if engine else []),
        *(Step("kernels", Path(file).stem, 60, (python, file), figures=True) for file in benchmarks),
        *script("engine", "engine_gpu", 300, *engine_args),
        *script("steps", "idle", 60),
        *script("steps", "poisson", 90, late=offline),
        *script("server", "server_gpu", 160, *server_args),
        # Its blocks are few and its model is tiny, so a tenth of the GPU is plenty: the sanitizers beside it keep the rest.
        *script("soak", "soak_gpu", 60 * minutes + SOAK_ENDS, "--memory", "0.1", beside="sanitizer", late=partial(soak, minutes)),
        *sanitizers(kernels, pytest, sanitizer),
    ]
    return [step for step in every if step.part in parts]


def offline(check: Check) -> list[str]:
    """The offline throughput of this very run, where all requests were given; else poisson.py measures it itself, 15 s."""
    figure = check.figures.get(OFFLINE, {"requests": 0})
    return [] if "requests" in figure else ["--offline", str(figure["value"])]


def soak(minutes: float, check: Check) -> list[str] | None:
    """As long as was asked for, or what is left of the time."""
    left = min(minutes, (check.deadline - time.monotonic() - SOAK_ENDS) / 60)
    return ["--minutes", f"{left:.2f}", "--rounds", str(max(4, round(2 * left)))] if left >= min(minutes, 0.3) else None


def sanitizers(files: Sequence[str], pytest: Sequence[str], version: hazards.Version) -> list[Step]:
    """memcheck and racecheck of one case of each test of kernels, the most telling first; racecheck where it can judge."""
    # Without torch's cache of memory every tensor is an allocation of its own, so that memcheck sees where it ends; a graph
    # cannot be captured then. Only our kernels are instrumented.
    few = (*pytest, "-p", "first_of_each", "-o", "timeout=0")
    options = {"memcheck": ("--error-exitcode=1", "--print-limit=5"), "racecheck": hazards.OPTIONS}

    def step(tool: str, file: str) -> Step:
        command = ("compute-sanitizer", *options[tool], "--kernel-name", "kns=octavo", f"--tool={tool}", *few, file)
        environ = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "SANITIZER": tool}
        judge = partial(hazards.judge, tool=version) if tool == "racecheck" else None
        return Step("sanitizer", f"{tool} {Path(file).stem}", SANITIZED, command, environ, beside="sanitizer", judge=judge)

    ranks = {f"test_{name}": rank for rank, name in enumerate(SHARING)}
    first = sorted((file for file in files if Path(file).stem in ranks), key=lambda file: ranks[Path(file).stem])
    rest = [file for file in files if file not in first]
    every = [(tool, file) for some in (first, rest) for tool in ("racecheck", "memcheck") for file in some]
    blind = hazards.unjudged(version)
    return [step(tool, file) for tool, file in every if tool != "racecheck" or Path(file).stem not in blind]


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
        if groups and step.beside and groups[-1][-1].beside == step.beside:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


@dataclass
class Running:
    """A step that has begun: until when it may run, and whether it was told to end because its time was over."""

    step: Step
    process: subprocess.Popen[bytes] | None
    began: float
    until: float
    late: bool = False

    def ended(self) -> bool:
        """Whether it has ended; one whose time is over is told to, and killed when it does not."""
        if self.process is None or self.process.poll() is not None:
            if self.late:  # what it started may live on
                self.send(signal.SIGKILL)
            return True
        if time.monotonic() >= self.until:
            self.send(signal.SIGKILL if self.late else signal.SIGINT)  # SIGINT: pytest then names the test that hangs
            self.late, self.until = True, time.monotonic() + GRACE
        return False

    def send(self, number: int) -> None:
        """A signal for the step and all that it started."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)


class Check:
    """Runs steps, keeps their logs, and collects figures and failures.

    Args:
        limit: seconds for all of them. commit: the label of the tree, which every step writes into its own results. beside: how
            many steps run at once.
    """

    def __init__(self, limit: float, commit: str = tree_commit.UNKNOWN, beside: int = 10) -> None:
        self.deadline = time.monotonic() + limit
        self.commit, self.beside = commit, beside
        self.figures: dict[str, dict[str, Any]] = {}
        self.failed: list[str] = []
        self.notes: list[str] = []

    def run(self, group: Sequence[Step]) -> None:
        """Run these side by side, as many at once as may be; the others begin in order as these end."""
        waiting, running = list(group), list[Running]()
        try:
            while waiting or running:
                while waiting and len(running) < self.beside:
                    running += self.begin(waiting.pop(0))
                for one in [one for one in running if one.ended()]:
                    running.remove(one)
                    code = 127 if one.process is None else None if one.late else one.process.returncode
                    self.finish(one.step, code, time.monotonic() - one.began)
                time.sleep(0.02)
        finally:
            for one in running:
                one.send(signal.SIGKILL)

    def begin(self, step: Step) -> list[Running]:
        """Start a step, if there is time for it."""
        began = time.monotonic()
        words = step.late(self) if step.late else []
        if words is None or began > self.deadline - 1:
            self.failed.append(f"{step.part}/{step.name}")
            print(f"[    - s] {step.part}: {step.name}: no time left", flush=True)
            return []
        return [Running(step, self.start(step, words), began, min(began + step.limit, self.deadline))]

    def start(self, step: Step, words: Sequence[str]) -> subprocess.Popen[bytes] | None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "scripts"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environ = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "BENCH_COMMIT": self.commit, **step.environ}
        with log(step).open("wb") as out:
            try:
                return subprocess.Popen(
                    (*step.command, *words), cwd=ROOT, env=environ, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                )
            except OSError as error:
                out.write(str(error).encode())
                return None

    def finish(self, step: Step, code: int | None, seconds: float) -> None:
        """Say how a step ended, show the end of its output when it failed, and take its figures."""
        lines = log(step).read_text(encoding="utf-8", errors="replace").splitlines()
        why = "" if code == 0 else f"out of time{unended(lines)}" if code is None else f"exit code {code}"
        if step.judge and code is not None:
            why, notes = step.judge(code, lines)
            self.notes += [f"{step.name}: {note}" for note in notes]
        if not why and (left := [line for line in lines if line.startswith(LEFT)]):
            why = left[-1]
        if step.figures and not why:
            try:
                found = json.loads(lines[-1])
                figures = found.get("figures", found)
                assert all("value" in figure and "unit" in figure for figure in figures.values())
                self.figures.update(figures)
                self.notes += [f"{step.name}: {note}" for note in found.get("notes", [])] if "figures" in found else []
            except (ValueError, IndexError, AttributeError, TypeError, AssertionError):
                why = "its last line is no JSON object of figures"
        if why:
            self.failed.append(f"{step.part}/{step.name}" + (f" ({why})" if step.part == "sanitizer" else ""))
            found = [line for line in lines if line.startswith("=========")] if step.part == "sanitizer" else []
            print("\n".join(f"    {line[:220]}" for line in [*found[: SHOWN // 2], *lines[-SHOWN // 2 :]]))
        words = [line for line in lines if not line.startswith("=========")]
        last = f" ({words[-1][:100]})" if words and not why and not step.figures else ""
        print(f"[{seconds:5.0f} s] {step.part}: {step.name}: {why or 'ok'}{last}", flush=True)


def log(step: Step) -> Path:
    return LOGS / f"{step.part}-{re.sub('[^a-zA-Z0-9]+', '-', step.name)}.log"


def unended(lines: Sequence[str]) -> str:
    """Which case first_of_each.py had begun last, for people; nothing in other output."""
    begun = [line.rpartition("::")[2] for line in lines if line.startswith(BEGINS)]
    return f" in {begun[-1]}" if begun else ""


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


def document(check: Check, words: Sequence[str]) -> dict[str, Any]:
    """The results object: where, when, by what command, the figures, and what failed."""
    sys.path.insert(0, str(ROOT))
    from octavo.bench.report import machine

    return {
        **machine(),
        "commit": check.commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "scripts/gpu_check.py", *words]),
        "figures": check.figures,
        "failed": check.failed,
        "notes": check.notes,
    }


def place(results: Mapping[str, Any], folder: Path, only: Sequence[str] = ()) -> Path:
    """Where a results object is kept: by its day and its GPU, and by its parts where these were chosen."""
    gpu = re.sub(r"[^a-z0-9]+", "-", (results["gpu"] or "no-gpu").split(",")[0].lower()).strip("-")
    return folder / f"{'-'.join([results['date'][:10], gpu, *only])}.json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, write and print what they found."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", help=f"parts to run, of {','.join(PARTS)} (default: all; server only with its packages)")
    parser.add_argument("--full", action="store_true", help="all of the benchmarks of engine and server: five minutes more")
    parser.add_argument("--engine-args", metavar="ARGS", help="arguments of benchmarks/engine_gpu.py instead of a choice of ours")
    parser.add_argument("--minutes", type=float, default=SOAK_MINUTES, help="of the soak, if there is time (default: 6)")
    parser.add_argument("--commit", help="name, or file made by scripts/tree_commit.py (default: the file COMMIT, else .git)")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of the results file")
    options = parser.parse_args(words)
    only, left_out = default_parts() if options.only is None else (options.only.split(","), [])
    unknown = sorted(set(only) - set(PARTS))
    if unknown:
        parser.error(f"unknown part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if only != ["build"] and (lacks := missing(only)):
        print(f"gpu-check: {lacks}", file=sys.stderr)
        return 1
    LOGS.mkdir(parents=True, exist_ok=True)
    check = Check(options.limit, tree_commit.label(ROOT, options.commit), at_once())
    sanitizer = hazards.version() if "sanitizer" in only else ()
    check.notes += left_out
    if "sanitizer" in only:
        check.notes += [f"racecheck {name}: {why}" for name, why in hazards.unjudged(sanitizer).items()]
    engine_args = shlex.split(options.engine_args) if options.engine_args else FULL if options.full else QUICK
    server_args = () if options.full else QUICK
    for group in grouped(steps(only, engine_args, server_args=server_args, minutes=options.minutes, sanitizer=sanitizer)):
        check.run(group)
    unbuilt = [path.name for path in EXTENSIONS if not path.is_file()]
    if unbuilt:  # build_ext.py succeeds without a compiler, because the package runs without kernels
        check.failed.append(f"build: there is no {' and no '.join(unbuilt)}")
    results = document(check, words)
    print(table(check.figures))
    for note in check.notes:
        print(f"note: {note}")
    if check.figures:
        path = place(results, options.results, [] if options.only is None else only)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{results['gpu'] or 'no GPU'}: {len(check.figures)} figures in {path}")
    if check.failed:
        print(f"FAILED: {', '.join(check.failed)} (logs in {LOGS})")
    return 1 if check.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
