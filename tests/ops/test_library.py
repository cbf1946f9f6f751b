"""The door to the kernels: what it chooses, what it says without an extension, what it refuses, the fake versions."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from octavo import ops
from octavo.errors import ConfigError
from octavo.ops import fused_reference, library, reference

ROOT = Path(library.__file__).parents[2]
built = pytest.mark.skipif(not ops.built(), reason="the extension is not built")

# Run with a file that no build makes in place of the extension, as on a machine without a compiler.
ABSENT = """
import json, logging, pathlib, sys
lines = []
class Keep(logging.Handler):
    def emit(self, record):
        lines.append((record.name, record.levelname, record.getMessage()))
logging.getLogger("octavo").addHandler(Keep())
beside = pathlib.Path.with_name
pathlib.Path.with_name = lambda path, name: beside(path, "absent.so" if name == "_C.so" else name)
import torch
from octavo import ops
from octavo.ops import fused_reference, library, reference
from octavo.errors import ConfigError
out = torch.empty(2, 3)
ops.rms_norm(out, torch.ones(2, 3), torch.ones(3), 0.0, 0.0)
ops.activation(out, out, "relu")
try:
    library._load(pathlib.Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so")
    stale = ""
except ConfigError as error:
    stale = str(error)
same = all(library.choose(name) is getattr(reference, name) for name in library.NAMES)
print(json.dumps({"built": ops.built(), "isa": ops.isa(), "same": same, "sum": out.sum().item(), "lines": lines,
                  "stale": stale}))
"""


@pytest.fixture(scope="module")
def absent():
    run = subprocess.run([sys.executable, "-c", ABSENT], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_without_an_extension_everything_runs_on_the_reference(absent):
    assert absent["built"] is False and absent["isa"] == "reference" and absent["same"] is True
    assert absent["sum"] == pytest.approx(6.0)


def test_without_an_extension_it_says_so_once_and_how_to_build(absent):
    name, level, message = absent["lines"][0]
    assert len(absent["lines"]) == 1
    assert (name, level) == ("octavo.ops", "WARNING")
    assert "reference operators" in message and "make ext" in message


def test_an_extension_that_lacks_operators_is_refused(absent):
    assert "another version of Octavo" in absent["stale"] and "rms_norm" in absent["stale"]


def test_an_extension_that_cannot_be_loaded_is_refused_with_the_reason(tmp_path):
    broken = tmp_path / "_C.so"
    broken.write_bytes(b"not a library")
    with pytest.raises(ConfigError, match=r"_C\.so cannot be loaded with torch .*: .*(ELF|too short)"):
        library._load(broken)


@built
def test_the_cuda_kernels_of_this_tree_are_complete_where_they_are_built():
    """No skip where they are not: CI runs the tests before it compiles them, and takes a skipped test for a mistake."""
    if not ops.cuda_built():
        with pytest.raises(ConfigError, match="the CUDA kernels are not built"):
            library.load_cuda()
        return
    library.load_cuda()
    library.load_cuda()  # and may be asked for again
    for name in library.PACKED:
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"octavo::{name}", "CUDA"), name


@built
def test_cuda_kernels_that_lack_operators_are_refused(monkeypatch):
    """A stale library is one that loads and lacks a kernel; isa stands for an operator that it does not have yet."""
    monkeypatch.setattr(library, "CUDA_EXTENSION", Path(torch.__file__).parent / "lib" / "libtorch_global_deps.so")
    monkeypatch.setattr(library, "GPU_NAMES", (*library.GPU_NAMES, "isa"))
    with pytest.raises(ConfigError, match=r"another version of Octavo: it lacks (.*, )?isa\. Build them with `make") as caught:
        library.load_cuda()
    assert caught.value.param == "device" and "pack_linear" not in str(caught.value)


def test_every_operator_is_exported_and_unwrapped():
    for name in (*library.NAMES, *library.GPU_NAMES):
        chosen = library.choose(name)
        assert getattr(ops, name) is chosen
        if ops.built():
            assert isinstance(chosen, torch._ops.OpOverload)
        else:
            assert chosen is plain(name)
    others = {"AttentionMeta", "REBUILD", "REBUILD_CUDA", "built", "cuda_built", "isa", "load_cuda"}
    assert {*library.NAMES, *library.GPU_NAMES} == set(ops.__all__) - others
    with pytest.raises(AttributeError, match="no_such"):
        library.choose("no_such")


@built
def test_isa_is_what_the_kernels_use():
    assert ops.isa() in ("plain", "avx2", "avx512")


# How a schema spells the types of the reference functions.
TYPES = {torch.Tensor: "Tensor", torch.Tensor | None: "Optional[Tensor]", int: "int", float: "float", bool: "bool", str: "str"}


def plain(name):
    """The reference function of an operator."""
    return getattr(reference if name in library.NAMES else fused_reference, name)


@built
@pytest.mark.parametrize("name", [*library.NAMES, *library.GPU_NAMES])
def test_schema_and_reference_agree(name):
    schema = library.choose(name)._schema
    parameters = inspect.signature(plain(name)).parameters.values()
    told = [(p.name, TYPES[p.annotation], p.default) for p in parameters]
    given = [a.default_value if a.has_default_value() else inspect.Parameter.empty for a in schema.arguments]
    assert [(a.name, str(a.type), default) for a, default in zip(schema.arguments, given, strict=True)] == told
    assert len(schema.returns) == (1 if name == "pack_linear" else 0)


def arguments(name):
    """Small valid arguments of an operator."""
    def ints(*values):
        return torch.tensor(values, dtype=torch.int32)

    row, x, weight = torch.zeros(2, 8), torch.randn(2, 8), torch.randn(8)
    heads, one = torch.randn(2, 2, 4), torch.ones(2)
    cache = [torch.randn(3, 8, 1, 4) for _ in range(2)]
    kv = torch.randn(1, 2, 3, 8, 1, 4)
    packed, logits = reference.pack_linear(torch.randn(5, 8)), torch.randn(2, 9)
    return {
        "rms_norm": (row, x, weight, 1e-6, 0.0),
        "add_rms_norm": (row, x.clone(), x, weight, 1e-6, 0.0),
        "layer_norm": (row, x, weight, None, 1e-6),
        "add_layer_norm": (row, x.clone(), x, weight, weight.clone(), 1e-6),
        "rope": (heads, heads[:, :1].clone(), torch.tensor([0, 1]), torch.randn(3, 4), False),
        "gated_activation": (torch.zeros(2, 4), x, "silu"),
        "activation": (row, x, "gelu"),
        "write_kv": (heads[:, :1].clone(), heads[:, :1].clone(), *cache, torch.tensor([0, -1])),
        "gather_kv": (heads[:, :1].clone(), heads[:, 1:].clone(), *cache, torch.tensor([0, 5])),
        "copy_blocks": (kv, torch.tensor([[0, 1]], dtype=torch.int32)),
        "swap_blocks": (kv, torch.zeros(1, 2, 2, 8, 1, 4), torch.tensor([[2, 1]], dtype=torch.int32)),
        "paged_attention": (torch.zeros(2, 2, 4), heads, *cache, torch.tensor([[0, 2]], dtype=torch.int32), ints(0),
                            ints(0, 2), ints(5), 0.5, 0, 0.0, None),
        "linear": (torch.zeros(2, 5), x, packed, None, 5),
        "embedding": (row, torch.tensor([4, 0]), packed, 5),
        "penalties": (logits, torch.ones(1, 9, dtype=torch.int32), torch.zeros(1, 9, dtype=torch.bool), ints(0, -1),
                      one, one.clone(), one.clone()),
        "sample": (ints(0, 0), logits, one, ints(0, 3), one.clone(), torch.zeros(2), torch.tensor([1, 2]), ints(0, 0),
                   ints(4, 5)),
        "token_logprobs": (torch.zeros(2), ints(0, 0), torch.zeros(2, 1, dtype=torch.int32), torch.zeros(2, 1), logits,
                           ints(1, 2)),
        "pack_linear": (torch.randn(33, 8),),
    }[name]


@built
@pytest.mark.parametrize("name", library.NAMES)
def test_the_schema_and_the_fake_version_hold(name):
    """opcheck runs the kernel and compares what it wrote and returned with what schema and fake version say."""
    torch.library.opcheck(library.choose(name), arguments(name), test_utils=("test_schema", "test_faketensor"))


@built
def test_fake_tensors_pass_through_without_data():
    with FakeTensorMode():
        out = torch.empty(3, 576)
        ops.rms_norm(out, torch.empty(3, 576), torch.empty(576), 1e-6, 0.0)
        packed = ops.pack_linear(torch.empty(100, 64, dtype=torch.bfloat16))
        assert packed.shape == (4, 64, 32) and packed.dtype == torch.bfloat16


@pytest.mark.parametrize("name", library.NAMES)
def test_the_reference_takes_the_same_arguments(name):
    getattr(reference, name)(*arguments(name))
