"""The build of the CUDA kernels, without a GPU and without nvcc: a small script stands for it."""

import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import build_cuda
import cuda_report
import cuda_toolkit
from cuda_toolkit import Refusal, Toolkit

KNOWN = frozenset(["7.5", "8.0", "8.6", "8.9", "9.0a", "10.0", "12.0"])
THIRTEEN = Toolkit(Path("nvcc"), (13, 0), "13.0", KNOWN)

# Answers like nvcc; "compiles" by copying, writes every compilation into $CALLS, and refuses sources that say WRONG.
NVCC = """#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release RELEASE, VRELEASE.88"; exit;;
--list-gpu-code) printf 'sm_75\\nsm_80\\nsm_90\\nsm_100\\n'; exit;;
esac
for last; do :; done
source=$(echo "$*" | sed 's/.* -c \\([^ ]*\\) -o .*/\\1/')
if grep -q WRONG "$source"; then echo "/octavo/$source(3): error: it says WRONG"; exit 2; fi
echo "$source" >> "$CALLS"
cp "$source" "$last"
case "$source" in *.cu)
echo "ptxas info    : Compiling entry function '_Z4kern' for 'sm_80'"
echo "ptxas info    : Function properties for _Z4kern"
echo "    STACK bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
echo "ptxas info    : Used 8 registers, used 0 barriers";; esac
"""


def toolkit(folder: Path, release: str = "13.0", stack: int = 0) -> Path:
    """A CUDA toolkit for find_nvcc: its folder."""
    nvcc = folder / "toolkit" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True, exist_ok=True)
    nvcc.write_text(NVCC.replace("RELEASE", release).replace("STACK", str(stack)))
    nvcc.chmod(0o755)
    return nvcc.parent.parent


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source tree of two kernel files, one header and one binding, with a toolkit and without a GPU."""
    for name, text in {
        "cuda/a.cu": '#include "launch.h"\n', "cuda/b.cu": "// alone\n", "cuda/launch.h": '#include "common/check.h"\n',
        "cuda/bindings.cpp": '#include "launch.h"\n', "common/check.h": "// check\n", "common/check.cpp": '#include "check.h"\n',
    }.items():
        path = tmp_path / "csrc" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(build_cuda, "ROOT", tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path)))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.delenv("OCTAVO_CUDA_ARCHS", raising=False)
    monkeypatch.setattr(build_cuda, "capabilities_here", list)
    monkeypatch.setattr(build_cuda, "find_torch", lambda: (tmp_path / "torch", "2.11"))
    monkeypatch.setattr(build_cuda, "output", lambda *words: "g++ 12\n")
    return tmp_path


def built(tree: Path, *more: str) -> tuple[int, list[str]]:
    """Run a build that does not link; its exit code, and the files that were compiled."""
    (tree / "calls").write_text("")
    code = build_cuda.main(["--no-link", "--objects", str(tree / "objects"), *more])
    return code, sorted(Path(line).name for line in (tree / "calls").read_text().splitlines())


@pytest.mark.parametrize("text, archs", [
    ("9.0a;8.0", ["8.0", "9.0a"]), ("9.0", ["9.0a"]), (" 8.6, 8.0+PTX 8.6", ["8.0+PTX", "8.6"]),
    ("12.0 10.0 7.5", ["7.5", "10.0", "12.0"]),
])
def test_architectures_are_read(text: str, archs: list[str]) -> None:
    assert cuda_toolkit.parse_archs(text, THIRTEEN) == archs


@pytest.mark.parametrize("text, words", [
    ("sm_80", "names 'sm_80'"), ("8.0;ampere", "names 'ampere'"), ("8.0a", "names '8.0a'"), ("9.0a+PTX", r"names '9.0a\+PTX'"),
    ("6.1", "names 6.1, but .* 7.0 or newer"),
    ("8.0 7.0", "names 7.0, for which CUDA 13.0 makes no code; it knows 7.5, 8.0, .* 12.0"),
])
def test_other_architectures_are_refused_by_name(text: str, words: str) -> None:
    with pytest.raises(Refusal, match=f"^OCTAVO_CUDA_ARCHS {words}"):
        cuda_toolkit.parse_archs(text, THIRTEEN)


@pytest.mark.parametrize("capabilities, archs", [
    (["9.0", "9.0"], ["9.0a"]), (["8.0", "10.3"], ["8.0", "10.0"]), (["12.1"], ["12.0"]), (["8.7", "6.1"], ["8.6"]), ([], []),
])
def test_the_gpus_of_the_machine_choose(capabilities: list[str], archs: list[str]) -> None:
    assert cuda_toolkit.archs_of_gpus(capabilities, THIRTEEN) == archs


def test_gpus_that_cannot_be_served_are_refused() -> None:
    with pytest.raises(Refusal, match=r"compute capability 6\.1, but the kernels need 7\.0"):
        cuda_toolkit.archs_of_gpus(["6.1"], THIRTEEN)
    with pytest.raises(Refusal, match=r"CUDA 13\.0 makes no code .* 11\.0"):
        cuda_toolkit.archs_of_gpus(["11.0"], THIRTEEN)


def test_who_chooses() -> None:
    def here() -> list[str]:
        return ["8.9"]

    every = ["7.5", "8.0+PTX", "8.6", "8.9", "9.0a", "10.0", "12.0"]
    assert cuda_toolkit.choose_archs({"OCTAVO_CUDA_ARCHS": "8.0"}, THIRTEEN, True, here) == ["8.0"]
    assert cuda_toolkit.choose_archs({"OCTAVO_CUDA_ARCHS": " "}, THIRTEEN, False, here) == ["8.9"]
    assert cuda_toolkit.choose_archs({}, THIRTEEN, True, here) == every
    assert cuda_toolkit.choose_archs({}, THIRTEEN, False, list) == every


def test_gencode() -> None:
    assert cuda_toolkit.gencode(["9.0a"]) == ["-gencode", "arch=compute_90a,code=sm_90a"]
    assert cuda_toolkit.gencode(["8.0+PTX"])[1::2] == ["arch=compute_80,code=sm_80", "arch=compute_80,code=compute_80"]


@pytest.mark.parametrize(
    "release, archs", [("13.0", "7.5 8.0 9.0a 10.0"), ("12.4", "7.5 8.0 9.0a 10.0"), ("11.8", "7.5 8.0 10.0")])
def test_a_toolkit_says_what_it_knows(tmp_path: Path, release: str, archs: str) -> None:
    found = cuda_toolkit.probe(toolkit(tmp_path, release) / "bin" / "nvcc")
    assert found.known == set(archs.split()) and cuda_toolkit.release(found) == release


def test_an_old_toolkit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"is CUDA 11\.7; the kernels need 11\.8 or newer"):
        cuda_toolkit.probe(toolkit(tmp_path, "11.7") / "bin" / "nvcc")


def test_where_the_toolkit_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = toolkit(tmp_path)
    nvcc = home / "bin" / "nvcc"
    assert cuda_toolkit.find_nvcc({"CUDA_HOME": str(home), "CUDA_PATH": "/nowhere"}) == nvcc
    assert cuda_toolkit.find_nvcc({"CUDA_HOME": "", "CUDA_PATH": str(home)}) == nvcc
    assert cuda_toolkit.find_nvcc({"PATH": str(home / "bin")}) == nvcc
    with pytest.raises(Refusal, match="CUDA_HOME is /nowhere, but there is no /nowhere/bin/nvcc"):
        cuda_toolkit.find_nvcc({"CUDA_HOME": "/nowhere", "PATH": str(home / "bin")})
    monkeypatch.setattr("shutil.which", lambda name, path: None)
    with pytest.raises(Refusal, match="no CUDA toolkit was found"):
        cuda_toolkit.find_nvcc({})


def test_what_did_not_change_is_not_compiled_again(tree: Path) -> None:
    everything = ["a.cu", "b.cu", "bindings.cpp", "check.cpp"]
    assert built(tree) == (0, everything)
    assert built(tree) == (0, [])
    (tree / "csrc/cuda/b.cu").write_text("// other\n")
    assert built(tree) == (0, ["b.cu"])
    (tree / "csrc/common/check.h").write_text("// other, and included through launch.h\n")
    assert built(tree) == (0, ["a.cu", "bindings.cpp", "check.cpp"])
    (tree / "csrc/common/check.h").write_text("// check\n")
    assert built(tree) == (0, [])  # what was compiled before is still there


def test_another_toolkit_or_architecture_compiles_again(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built(tree)
    monkeypatch.setenv("OCTAVO_CUDA_ARCHS", "8.0")
    assert built(tree) == (0, ["a.cu", "b.cu"])
    toolkit(tree, "12.9")
    assert built(tree) == (0, ["a.cu", "b.cu", "bindings.cpp", "check.cpp"])


def test_a_file_that_does_not_compile_is_named(tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tree / "csrc/cuda/b.cu").write_text("WRONG\n")
    code, compiled = built(tree)
    error = capfd.readouterr().err
    assert code == 1 and "a.cu" in compiled and "/octavo/" not in error
    assert "csrc/cuda/b.cu(3): error: it says WRONG" in error and "octavo: b.cu did not compile" in error
    (tree / "csrc/cuda/b.cu").write_text("right\n")
    assert built(tree) == (0, ["b.cu"])


def test_spills_are_an_error_only_when_asked_for(tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    toolkit(tree, stack=72)
    assert built(tree)[0] == 0
    assert built(tree, "--check-spills")[0] == 1
    error = capfd.readouterr().err
    assert "kernels of a.cu, b.cu use more local memory" in error and re.search(r"8\.0 +8 +0 +72 +0  a\.cu", error)


def test_refusals_reach_the_user_in_one_sentence(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("OCTAVO_CUDA_ARCHS", "5.2")
    assert built(tree) == (1, [])
    said = "octavo: OCTAVO_CUDA_ARCHS names 5.2, but the kernels need compute capability 7.0 or newer.\n"
    assert capfd.readouterr().err == said


def test_a_file_that_is_gone_is_not_staged(tree: Path) -> None:
    built(tree)
    (tree / "csrc/cuda/b.cu").unlink()
    assert [name.name for name in build_cuda.stage(tree, tree / "objects" / "source")] == ["a.cu", "bindings.cpp", "check.cpp"]
    assert not (tree / "objects/source/csrc/cuda/b.cu").exists()


def test_old_objects_leave_the_cache(tree: Path) -> None:
    built(tree)
    old = next((tree / "objects").glob("a-*.o"))
    stale = old.with_name("a-stale.o")
    stale.write_text("")
    os.utime(stale, (1, 1))
    built(tree)
    assert old.exists() and not stale.exists()


def test_ptxas_is_read() -> None:
    text = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_90a'
ptxas info    : Function properties for _Z1aPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 400 bytes smem, 360 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_120'
ptxas info    : Function properties for _Z1bPf
    24 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers, 24 bytes cumulative stack size
"""
    kernels = cuda_report.read_ptxas(text)
    assert kernels == [cuda_report.Kernel("_Z1aPf", "9.0a", 168, 400, 0, 0), cuda_report.Kernel("_Z1bPf", "12.0", 255, 0, 24, 20)]
    assert cuda_report.table({"a.cu": kernels}).splitlines()[2].split()[:5] == ["12.0", "255", "0", "24", "20"]
    with pytest.raises(Refusal, match="unexpected"):
        cuda_report.read_ptxas("Compiling entry function 'k' for 'sm_80' and then nothing")


def test_words_of_ptxas_about_slow_code_are_found() -> None:
    words = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in function 'k'"
    assert cuda_report.losses(f"ptxas info    : 0 bytes gmem\n{words}\n") == [words]


def test_what_a_kernel_may_spill() -> None:
    def kernel(arch: str, stack: int) -> cuda_report.Kernel:
        return cuda_report.Kernel("_Z4kernPf", arch, 255, 0, stack, 0)

    kernels = [kernel("9.0a", 0), kernel("9.0a", 8), kernel("8.0", 64), kernel("8.0", 72)]
    assert cuda_report.spilling("a.cu", kernels) == [kernels[1], kernels[3]]


def test_a_kernel_may_spill_more_where_the_list_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = cuda_report.Kernel("_Z4kernPf", "8.0", 255, 0, 80, 0)
    monkeypatch.setattr(cuda_report, "MAY_SPILL", (("a.cu", "kern"),))
    assert cuda_report.spilling("a.cu", [kernel]) == [] and cuda_report.spilling("b.cu", [kernel]) == [kernel]
