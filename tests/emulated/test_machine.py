"""The machine that emulates kernels: a sound kernel computes what it means, of every other fault, kernel and thread are named."""

import ctypes
import re

import kernel_library
import pytest
from translate import translate

FAULTS = {
    "beyond_the_tensor": "thread 63 writes 4 bytes at byte 256 of argument 0 of fault, which has 256 bytes",
    "only_read": "writes argument 0 of fault, which the operator's schema does not say",
    "beyond_shared": "thread 63 writes shared memory at .* outside of what it has",
    "beyond_dynamic": "writes shared memory at .* outside of what it has .128 bytes",
    "not_written": "thread 0 reads shared memory at .* which no thread has written",
    "no_barrier": "reads shared memory at .* which thread .* has written with no barrier between|which no thread has written",
    "read_then_written": "which others have read with no barrier between|which thread .* has written with no barrier",
    "diverged": "in __s(hfl_xor_sync|yncwarp) while other lanes of its warp wait in __s(yncwarp|hfl_xor_sync)",
    "barrier_of_some": "waits for ever at barrier .: 32 of 64 threads are there",
    "left_early": "ends while others wait for it at barrier 0|waits at barrier 0 for threads that have ended",
    "waits_for_nobody": "goes round and round",
    "not_awaited": "reads shared memory at .* to which an asynchronous copy is under way",
    "never_awaited": "asynchronous copy of thread .* was never waited for",
    "awaited_by_itself": "reads shared memory at .* (copy is under way|with no barrier between|no thread has written)",
    "odd_address": "takes 4 bytes of shared memory at 1026, which is no multiple of 4",
}


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    found = ctypes.CDLL(str(kernel_library.build(only=("faults.cu",))))
    found.fault.restype = ctypes.c_char_p
    return found


def run(library: ctypes.CDLL, name: str, seed: int) -> tuple[str, list[int]]:
    out = (ctypes.c_int * 64)()
    library.emulated_seed(ctypes.c_uint64(seed))
    return library.fault(name.encode(), out).decode(), list(out)


def test_a_sound_kernel(library: ctypes.CDLL) -> None:
    wanted = [sum(range(64)) + sum(range(32)) + 32 * 32 * (thread // 32) for thread in range(64)]
    for seed in range(20):
        assert run(library, "sound", seed) == ("", wanted)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_named(library: ctypes.CDLL, name: str) -> None:
    """In every order of the threads."""
    for seed in range(3 if name == "waits_for_nobody" else 20):
        words, _ = run(library, name, seed)
        assert re.search(rf"emulated: kernel {name}_kernel, block \(0, 0, 0\), thread \d+ .*({FAULTS[name]})|"
                         rf"emulated: kernel {name}_kernel, block \(0, 0, 0\), ({FAULTS[name]})", words), words
    assert run(library, "sound", 1)[0] == ""  # the next launch is not the worse for it


def test_ptx_that_is_not_known_names_file_and_line() -> None:
    source = 'int x;\n__device__ void f() {\n  asm volatile("bar.red %0;" ::"r"(x) : "memory");\n}\n'
    text = translate(source, "csrc/cuda/some.cu")
    assert "static_assert(false, \"csrc/cuda/some.cu:3: the emulation does not know this PTX: bar.red %0;\")" in text
    assert text.count("\n") == source.count("\n") + 1  # behind the line directive every line is where it was


def test_shared_memory_and_kernels_are_rewritten() -> None:
    text = translate("__global__ void __launch_bounds__(max(1, 2)) f(int a) {\n  __shared__ float x[2][3], y;\n}\n", "some.cu")
    assert 'f(int a) { emulated::name_kernel("f");' in text
    for name, kind in (("x", "float[2][3]"), ("y", "float")):
        assert f"auto& {name} = *static_cast<std::type_identity_t<{kind}>*>(emulated::shared_static(" in text
