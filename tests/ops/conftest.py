"""Which implementation a test runs on: the reference, and the kernels in every instruction set of this machine."""

import pytest
import torch

from octavo import ops
from octavo.ops import reference


def _has(name):
    """Whether this machine can run the kernels of an instruction set."""
    try:
        torch.ops.octavo.set_isa(name)
    except RuntimeError:
        return False
    torch.ops.octavo.set_isa("auto")
    return True


# Only what the machine has, so that nothing is skipped where nothing can be run.
SETS = tuple(name for name in ("plain", "avx2", "avx512") if _has(name)) if ops.built() else ("plain",)


@pytest.fixture(params=["reference", *(SETS if ops.built() else ())])
def impl(request):
    """A namespace with every operator: reference.py, then the kernels in each instruction set."""
    if request.param == "reference":
        yield reference
        return
    torch.ops.octavo.set_isa(request.param)
    yield ops
    torch.ops.octavo.set_isa("auto")


@pytest.fixture(params=SETS)
def kernels(request):
    """The kernels alone, in each instruction set, for what the reference does not promise."""
    if not ops.built():
        pytest.skip("the extension is not built")
    torch.ops.octavo.set_isa(request.param)
    yield ops
    torch.ops.octavo.set_isa("auto")


@pytest.fixture
def on_threads():
    """on_threads(count, function): call with that many threads in torch's pool."""
    before = torch.get_num_threads()

    def call(count, function):
        torch.set_num_threads(count)
        return function()

    yield call
    torch.set_num_threads(before)
