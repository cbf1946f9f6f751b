"""The CUDA kernels without a GPU: their own text, run on the CPU by the machine of this folder, under the tests that a GPU runs.

Each module of tests/gpu below runs in a process of its own with the plugin on_cpu, because there "cuda" is the CPU; two run at a
time. docs/add-a-kernel.md says what this shows and what it does not.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import kernel_library
import pytest

MODULES = (  # the longest first
    "gpu/test_attention_prefill", "gpu/test_attention_decode", "gpu/test_sampling", "gpu/test_gemm", "gpu/test_activation",
    "gpu/test_norm", "gpu/test_kv", "worker/test_staging",
)


Done = subprocess.CompletedProcess[str]


def run(*arguments: str, library: Path, seconds: int = 280) -> Done:
    """pytest with the plugin, on one core."""
    path = os.pathsep.join([str(kernel_library.HERE), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OCTAVO_EMULATED": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "on_cpu", "-p", "no:cacheprovider", f"--timeout={seconds}", *arguments]
    return subprocess.run(command, cwd=kernel_library.ROOT, env=environment, check=False, capture_output=True, text=True,
                          timeout=seconds + 60)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Done]]]:
    library = kernel_library.build()
    asked = {item.callspec.params.get("module") for item in request.session.items if hasattr(item, "callspec")}
    with ThreadPoolExecutor(2) as pool:
        yield {module: pool.submit(run, f"tests/{module}.py", library=library) for module in MODULES if module in asked}


@pytest.mark.parametrize("module", MODULES)
def test_kernels(module: str, results: dict[str, Future[Done]]) -> None:
    done = results[module].result()
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    print(done.stdout.splitlines()[-1])
