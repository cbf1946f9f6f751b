"""What `make gpu-check` says of a machine that lacks something, with programs that are pretended."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import gpu_machine

PROGRAMS = ("g++", "cmake", "nvcc", "nvidia-smi")


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that makes a machine: its programs (name: shell code), and what python says of torch."""

    def make(torch: str = "echo 2.12.0 True", packages: tuple[str, ...] = gpu_machine.PACKAGES, **programs: str) -> None:
        for name, code in {**dict.fromkeys(PROGRAMS, "true"), "python": torch, **programs}.items():
            if code:
                (tmp_path / name).write_text(f"#!/bin/sh\n{code}\n")
                (tmp_path / name).chmod(0o755)
        for variable in ("CUDA_HOME", "CUDA_PATH", "CUDAHOSTCXX", "CXX"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        monkeypatch.setattr(gpu_machine.build_ext, "tool", gpu_machine.shutil.which)
        which = gpu_machine.shutil.which  # find_nvcc() looks into /usr/local/cuda too
        monkeypatch.setattr(gpu_machine.shutil, "which", lambda name, path="": None if path.startswith("/usr") else which(name))
        monkeypatch.setattr(gpu_machine.importlib.util, "find_spec", lambda name: object() if name in packages else None)

    return make


def test_a_machine_that_has_everything_lacks_nothing(machine) -> None:
    machine()
    assert gpu_machine.missing(["build", "tests"]) == ""


@pytest.mark.parametrize("nvidia_smi, seen", [("", "not found"), ("echo No devices were found; exit 6", "No devices were found"),
                                              ("echo 'GPU 0: H100'; echo 'GPU 1: H100'", "GPU 0: H100"), ("exit 9", "no answer")])
def test_a_gpu_that_torch_does_not_see(machine, nvidia_smi: str, seen: str) -> None:
    machine("echo warned >&2; echo True; echo 2.12.0+cpu False", **{"nvidia-smi": nvidia_smi})
    words = f"this machine cannot check GPU kernels: torch 2.12.0+cpu sees no GPU (nvidia-smi: {seen})."
    assert gpu_machine.missing(["kernels"]) == gpu_machine.missing(["build", "kernels"]) == words


def test_torch_that_is_not_there_or_cannot_be_loaded(machine) -> None:
    machine("exit 1", packages=("pytest",))
    assert gpu_machine.missing(["tests"]).endswith("/python has no torch and no numpy.")
    machine("printf 'Traceback\\nImportError: libcudart.so.13\\n' >&2; exit 1")
    assert gpu_machine.missing(["tests"]).endswith(": torch cannot be loaded (ImportError: libcudart.so.13).")


def test_what_a_build_needs_is_asked_for_only_by_a_build(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(nvcc="", cmake="", **{"g++": ""})
    assert gpu_machine.missing(["tests", "soak"]) == ""
    said = gpu_machine.missing(["build", "tests"])
    assert "there is no C++ compiler (g++ was not found); cmake was not found; no CUDA toolkit was found (" in said
    assert said.count(": ") == 1 and said.endswith(").") and "torch" not in said
    monkeypatch.setenv("CXX", "clang++")
    assert "(clang++ was not found)" in gpu_machine.missing(["build"])


def test_how_many_at_once_depends_on_processors_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def machine(processors: int, free: str) -> int:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(processors))
        monkeypatch.setattr(gpu_machine.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=free))
        return gpu_machine.at_once()

    assert [machine(16, "80000\n"), machine(16, "15000\n"), machine(64, "6000\n80000\n"), machine(2, "80000")] == [10, 3, 2, 2]
    assert machine(16, "[N/A]") == 10
    monkeypatch.setattr(gpu_machine.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(FileNotFoundError()))
    assert gpu_machine.at_once() == 10
