"""Which implementation a test runs on: the reference, and the kernels in every instruction set of this machine."""

import pytest
import torch

from octavo import ops
from octavo.ops import reference

SETS = ("plain", "avx2", "avx512")


def _forced(name):
    """The kernels with one instruction set, or a skip."""
    try:
        torch.ops.octavo.set_isa(name)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["reference", *(SETS if ops.built() else ())])
def impl(request):
    """A namespace with every operator: reference.py, then the kernels in each instruction set."""
    if request.param == "reference":
        yield reference
        return
    _forced(request.param)
    yield ops
    torch.ops.octavo.set_isa("auto")


@pytest.fixture(params=SETS)
def kernels(request):
    """The kernels alone, in each instruction set, for what the reference does not promise."""
    if not ops.built():
        pytest.skip("the extension is not built")
    _forced(request.param)
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
