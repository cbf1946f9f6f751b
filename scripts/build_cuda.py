"""Builds the CUDA kernels, octavo/ops/_cuda.so, with nvcc called directly; it needs a CUDA toolkit and torch, and no GPU.

`make cuda` builds for the GPUs of this machine (for every architecture of cuda_toolkit.py where there is none), `make cuda-all`
for every one; OCTAVO_CUDA_ARCHS="9.0a;8.0" chooses. CMakeLists.txt calls it for a wheel. Owns the flags, the linking and a
cache of objects by content; it does not know what a kernel computes. Invariants: a warning is an error; an object in the
cache was made from exactly the bytes, flags and compilers that its name is a digest of; the library names no folder of the
machine that built it, but for the toolkit's headers, and needs no library of CUDA to be loaded.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from cuda_report import Kernel, losses, read_ptxas, spilling, table
from cuda_toolkit import Refusal, Toolkit, capabilities_here, choose_archs, cudart, find_nvcc, gencode, output, probe, release

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "octavo" / "ops" / "_cuda.so"
OBJECTS = ROOT / "build" / "cuda-objects"
KEEP = 30 * 86400  # seconds after which an object that no build has used leaves the cache
ALIAS = "/octavo/"  # what the sources are called inside the library
SOURCES = ("csrc/cuda/*.cu", "csrc/cuda/*.cpp", "csrc/common/check.cpp")
HOST = "-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-Wall,-Wextra,-Werror"
CU_FLAGS = (
    "-std=c++17", "-O3", "-DNDEBUG", "-lineinfo", "--expt-relaxed-constexpr", "-Werror", "all-warnings",
    "-Wno-deprecated-gpu-targets", "-Xptxas", "-v", "-Xfatbin", "-compress-all", "-Xcompiler", HOST,
)
CPP_FLAGS = ("-O2", "-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-Xcompiler", f"-std=c++20,{HOST}")


def stage(root: Path, folder: Path) -> list[Path]:
    """Copy csrc/ into folder, each file under a #line with its alias, because nvcc maps no paths; return what is compiled."""
    wanted = {path.relative_to(root) for path in (root / "csrc").rglob("*") if path.suffix in {".h", ".cuh", ".cu", ".cpp"}}
    for old in {path.relative_to(folder) for path in (folder / "csrc").rglob("*") if path.is_file()} - wanted:
        (folder / old).unlink()
    for name in wanted:
        target, text = folder / name, f'#line 1 "{ALIAS}{name}"\n'.encode() + (root / name).read_bytes()
        if not target.is_file() or target.read_bytes() != text:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(text)
    return [path.relative_to(folder) for pattern in SOURCES for path in sorted(folder.glob(pattern))]


def closure(source: Path, root: Path) -> list[Path]:
    """The file and every file of csrc/ that it includes, also through others; relative to root, sorted."""
    found, waiting = set(), [source]
    while waiting:
        name = waiting.pop()
        found.add(name)
        for included in re.findall(r'^\s*#\s*include\s*"([^"]+)"', (root / name).read_text(encoding="utf-8"), re.MULTILINE):
            places = (name.parent / included, Path("csrc") / included, Path("csrc/cuda") / included)
            path = next((place for place in places if (root / place).is_file()), None)
            if path is not None and path not in found:
                waiting.append(path)
    return sorted(found)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time in a cache: they share the staged sources."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def digest(source: Path, root: Path, *conditions: str) -> str:
    """Names an object: a hash over the conditions and over every byte that goes into it."""
    state = hashlib.sha256(repr(conditions).encode())
    for name in closure(source, root):
        content = (root / name).read_bytes()
        state.update(f"{name}\0{len(content)}\0".encode() + content)
    return state.hexdigest()[:24]


def noiseless(text: str) -> str:
    """A compiler's words without the reports of kernels that did compile, and with the sources' own names."""
    noise = re.compile(r"ptxas info|\s+\d+ bytes stack frame")
    return "\n".join(line for line in text.replace(ALIAS, "").splitlines() if not noise.match(line))


class Build:
    """One build: the toolkit, the flags, the cache, and the reports of ptxas by file."""

    def __init__(self, toolkit: Toolkit, archs: Sequence[str], objects: Path, jobs: int) -> None:
        self.toolkit, self.archs, self.objects, self.jobs = toolkit, archs, objects, jobs
        self.torch, self.torch_version = find_torch()
        self.compiler = os.environ.get("CUDAHOSTCXX") or os.environ.get("CXX") or "g++"
        words = output(self.compiler, "--version").splitlines()[0]
        self.tools = (toolkit.version, words.partition(" ")[2])  # the first word is the name it was called by
        self.source = objects / "source"
        self.reports: dict[str, list[Kernel]] = {}
        self.losses: list[str] = []
        self.compiled = 0

    def flags(self, name: Path) -> list[str]:
        """All that decides what an object holds, beside the sources and the tools."""
        own = [*CU_FLAGS, *gencode(self.archs)] if name.suffix == ".cu" else list(CPP_FLAGS)
        return ["-Icsrc", "-Icsrc/cuda", *own]

    def digest(self, name: Path) -> str:
        torch = () if name.suffix == ".cu" else (self.torch_version,)
        return digest(name, self.source, *self.tools, *torch, *self.flags(name))

    def compile_all(self) -> list[Path]:
        """Objects of all sources, from the cache or compiled; the longest files first."""
        names = sorted(stage(ROOT, self.source), key=lambda name: -(self.source / name).stat().st_size)
        places = {name: self.objects / f"{name.stem}-{self.digest(name)}.o" for name in names}
        missing = [name for name in names if not (places[name].is_file() and places[name].with_suffix(".log").is_file())]
        print(
            f"octavo: CUDA {release(self.toolkit)} for {' '.join(self.archs)}: "
            f"{len(missing)} of {len(names)} files to compile, {self.jobs} at a time.", flush=True,
        )
        # Fewer kernel files than processors: nvcc then compiles the architectures of a file side by side.
        kernels = sum(name.suffix == ".cu" for name in missing)
        threads = max(1, min(len(self.archs), 2 * self.jobs // max(1, kernels)))
        with ThreadPoolExecutor(self.jobs) as pool:
            done = list(pool.map(lambda name: self.compile(name, places[name], threads), missing))
        failed = [name.name for name, ok in zip(missing, done, strict=True) if not ok]
        if failed:
            raise Refusal(f"{', '.join(failed)} did not compile; the compiler's words are above.")
        self.compiled = len(missing)
        for name, place in places.items():
            os.utime(place)
            if name.suffix == ".cu":
                text = place.with_suffix(".log").read_text(encoding="utf-8")
                self.reports[name.name] = read_ptxas(text)
                self.losses += losses(text)
        return list(places.values())

    def compile(self, name: Path, place: Path, threads: int) -> bool:
        """Compile one file into the cache; prints the compiler's words when it fails."""
        started = time.monotonic()
        part = place.with_suffix(".part.o")
        if name.suffix == ".cu":
            more = ["--threads", str(threads)]
        else:
            more = ["-isystem", str(self.torch / "include"), "-Xcompiler", f"-ffile-prefix-map={self.torch}/=torch/"]
        command: list[str | Path] = [self.toolkit.nvcc, "-ccbin", self.compiler, *self.flags(name), *more, "-c", name, "-o", part]
        done = subprocess.run(command, cwd=self.source, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            part.unlink(missing_ok=True)
            print(f"--- {name}\n{noiseless(done.stdout)}", file=sys.stderr, flush=True)
            return False
        place.with_suffix(".log").write_text(done.stdout, encoding="utf-8")
        part.replace(place)
        print(f"  {name.name:32} {time.monotonic() - started:6.1f} s", flush=True)
        return True

    def link(self, objects: Sequence[Path], library: Path) -> None:
        """The library: cudart inside, libstdc++ inside, torch_cpu and c10 as the only libraries of torch that it names."""
        part = library.with_suffix(".part")
        command = [
            self.compiler, "-shared", "-o", str(part), *map(str, objects), f"-L{self.torch / 'lib'}", "-ltorch_cpu", "-lc10",
            str(cudart(self.toolkit.nvcc)), "-ldl", "-lpthread", "-lrt",
            "-static-libstdc++", "-Wl,-s", "-Wl,--no-undefined", "-Wl,--exclude-libs,ALL",
        ]
        library.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            part.unlink(missing_ok=True)
            undefined = sorted(set(re.findall(r"undefined reference to `(.+)'$", done.stdout, re.MULTILINE)))
            print("\n".join(f"not defined: {name}" for name in undefined) or done.stdout, file=sys.stderr)
            raise Refusal(f"{library.name} did not link; the reasons are above.")
        part.replace(library)

    def prune(self) -> None:
        """Throw out objects that no build has used for a month."""
        for path in (*self.objects.glob("*.o"), *self.objects.glob("*.sm70")):
            if path.stat().st_mtime < time.time() - KEEP:
                path.unlink(missing_ok=True)
                path.with_suffix(".log").unlink(missing_ok=True)


def find_torch() -> tuple[Path, str]:
    """Folder and version of torch for this interpreter, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise Refusal(f"torch is not installed for {sys.executable}, and the CUDA kernels are linked with it.")
    version = importlib.metadata.version("torch")
    if [int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit()] < [2, 11]:
        raise Refusal(f"the CUDA kernels need torch 2.11 or newer, but {sys.executable} has {version}.")
    return Path(spec.submodule_search_locations[0]), version


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--all", action="store_true", help="every architecture, whatever GPU is here")
    parser.add_argument("--output", type=Path, default=LIBRARY, help="the library")
    parser.add_argument("--objects", type=Path, default=OBJECTS, help="folder of the cache of objects")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="files compiled at once")
    parser.add_argument("--no-link", action="store_true", help="compile only")
    parser.add_argument("--check-spills", action="store_true", help="fail when a kernel uses more local memory than it may")
    parser.add_argument("--report", action="store_true", help="print registers, shared memory, stack and spills of all kernels")
    parser.add_argument("--find", action="store_true", help="only print the toolkit and the architectures")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """What the options ask for; Refusal when it cannot be done."""
    started = time.monotonic()
    toolkit = probe(find_nvcc(os.environ))
    archs = choose_archs(os.environ, toolkit, options.all, capabilities_here)
    if options.find:
        print(f"CUDA {release(toolkit)} at {toolkit.nvcc}, for {' '.join(archs)}")
        return
    folder = options.objects.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        build = Build(toolkit, archs, folder, max(1, options.jobs))
        objects = build.compile_all()
        if options.report:
            print(table(build.reports))
        bad = {file: found for file, kernels in build.reports.items() if (found := spilling(file, kernels))}
        if bad and options.check_spills:
            print(table(bad), file=sys.stderr)
            raise Refusal(f"kernels of {', '.join(sorted(bad))} use more local memory than cuda_report.py allows.")
        if build.losses and options.check_spills:
            raise Refusal(f"ptxas made slow code: {build.losses[0].strip()}")
        linked = ""
        if not options.no_link:
            build.link(objects, options.output.absolute())
            linked = f"{options.output.name} has {options.output.stat().st_size / 1e6:.1f} MB; "
        build.prune()
    cached = len(objects) - build.compiled
    print(f"octavo: {linked}{build.compiled} files compiled, {cached} from the cache, {time.monotonic() - started:.0f} s.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, or say in one sentence why not."""
    try:
        run(options_of(arguments))
    except Refusal as refusal:
        print(f"octavo: {refusal}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
