"""Which CUDA toolkit builds the kernels, and for which architectures; build_cuda.py does the building.

An architecture is written as its compute capability, "8.6"; "9.0a" has the instructions that only 9.0 has, and "8.0+PTX"
adds code that the driver compiles for GPUs newer than the toolkit. What cannot be built for is refused in one sentence.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "OCTAVO_CUDA_ARCHS"
DEFAULT = ("7.0", "7.5", "8.0+PTX", "8.6", "8.9", "9.0a", "10.0", "12.0")  # of these, what the toolkit knows
LOWEST = (7, 0)
TOOLKIT = (11, 8)  # the first with 8-bit floats and extended launches


class Refusal(Exception):
    """Why nothing can be built, in one sentence."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler: where it is, its release, its own words on its version, and the capabilities it makes code for."""

    nvcc: Path
    release: tuple[int, int]
    version: str
    known: frozenset[str]


def find_nvcc(environ: Mapping[str, str]) -> Path:
    """nvcc of CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda, in this order."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if environ.get(variable):
            nvcc = Path(environ[variable]) / "bin" / "nvcc"
            if not nvcc.is_file():
                raise Refusal(f"{variable} is {environ[variable]}, but there is no {nvcc}.")
            return nvcc.absolute()
    found = shutil.which("nvcc", path=environ.get("PATH", "")) or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if not found:
        raise Refusal("no CUDA toolkit was found (nvcc is neither on PATH nor in CUDA_HOME or /usr/local/cuda).")
    return Path(found).absolute()  # the compiler runs in another folder


def probe(nvcc: Path) -> Toolkit:
    """Ask nvcc for its release and for what it knows."""
    version = output(nvcc, "--version")
    release = re.search(r"release (\d+)\.(\d+)", version)
    if not release:
        raise Refusal(f"{nvcc} --version names no release.")
    number = (int(release[1]), int(release[2]))
    if number < TOOLKIT:
        raise Refusal(f"{nvcc} is CUDA {release[1]}.{release[2]}; the kernels need {TOOLKIT[0]}.{TOOLKIT[1]} or newer.")
    known = {f"{code[:-1]}.{code[-1]}" for code in re.findall(r"^sm_(\d+)$", output(nvcc, "--list-gpu-code"), re.MULTILINE)}
    if "9.0" in known:  # its kernels need the instructions that only 9.0a has, which CUDA 12 brought
        known = known - {"9.0"} | ({"9.0a"} if number >= (12, 0) else set())
    return Toolkit(nvcc, number, version.strip(), frozenset(known))


def output(*command: str | Path) -> str:
    """What a program printed."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise Refusal(f"{' '.join(map(str, command))} failed: {error}.") from error


def order(arch: str) -> tuple[int, int]:
    """Its number, for comparing: 9.0a is (9, 0)."""
    major, minor = re.sub(r"[^\d.].*", "", arch).split(".")
    return int(major), int(minor)


def parse_archs(text: str, toolkit: Toolkit) -> list[str]:
    """The architectures that a user named: "9.0a;8.0" or "8.0+PTX 8.6"; 9.0 means 9.0a."""
    archs = []
    for word in re.split(r"[;,\s]+", text.strip()):
        name = word.removesuffix("+PTX")
        if not re.fullmatch(r"\d+\.\d|9\.0a", name) or (name.startswith("9.0") and name != word):
            raise Refusal(f"{VARIABLE} names {word!r}, which is no architecture; write for example 9.0a;8.0+PTX.")
        if order(name) < LOWEST:
            raise Refusal(f"{VARIABLE} names {word}, but the kernels need compute capability 7.0 or newer.")
        name = "9.0a" if name == "9.0" else name
        if name not in toolkit.known:
            known = ", ".join(sorted(toolkit.known, key=order))
            raise Refusal(f"{VARIABLE} names {word}, for which CUDA {release(toolkit)} makes no code; it knows {known}.")
        archs.append("9.0a" if name == "9.0a" else word)
    return sorted(set(archs), key=lambda arch: (order(arch), arch))


def release(toolkit: Toolkit) -> str:
    return ".".join(map(str, toolkit.release))


def default_archs(toolkit: Toolkit) -> list[str]:
    """Every architecture that a wheel serves with this toolkit."""
    return [arch for arch in DEFAULT if arch.removesuffix("+PTX") in toolkit.known]


def archs_of_gpus(capabilities: Iterable[str], toolkit: Toolkit) -> list[str]:
    """What to build for GPUs of these compute capabilities: for each the newest of its major number that nvcc knows."""
    archs, refusals = set(), []
    for capability in sorted(set(capabilities)):
        if order(capability) < LOWEST:
            refusals.append(f"the GPU has compute capability {capability}, but the kernels need 7.0 or newer.")
            continue
        major, minor = order(capability)
        fits = [arch for arch in toolkit.known if order(arch)[0] == major and order(arch)[1] <= minor]
        if fits:
            archs.add(max(fits, key=order))
        else:
            refusals.append(f"CUDA {release(toolkit)} makes no code for this GPU's compute capability, {capability}.")
    if refusals and not archs:  # an old card beside a new one is left out; alone it is refused
        raise Refusal(refusals[0])
    return sorted(archs, key=order)


def capabilities_here() -> list[str]:
    """Compute capabilities of this machine's GPUs; none without a driver."""
    try:
        command = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return re.findall(r"^\s*(\d+\.\d)\s*$", text, re.MULTILINE)


def choose_archs(environ: Mapping[str, str], toolkit: Toolkit, everything: bool, here: Callable[[], list[str]]) -> list[str]:
    """The variable's, else the machine's, else all."""
    if environ.get(VARIABLE, "").strip():
        return parse_archs(environ[VARIABLE], toolkit)
    return (not everything and archs_of_gpus(here(), toolkit)) or default_archs(toolkit)


def gencode(archs: Iterable[str]) -> list[str]:
    """nvcc's flags for these architectures."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX").replace(".", "")
        for code in ("sm", "compute") if arch.endswith("+PTX") else ("sm",):
            flags += ["-gencode", f"arch=compute_{number},code={code}_{number}"]
    return flags


def cudart(nvcc: Path) -> Path:
    """libcudart_static.a of the toolkit; nvcc itself says where that is, wherever a wrapper or a link to it lies."""
    done = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", "/dev/null"], check=False, capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", done.stdout + done.stderr, re.MULTILINE)
    root = Path(top[1].strip()) if top else nvcc.resolve().parent.parent
    for folder in (*sorted(root.glob(f"targets/{os.uname().machine}*/lib")), root / "lib64", root / "lib"):
        if (folder / "libcudart_static.a").is_file():
            return folder / "libcudart_static.a"
    raise Refusal(f"the CUDA toolkit of {nvcc} has no libcudart_static.a.")
