"""Compiles the CUDA kernels for the machine: translated sources, the real bindings and the machine, in one library for torch.

Owns the flags, the list of files and a cache of objects by content (build/emulated). It needs g++ and the headers of a CUDA
toolkit, and neither nvcc nor a GPU. Invariant: an object was made from the bytes, the flags and the compiler that its name is a
digest of, so that a change anywhere in csrc/ is never missed.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from build_cuda import closure, find_torch
from cuda_toolkit import Refusal, find_nvcc
from translate import translate

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "emulated"
KEEP = 7 * 86400  # seconds after which an object or a library that nobody has used leaves the cache
KERNELS = (
    "norm.cu", "activation.cu", "kv_cache.cu", "step.cu", "sampling.cu", "sampling_logprobs.cu", "gemm_skinny.cu",
    "attention.cu", "attention_simt.cu",
    "attention_decode.cu", "attention_decode_bf16.cu", "attention_decode_f16.cu", "attention_decode_fp8.cu",
    "attention_prefill.cu", "attention_prefill_bf16.cu", "attention_prefill_f16.cu", "attention_prefill_fp8.cu",
)
MACHINE = ("machine.cpp", "memory.cpp", "ptx.cpp", "runtime.cpp")
ABSENT = ("tile_linear", "tile_gated")  # operators of 9.0
FLAGS = ("-O1", "-g1", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-fvisibility=hidden", "-Wno-attributes")
# The calls before loads and stores; their functions are the machine's own, so nothing is linked for them.
CHECKED = (
    "-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0", "--param=tsan-distinguish-volatile=1",
    "-fno-threadsafe-statics",
)
# Fused multiply-add is what the kernels mean in any case; without the instruction it is a slow function with the same bits.
CPU = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").is_file() else ""
FUSED = ("-mavx2", "-mfma") if " avx2 " in CPU and " fma " in CPU else ()
Edit = Callable[[str, str], str]  # name of a file of csrc/, its text -> its text


def refusal() -> str | None:
    """Why nothing can be built here, or None."""
    if platform.machine() != "x86_64":
        return f"the machine switches fibers in x86-64 code, and this is {platform.machine()}"
    if not shutil.which("g++"):
        return "there is no g++"
    try:
        headers()
    except Refusal as error:
        return str(error)
    return None


def headers() -> Path:
    """The folder of the toolkit's headers."""
    folder = find_nvcc(os.environ).resolve().parent.parent
    for place in (folder / "include", Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"):
        if (place / "cuda_fp8.h").is_file():
            return place
    raise Refusal(f"there is no cuda_fp8.h in {folder / 'include'}.")


def build(edit: Edit | None = None, only: Sequence[str] = (), jobs: int = 2) -> Path:
    """The library, from the cache or compiled.

    Args:
        edit: changes sources before they are translated, to see a test fail. only: files instead of all kernels and bindings.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        source = CACHE / "source"
        stage(source, edit or (lambda name, text: text))
        # The machine first: of a template of the standard library in several files the linker takes the one without checks.
        files = [*MACHINE, *(only or ("bindings.cpp", *KERNELS))]
        names = [*(Path("csrc/cuda") / each for each in files), Path("csrc/common/check.cpp")]
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(lambda name: compile_one(source, name), names))
        key = hashlib.sha256("\n".join(each.name for each in objects).encode()).hexdigest()[:24]
        library = CACHE / f"emulated-{key}.so"
        if not library.is_file():
            made = library.with_suffix(f".{os.getpid()}")
            call(["g++", "-shared", "-o", str(made), *map(str, objects), f"-L{find_torch()[0] / 'lib'}", "-ltorch_cpu",
                  "-Wl,--no-undefined"])
            made.rename(library)
        os.utime(library)
        for path in (*CACHE.glob("*.o"), *CACHE.glob("*.so")):
            if path.stat().st_mtime < time.time() - KEEP:
                path.unlink()
        return library


def stage(folder: Path, edit: Edit) -> None:
    """Write the translated csrc/ and the machine into folder."""
    texts = {}
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in {".h", ".cuh", ".cu"} and "cpu" not in path.parts:
            name = str(path.relative_to(ROOT))
            text = edit(name, path.read_text(encoding="utf-8"))
            texts[name] = text if "/common/" in name else translate(text, name)
    texts["csrc/common/check.cpp"] = (ROOT / "csrc/common/check.cpp").read_text(encoding="utf-8")
    for path in HERE.iterdir():
        if path.suffix in {".h", ".cpp", ".cu"}:  # bind.h takes the place of the real one
            text = path.read_text(encoding="utf-8")
            texts[f"csrc/cuda/{path.name}"] = translate(text, f"tests/emulated/{path.name}") if path.suffix == ".cu" else text
    texts["csrc/cuda/bindings.cpp"] = bindings()
    for name, text in texts.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_file() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")


def bindings() -> str:
    """All bindings_*.cpp in one file, for the CPU and under another name; without what 8.0 has not."""
    files = sorted((ROOT / "csrc/cuda").glob("bindings_*.cpp"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    text = text.replace("_IMPL(octavo, CUDA, m)", "_IMPL(octavo_emulated, CPU, m)")
    for name in ABSENT:
        text = text.replace(f"  OCTAVO_CUDA({name});\n", "")
    return text


def flags(source: Path) -> list[str]:
    """How a file is compiled."""
    own = ["-Icsrc", "-Icsrc/cuda", "-isystem", str(headers()), *FLAGS]
    if source.suffix == ".cu":
        return ["-x", "c++", "-std=c++20", *own, *CHECKED, *FUSED, "-include", "csrc/cuda/intrinsics.h"]
    folder, version = find_torch()
    torch = ["-isystem", str(folder / "include"), "-DTORCH_TARGET_VERSION=0x020b000000000000", f"-DTORCH={version!r}"]
    fast = ["-O3", *FUSED] if source.name == "ptx.cpp" else ["-O2"]
    return ["-std=c++20", *own, *fast, *(torch if source.name == "bindings.cpp" else [])]


def compile_one(folder: Path, source: Path) -> Path:
    """An object of one file, from the cache or compiled."""
    command = flags(source)
    state = hashlib.sha256(repr((command, compiler())).encode())
    names = set(closure(source, folder))
    if source.suffix == ".cu":
        names |= set(closure(Path("csrc/cuda/intrinsics.h"), folder))
    for name in sorted(names):
        state.update(f"{name}\0".encode() + (folder / name).read_bytes())
    made = CACHE / f"{source.stem}-{state.hexdigest()[:24]}.o"
    if not made.is_file():
        unfinished = made.with_suffix(f".{os.getpid()}")
        call(["g++", *command, "-c", str(source), "-o", str(unfinished)], folder)
        unfinished.rename(made)
    os.utime(made)
    return made


def compiler() -> str:
    return subprocess.run(["g++", "--version"], check=True, capture_output=True, text=True).stdout


def call(command: list[str], folder: Path = ROOT) -> None:
    """Run a compiler; its words are the error."""
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[:4000]}")


if __name__ == "__main__":
    print(refusal() or build(jobs=int(os.environ.get("JOBS", "2"))))
