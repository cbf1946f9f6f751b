"""That the emulation can fail: a small fault in the text of a kernel, and the tests of its module must see it.

A file that pytest does not collect by itself: it compiles a library for each fault. `make emulated` runs it.
"""

import re
from typing import NamedTuple

import kernel_library
import pytest
from test_kernels import run


class Fault(NamedTuple):
    """`old` in csrc/cuda/`file` becomes `new`, and the tests of `module` say what the pattern `said` says."""

    file: str
    old: str
    new: str
    module: str
    said: str = "AssertionError|wrong, first at"


RACE = "emulated: kernel .*(with no barrier between|no thread has written|copy is under way)"
COPY = "emulated: kernel .* to which an asynchronous copy is under way"
BOUNDS = "emulated: kernel .* (argument . of|outside of what it has|no thread has written)"
PREFILL, DECODE = "gpu/test_attention_prefill", "gpu/test_attention_decode"
FAULTS = {
    "norm: a barrier dropped": Fault(
        "norm.cu", "__syncthreads();\n      square = fold([&](int s) { return sums[s]; });",
        "square = fold([&](int s) { return sums[s]; });", "gpu/test_norm", RACE),
    "norm: no check of the row's end": Fault(
        "norm.cu", "if (i < width) v.set(e, row[i]);", "v.set(e, row[i]);", "gpu/test_norm", BOUNDS),
    "activation: a barrier dropped": Fault("activation.cu", "  __syncthreads();\n", "", "gpu/test_activation", RACE),
    "cache: no check of the block's end": Fault(
        "kv_cache.cu", "if (first + i * copy_threads < p.block_units) to[", "to[", "gpu/test_kv", BOUNDS),
    "step: one token too many": Fault("step.cu", "if (t < t_used) {", "if (t <= t_used) {", "worker/test_staging"),
    "sampling: a barrier dropped": Fault(
        "sampling_team.cuh", "      return;\n    }\n#endif\n    __syncthreads();", "      return;\n    }\n#endif",
        "gpu/test_sampling", RACE),
    "sampling: no check of the row's end": Fault(
        "sampling_row.cuh", "to[i] = i < count ? from[i] : -infinity()", "to[i] = from[i]", "gpu/test_sampling", BOUNDS),
    "plain attention: a barrier dropped": Fault(
        "attention_simt.cu", "    __syncthreads();  // the partition before is done with\n", "", PREFILL, RACE),
    "plain attention: an index off by one": Fault(
        "attention_simt.cu", "i < last) cells[i] =", "i < last) cells[i + 1] =", PREFILL, BOUNDS),
    "plain attention: lanes leave a loop": Fault(
        "attention_simt.cu", "i0 < last; i0 +=", "i0 + thread / key_lanes < last; i0 +=", PREFILL,
        "emulated: kernel .*(of its warp wait|waits for ever)"),
    "prefill: values are not awaited": Fault(
        "attention_prefill.cuh", "cp_async_wait<0>();\n      __syncthreads();  // the values", "__syncthreads();  // the values",
        PREFILL, COPY),
    "prefill: a barrier dropped": Fault(
        "attention_prefill.cuh", "      __syncthreads();  // the values are there", "  // the values are there", PREFILL, RACE),
    "prefill's plan: a barrier dropped": Fault(
        "attention_prefill.cu", "  __syncthreads();\n  for_each_tile([&](int order, int, int",
        "  for_each_tile([&](int order, int, int", PREFILL, RACE),
    "decode: one copy too few is awaited": Fault(
        "attention_decode.cuh", "cp_async_wait<2>();\n  else if (places == 5) cp_async_wait<4>();",
        "cp_async_wait<3>();\n  else if (places == 5) cp_async_wait<5>();", DECODE, COPY),
    "decode: keys to come are not masked": Fault(
        "attention_decode.cuh", "if (distance > 0 || (p.window", "if ((p.window", DECODE),
    "decode: the computing warps do not meet": Fault(
        "attention_decode.cuh", "        meet();\n        if (8 * i + warp < rows) {", "        if (8 * i + warp < rows) {",
        DECODE, f"{RACE}|wrong"),
    "product: one copy too few is awaited": Fault(
        "gemm_skinny.cu", "copies_wait<norm ? stages - 1 : stages - 2>()", "copies_wait<norm ? stages : stages - 1>()",
        "gpu/test_gemm", COPY),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(name: str) -> None:
    fault = FAULTS[name]

    def edit(file: str, text: str) -> str:
        if file != f"csrc/cuda/{fault.file}":
            return text
        assert fault.old in text, f"{file} has changed: choose another fault"
        return text.replace(fault.old, fault.new, 1)

    library = kernel_library.build(edit)
    try:
        done = run(f"tests/{fault.module}.py", "-x", library=library)
    finally:
        library.unlink()
    assert done.returncode == 1 and re.search(fault.said, done.stdout), done.stdout[-3000:] + done.stderr[-1000:]
    print(next(line for line in done.stdout.splitlines() if re.search(fault.said, line)))
