"""What the kernels refuse: an error names the operator, the tensor and the values, and nothing has been written.

Also the choice of the instruction set, which every other test of the kernels relies on.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from octavo import ops

pytestmark = pytest.mark.skipif(not ops.built(), reason="the extension is not built")
ROOT = Path(ops.__file__).parents[2]
LIBRARY = ROOT / "octavo" / "ops" / "_C.so"


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def good():
    """Valid arguments of the operators whose contracts are tried below, by parameter name."""
    q, cache, pairs = torch.randn(4, 6, 8), torch.randn(5, 16, 2, 8), torch.tensor([[0, 1]], dtype=torch.int32)
    weight = torch.randn(40, 12)
    return {
        "rms_norm": {
            "out": torch.empty(4, 12), "x": torch.randn(4, 12), "weight": torch.ones(12), "eps": 1e-5, "offset": 0.0,
        },
        "write_kv": {
            "key": torch.randn(4, 2, 8), "value": torch.randn(4, 2, 8), "k_cache": cache.clone(), "v_cache": cache.clone(),
            "slots": torch.arange(4),
        },
        "copy_blocks": {"kv": torch.randn(2, 2, 5, 16, 2, 8), "pairs": pairs},
        "swap_blocks": {"src": torch.randn(2, 2, 5, 16, 2, 8), "dst": torch.randn(2, 2, 3, 16, 2, 8), "pairs": pairs},
        "paged_attention": {
            "out": torch.empty(4, 6, 8), "q": q, "k_cache": cache.clone(), "v_cache": cache.clone(),
            "block_tables": torch.arange(4, dtype=torch.int32).view(2, 2), "rows": ints(1, 0), "query_start": ints(0, 1, 4),
            "context_len": ints(20, 3), "scale": 1.0, "window": 0, "softcap": 0.0, "alibi_slopes": None,
        },
        "linear": {
            "out": torch.empty(4, 40), "x": torch.randn(4, 12), "packed": ops.pack_linear(weight), "bias": torch.zeros(40),
            "n": 40,
        },
        "embedding": {"out": torch.empty(3, 12), "ids": torch.tensor([0, 1, 39]), "packed": ops.pack_linear(weight), "n": 40},
        "pack_linear": {"weight": weight},
    }


def call(name, **changed):
    arguments = good()[name]
    assert set(changed) <= set(arguments)
    getattr(ops, name)(*(arguments | changed).values())


BAD = [
    ("rms_norm", {"weight": torch.ones(11)}, r"rms_norm: weight \[H\] has shape \[11\], but H = 12 in \w+"),
    ("rms_norm", {"x": torch.randn(4, 12).double()}, r"rms_norm: x .* must be float32, not another dtype"),
    ("write_kv", {"value": torch.randn(3, 2, 8)}, r"write_kv: value \[T, H, D\] has shape \[3, 2, 8\], but T = 4 in key"),
    ("write_kv", {"key": torch.randn(4, 2, 8).half()}, r"write_kv: key .* must be float32, not float16"),
    ("write_kv", {"v_cache": torch.zeros(5, 16, 2, 8).half()}, r"write_kv: v_cache .* must be float32, not float16"),
    ("write_kv", {"k_cache": torch.zeros(5, 16, 8, 2).transpose(2, 3)}, r"write_kv: k_cache .* must be contiguous, found shape"),
    ("write_kv", {"key": torch.randn(4, 8, 2).transpose(1, 2)},
     r"key .* contiguous but for dimension 0, .* strides \[16, 1, 2\]"),
    ("write_kv", {"slots": ints(0, 1, 2, 3)}, r"write_kv: slots \[T\] must be int64, not int32"),
    ("copy_blocks", {"kv": torch.randn(2, 3, 5, 16, 2, 8)},
     r"copy_blocks: kv \[L, 2, B, S, H, D\] has shape \[2, 3, 5, 16, 2, 8\]"),
    ("copy_blocks", {"pairs": ints(0, 1)}, r"copy_blocks: pairs \[N, 2\] must have 2 dimensions, found shape \[2\]"),
    ("swap_blocks", {"dst": torch.randn(2, 2, 3, 8, 2, 8)}, r"swap_blocks: dst .* \[2, 2, 3, 8, 2, 8\], but S = 16 in src"),
    ("swap_blocks", {"dst": torch.randn(2, 2, 3, 16, 2, 8).half()}, r"swap_blocks: dst .* must be float32, not float16"),
    ("paged_attention", {"out": torch.empty(4, 6, 16)},
     r"paged_attention: out \[T, Q, D\] has shape \[4, 6, 16\], but D = 8 in q"),
    ("paged_attention", {"out": torch.empty(4, 6, 9)[:, :, :8]},
     r"paged_attention: out .* must be contiguous, .* strides \[54, 9, 1\]"),
    ("paged_attention", {"k_cache": torch.randn(5, 16, 4, 8), "v_cache": torch.randn(5, 16, 4, 8)},
     r"6 query heads do not share 4 kv heads"),
    ("paged_attention", {"rows": torch.tensor([1, 0])}, r"paged_attention: rows \[N\] must be int32, not int64"),
    ("paged_attention", {"rows": ints(1, 2)}, r"paged_attention: rows\[1\] = 2, but block_tables has 2 rows"),
    ("paged_attention", {"query_start": ints(0, 4)}, r"paged_attention: query_start has 2 entries for 2 sequences"),
    ("paged_attention", {"query_start": ints(0, 1, 5)}, r"query_start runs from 0 to 5, but there are 4 tokens"),
    ("paged_attention", {"query_start": ints(0, 5, 4)}, r"query_start\[1\] = 5, but the next is 4"),
    ("paged_attention", {"context_len": ints(20, 2)}, r"context_len\[1\] = 2, expected 3 new tokens at least"),
    ("paged_attention", {"context_len": ints(33, 3)},
     r"context_len\[0\] = 33, expected .* and 32 that fit the block table at most"),
    ("paged_attention", {"window": -1}, r"paged_attention: window = -1 is negative"),
    ("paged_attention", {"alibi_slopes": torch.ones(5)}, r"paged_attention: alibi_slopes \[Q\] has shape \[5\], but Q = 6 in q"),
    ("linear", {"x": torch.randn(4, 11)}, r"linear: packed \[P, K, L\] has shape \[2, 12, 32\], but K = 11 in x"),
    ("linear", {"x": torch.randn(12, 4).t()}, r"linear: x \[M, K\] must be contiguous but for dimension 0, .* strides \[1, 4\]"),
    ("linear", {"packed": torch.zeros(2, 12, 16)}, r"linear: packed must have panels of 32 columns, found 16"),
    ("linear", {"n": 65}, r"linear: n = 65 does not fit the 2 panels"),
    ("linear", {"n": 41}, r"linear: out has 40 columns, but n = 41"),
    ("linear", {"bias": torch.zeros(64)}, r"linear: bias \[N\] has shape \[64\], but N = 40 in out"),
    ("linear", {"packed": torch.zeros(2, 12, 32, dtype=torch.int32)}, r"must be float32 or float16 or bfloat16, not int32"),
    ("embedding", {"ids": ints(0, 1, 2)}, r"embedding: ids \[T\] must be int64, not int32"),
    ("embedding", {"ids": torch.tensor([0, 40, 1])}, r"embedding: ids\[1\] = 40, but there are 40 rows"),
    ("embedding", {"out": torch.empty(3, 13)}, r"embedding: out \[T, K\] has shape \[3, 13\], but K = 12 in packed"),
    ("pack_linear", {"weight": torch.randn(3, 4, 5)},
     r"pack_linear: weight \[N, K\] must have 2 dimensions, found shape \[3, 4, 5\]"),
    ("pack_linear", {"weight": torch.zeros(3, 4, dtype=torch.int64)}, r"pack_linear: weight .* not int64"),
    ("pack_linear", {"weight": torch.randn(4, 3).t()}, r"pack_linear: weight .* contiguous but for dimension 0"),
]


@pytest.mark.parametrize("name", good())
def test_the_arguments_that_the_others_spoil_are_good(name):
    call(name)


IDS = [f"{name}-{'-'.join(changed)}-{i}" for i, (name, changed, _) in enumerate(BAD)]


@pytest.mark.parametrize(("name", "changed", "message"), BAD, ids=IDS)
def test_a_broken_contract_is_named(name, changed, message):
    with pytest.raises(RuntimeError, match=message):
        call(name, **changed)


def test_a_dimension_of_one_may_have_any_stride():
    q = torch.randn(1, 6, 8)
    strided = torch.as_strided(torch.zeros(200), (1, 6, 8), (123, 8, 1)).copy_(q)
    results = []
    for x in (q, strided):
        results.append(torch.empty(1, 6, 8))
        arguments = good()["paged_attention"] | {
            "out": results[-1], "q": x, "rows": ints(1), "query_start": ints(0, 1), "context_len": ints(20),
            "k_cache": torch.ones(5, 16, 2, 8), "v_cache": torch.ones(5, 16, 2, 8),
        }
        ops.paged_attention(*arguments.values())
    assert torch.equal(*results)


def test_forcing_an_instruction_set():
    best = ops.isa()
    assert best in ("plain", "avx2", "avx512")
    assert torch.ops.octavo.set_isa("plain") == "plain" and ops.isa() == "plain"
    assert torch.ops.octavo.set_isa("auto") == best
    with pytest.raises(RuntimeError, match="set_isa: unknown instruction set 'avx9', expected plain, avx2, avx512 or auto"):
        torch.ops.octavo.set_isa("avx9")
    assert ops.isa() == best


def test_instruction_sets_agree_up_to_rounding():
    weight, x = torch.randn(70, 300), torch.randn(13, 300)
    results = {}
    try:
        for name in ("plain", "avx2", "avx512"):
            try:
                torch.ops.octavo.set_isa(name)
            except RuntimeError as error:
                assert f"no {name}" in str(error)
                continue
            results[name] = torch.empty(13, 70)
            ops.linear(results[name], x, ops.pack_linear(weight), None, 70)
    finally:
        torch.ops.octavo.set_isa("auto")
    for found in results.values():
        torch.testing.assert_close(found, results["plain"], atol=1e-4, rtol=0)


def test_the_library_carries_no_path_of_the_machine_that_built_it():
    assert str(ROOT).encode() not in LIBRARY.read_bytes()


def test_the_library_needs_no_python():
    """It is loaded as a plain shared library, in a process that has torch; one binary serves every Python."""
    assert b"PyInit_" not in LIBRARY.read_bytes()


def test_loading_twice_in_one_process_is_harmless():
    code = f"import torch; [torch.ops.load_library({str(LIBRARY)!r}) for _ in 'ab']; print(torch.ops.octavo.isa())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and run.stdout.strip() == ops.isa(), run.stderr
