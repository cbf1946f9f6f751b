"""The memory plan against arithmetic by hand (SmolLM2-135M, Llama-3.1-8B) and against what a decoder allocates."""

import gc
import math
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octavo import ops
from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.layers.weight import DenseWeight
from octavo.layers.workspace import Arena, Fresh, aligned
from octavo.models import registry
from octavo.models.source import ModelSource
from octavo.models.spec import LayerSpec, RopeSpec
from octavo.ops import fused_reference, reference
from octavo.ops.attention import AttentionMeta
from octavo.ops.library import GPU_NAMES
from octavo.ops.reference import PANEL
from octavo.worker.attention_sizes import attention_sizes
from octavo.worker.device import DeviceRows
from octavo.worker.logit_edits import PenaltyPool
from octavo.worker.machine import GIB, MIB, Machine
from octavo.worker.memory import plan_memory, resolve_dtype, step_bytes, weight_bytes

BF16 = torch.bfloat16
MACHINE = Machine("cpu", 16 * GIB, 12 * GIB, 16 * GIB)
GPU = Machine("cuda", 80 * GIB, 80 * GIB, 256 * GIB)
PRETENDED = "cpu:0"  # a name of the CPU that is not "cpu": layers take a GPU's paths


class PlainGpu:
    """Where DeviceRows are made, without a GPU."""

    name = PRETENDED

    def pinned(self, shape, dtype):
        return torch.zeros(shape, dtype=dtype)


@contextmanager
def new_tensors():
    """Bytes of the tensors that are made inside and still there at its end, by the address of their storage."""
    held = {}
    gc.freeze()  # what is older is not listed, and not looked at either
    try:
        yield held
        gc.collect()
        own = [t.untyped_storage() for t in gc.get_objects() if type(t) is torch.Tensor]
        held.update((storage.data_ptr(), storage.nbytes()) for storage in own)
    finally:
        gc.unfreeze()


def llama(**sizes):
    return registry.spec({"architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "hidden_act": "silu", **sizes})


SMOLLM2 = llama(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, rope_theta=100000,
)  # fmt: skip
LLAMA_8B = llama(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=False, rope_theta=500000,
)  # fmt: skip


def plan(spec=SMOLLM2, machine=MACHINE, dtype=BF16, **options):
    return plan_memory(spec, EngineConfig(model="m", **options), dtype, machine)


def rows(found):
    return {row.name: row.bytes for row in found.rows}


def test_smollm2_by_hand():
    found = plan()
    # 134,515,008 parameters, 35,136 of them in norms: those and the rotary table are float32
    assert rows(found)["weights"] == 134_479_872 * 2 + 35_136 * 4 + 8192 * 64 * 4
    assert found.block_bytes == 16 * 30 * 2 * 3 * 64 * 2 == 368_640
    assert rows(found)["activations"] == 2048 * (3 * 576 + 3 * 1536) * 4
    assert rows(found)["logits"] == 2 * 128 * 49152 * 4
    assert rows(found)["penalties"] == 64 * 49152 * 5
    # 64 sequences of 8192 tokens would be 11.25 GiB, the CPU's default is 4
    assert found.num_blocks == 4 * GIB // 368_640 == 11_650
    assert rows(found)["KV pool"] == 11_651 * 368_640
    assert (found.max_model_len, found.max_num_seqs, found.max_num_batched_tokens) == (8192, 64, 2048)
    assert found.tokens == 186_400 and found.full_sequences == 22 and found.notes == ()
    assert found.num_host_blocks == 11_650 and found.host.bytes == 11_650 * 368_640
    assert found.total == sum(rows(found).values())


def test_llama_8b_by_hand():
    found = plan(LLAMA_8B, Machine("cpu", 64 * GIB, 60 * GIB, 64 * GIB))
    assert rows(found)["weights"] == 8_029_995_008 * 2 + 266_240 * 4 + 32768 * 128 * 4
    assert found.block_bytes == 2 * MIB and found.num_blocks == 2048
    assert found.max_model_len == 32768 and found.full_sequences == 1
    assert found.notes == ("max_model_len is 32768: the model could take 131072 tokens, the KV pool holds 32768.",)


def test_llama_8b_on_a_gpu_of_80_gib():
    found = plan(LLAMA_8B, Machine("cuda", 80 * GIB, 80 * GIB, 256 * GIB), device="cuda")
    assert (found.max_num_seqs, found.max_num_batched_tokens) == (1024, 16384)
    fixed = sum(size for name, size in rows(found).items() if name != "KV pool")
    assert found.num_blocks == (int(0.9 * 80 * GIB) - fixed) // (2 * MIB) - 1
    assert rows(found)["reserve"] == GIB and found.total <= 0.9 * 80 * GIB
    assert found.max_model_len == 131072 and found.num_host_blocks == 4 * GIB // (2 * MIB)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied": True, "vocab_size": 70, "embedding_rows": 70},
        {"norm": "layer", "norm_bias": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "gated": False},
        {"positions": 66, "ropes": (), "layers": (LayerSpec(rope=None),) * 3, "embedding_dim": 16},
        {"norm_placement": "post", "final_norm": False},
        {"norm_placement": "sandwich", "qk_norm": True, "norm_offset": 1.0, "head_bias": True},
        {"parallel_residual": True, "norm": "layer"},
        {
            "ropes": (RopeSpec(rotary_dim=8), RopeSpec(base=5.0, rotary_dim=4), RopeSpec(rotary_dim=8)),
            "layers": (LayerSpec(rope=0), LayerSpec(rope=1), LayerSpec(rope=2)),
        },
    ],
)
@pytest.mark.parametrize(("dtype", "device"), [(torch.float32, "cpu"), (BF16, "cpu"), (BF16, PRETENDED)])
def test_weights_are_what_a_decoder_holds(tiny, changes, dtype, device):
    spec = tiny.spec(**changes)
    DenseWeight(1, 8, dtype, PRETENDED)  # the room for partial sums that all matrices of a GPU share is there from now on
    with new_tensors() as held:
        decoder = tiny.decoder(spec, dtype, device=device)
    assert sum(held.values()) == weight_bytes(spec, dtype, 64, PANEL if device == "cpu" else 1)
    assert decoder.spec is spec


@pytest.mark.parametrize("changes", [{}, {"gated": False}, {"intermediate": 8}, {"num_kv_heads": 4}])
def test_activations_are_the_workspace_of_a_step(tiny, changes):
    decoder, taken = tiny.decoder(tiny.spec(**changes)), []

    class Counted(Fresh):
        def take(self, shape, dtype):
            taken.append(aligned(math.prod(shape) * dtype.itemsize))
            return super().take(shape, dtype)

    empty = torch.empty(0, dtype=torch.int32)
    tokens, zero = torch.zeros(16, dtype=torch.int64), torch.tensor([0, 16], dtype=torch.int32)
    meta = AttentionMeta(empty.view(1, 0), zero[:1], zero, zero[1:], tokens - 1, 16, 16)
    s = decoder.spec
    with pytest.raises(RuntimeError, match="paged_attention"):  # it has no blocks: the buffers are all made by then
        decoder.forward(tokens, tokens, torch.zeros(s.num_layers, 2, 1, 4, s.num_kv_heads, s.head_dim), meta, Counted())
    assert sum(taken) == step_bytes(s, 16)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize(
    "changes", [{}, {"gated": False}, {"intermediate": 8}, {"num_kv_heads": 4}, {"norm_placement": "sandwich"},
                {"norm_placement": "post", "final_norm": False}, {"parallel_residual": True, "norm": "layer"}],
)  # fmt: skip
def test_the_arena_of_a_gpu_is_what_a_step_takes(tiny, monkeypatch, changes, dtype):
    for name in (*GPU_NAMES, "rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"):
        monkeypatch.setattr(ops, name, getattr(fused_reference if name in GPU_NAMES else reference, name))

    def stop(*tensors, **rest):
        raise StopIteration

    monkeypatch.setattr(ops, "paged_attention", stop)
    decoder = tiny.decoder(tiny.spec(**changes), dtype, device=PRETENDED)
    s, tokens, zero = decoder.spec, torch.zeros(21, dtype=torch.int64), torch.tensor([0, 21], dtype=torch.int32)
    meta = AttentionMeta(zero[:1].view(1, 1), zero[:1], zero, zero[1:], tokens - 1, 21, 21)
    kv = torch.zeros(s.num_layers, 2, 1, 4, s.num_kv_heads, s.head_dim, dtype=dtype)
    size = step_bytes(s, 21, dtype)
    with pytest.raises(StopIteration):  # the buffers are all made by then
        decoder.forward(tokens, tokens, kv, meta, Arena(size, PRETENDED))
    with pytest.raises(RuntimeError, match=r"the arena of .* has no room"):
        decoder.forward(tokens, tokens, kv, meta, Arena(size - 256, PRETENDED))


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_the_tables_of_a_gpu_are_what_its_rows_hold(tiny, dtype):
    """DeviceRows and the penalties' counters, but for the words around them."""
    spec = tiny.spec()
    found = plan(spec, GPU, dtype, max_num_seqs=50, max_num_batched_tokens=700, swap_space=0)
    num, budget = found.max_num_seqs, found.max_num_batched_tokens
    sizes = attention_sizes(spec, dtype, num, budget, found.max_model_len)
    with new_tensors() as held:
        device = DeviceRows(num, budget, math.ceil(found.max_model_len / 16), 16, sizes, spec.vocab_size, PlainGpu())
        penalties = PenaltyPool(num, spec.vocab_size, PRETENDED)
    pinned = device._host.nbytes + device.results.nbytes
    table = rows(found)
    assert penalties.counts.nbytes + penalties.prompt_mask.nbytes == table["penalties"]
    assert sizes.bytes == table["attention"]
    mine = sum(held.values()) - pinned - table["penalties"] - table["attention"]
    assert 0.8 * table["row tables"] < mine <= table["row tables"]


def test_what_others_have_taken_of_a_gpu_is_not_there():
    def fixed(found):
        return found.total - rows(found)["KV pool"]

    whole = plan(LLAMA_8B, Machine("cuda", 80 * GIB, 80 * GIB, 256 * GIB), device="cuda")
    shared = plan(LLAMA_8B, Machine("cuda", 80 * GIB, 70 * GIB, 256 * GIB), device="cuda")
    assert fixed(shared) == fixed(whole) and whole.num_blocks - shared.num_blocks == 10 * GIB // (2 * MIB)
    assert shared.total <= 0.9 * 80 * GIB - 10 * GIB < shared.total + shared.block_bytes
    assert "90% of 80.00 GiB of the device (10.00 GiB of them are taken already)" in shared.rows[-1].how
    assert "taken" not in whole.rows[-1].how


def test_a_small_share_is_told_as_it_is():
    with pytest.raises(ConfigError, match=r"no block: 0\.1% of 80\.00 GiB"):
        plan(LLAMA_8B, GPU, device="cuda", gpu_memory_utilization=0.001)
    assert "what is left of 92.5% of 80.00 GiB" in plan(SMOLLM2, GPU, device="cuda", gpu_memory_utilization=0.925).rows[-1].how


def test_llama_8b_on_a_gpu_by_hand():
    found = rows(plan(LLAMA_8B, GPU, device="cuda", max_num_seqs=256, max_num_batched_tokens=8192))
    # nothing is padded to panels; norms and the rotary table are float32
    assert found["weights"] == 8_029_995_008 * 2 + 266_240 * 4 + 131072 * 128 * 4
    # normed and embedded in bf16, the residual stream in float32 (twice for few tokens), and the MLP's three intermediate sizes
    assert found["activations"] == 8192 * (2 * 4096 * 2 + 4096 * 4 + 3 * 14336 * 2) + 16 * 4096 * 4
    assert found["logits"] == 2 * 256 * 128256 * 4 and found["penalties"] == 256 * 128256 * 5
    assert found["reserve"] == GIB


def test_the_cpu_default_of_the_pool_is_not_a_gpus():
    found = plan(SMOLLM2, GPU, device="cuda", max_num_seqs=2, max_model_len=1000)
    assert found.num_blocks * found.block_bytes > 60 * GIB  # more than two rows need: the rest keeps prefixes


@pytest.mark.parametrize("name", ["fp8", "fp8_e4m3"])
def test_an_8_bit_cache_takes_half(name):
    assert plan(LLAMA_8B, GPU, kv_cache_dtype=name).block_bytes == plan(LLAMA_8B, GPU).block_bytes // 2
    with pytest.raises(ConfigError, match=f"kv_cache_dtype {name} needs a GPU"):
        plan(LLAMA_8B, kv_cache_dtype=name)


@pytest.mark.parametrize(
    ("total", "free", "options", "words", "param"),
    [
        (80, 9, {}, r"the KV pool would have no block: 90% of 80\.00 GiB of the device \(71\.00 GiB of them are taken already\) "
         "leaves 0 bytes after .* for weights and workspace", "gpu_memory_utilization"),
        (16, 16, {}, r"90% of 16\.00 GiB of the device leaves 0 bytes after", "gpu_memory_utilization"),
        (80, 40, {"num_gpu_blocks_override": 15_000}, r"num_gpu_blocks_override asks for 15000 blocks \(29\.30 GiB\): with .* "
         r"that makes .*, and there are 80\.00 GiB of the device \(40\.00 GiB of them are taken already\)\.",
         "num_gpu_blocks_override"),
        (80, 80, {"kv_cache_memory_bytes": 70 * GIB}, r"kv_cache_memory_bytes asks for 35840 blocks \(70\.00 GiB\)",
         "kv_cache_memory_bytes"),
        (80, 80, {"swap_space": 200}, r"more than 70% of the host's 256\.00 GiB", "swap_space"),
        (80, 80, {"kv_cache_dtype": "float16"}, r"kv_cache_dtype float16 must be the type of the weights on a GPU \(bfloat16\)",
         "kv_cache_dtype"),
    ],
    ids=["full", "too small", "blocks", "bytes", "swap", "cache"],
)  # fmt: skip
def test_a_gpu_that_is_full_or_too_small_is_an_error_with_numbers(total, free, options, words, param):
    with pytest.raises(ConfigError, match=words) as caught:
        plan(LLAMA_8B, Machine("cuda", total * GIB, free * GIB, 256 * GIB), device="cuda", max_num_seqs=256, **options)
    assert caught.value.param == param


def test_the_pool_follows_the_first_rule_that_applies():
    assert plan(num_gpu_blocks_override=100, kv_cache_memory_bytes=GIB).num_blocks == 100
    assert plan(kv_cache_memory_bytes=1_000_000_000, max_model_len=2000).num_blocks == 1_000_000_000 // 368_640
    few = plan(max_num_seqs=2, max_model_len=1000)  # all that they need: 63 blocks each
    assert few.num_blocks == 126 and few.full_sequences == 2
    tight = plan(machine=Machine("cpu", 4 * GIB, 2 * GIB, 4 * GIB))
    fixed = sum(size for name, size in rows(tight).items() if name != "KV pool")
    assert tight.num_blocks == (int(0.9 * 2 * GIB) - fixed) // 368_640 - 1
    assert tight.total <= 0.9 * 2 * GIB
    assert plan(gpu_memory_utilization=0.2).num_blocks < plan(gpu_memory_utilization=0.3).num_blocks < 11_650


@pytest.mark.parametrize(
    ("options", "words", "param"),
    [
        ({"max_model_len": 8193}, "max_model_len 8193 is more than the 8192 positions", "max_model_len"),
        (
            {"max_model_len": 4096, "num_gpu_blocks_override": 255},
            "max_model_len 4096 does not fit the KV pool: 255 blocks of 16 hold 4080 tokens .*90.00 MiB are needed",
            "max_model_len",
        ),
        ({"kv_cache_memory_bytes": 368_639}, "kv_cache_memory_bytes 368639 holds no block", "kv_cache_memory_bytes"),
        (
            {"gpu_memory_utilization": 0.01},
            "the KV pool would have no block: 1% of 12.00 GiB available leaves 0 bytes after",
            "gpu_memory_utilization",
        ),
        ({"num_gpu_blocks_override": 40_000}, "override asks for 40000 blocks", "num_gpu_blocks_override"),
        ({"kv_cache_memory_bytes": 13 * GIB}, "kv_cache_memory_bytes asks for 37865 blocks", "kv_cache_memory_bytes"),
        ({"swap_space": 11.5}, "swap_space 11.5 GiB is more than 70% of the host's 16.00 GiB", "swap_space"),
        (
            {"enable_chunked_prefill": False, "max_num_batched_tokens": 4096},
            r"max_num_batched_tokens \(4096\) must be at least max_model_len \(8192\)",
            "max_num_batched_tokens",
        ),
    ],
)
def test_what_does_not_fit_is_an_error_with_numbers(options, words, param):
    with pytest.raises(ConfigError, match=words) as caught:
        plan(**options)
    assert caught.value.param == param


def test_the_model_length_is_fitted_to_the_pool_only_when_nobody_asked():
    found = plan(num_gpu_blocks_override=100)
    assert found.max_model_len == 1600 and "the KV pool holds 1600" in found.notes[0]
    assert plan(num_gpu_blocks_override=100, max_model_len=1600).notes == ()


def test_limits_have_defaults_that_agree_with_each_other():
    def limits(**options):
        found = plan(**options)
        return found.max_num_seqs, found.max_num_batched_tokens

    assert limits() == (64, 2048)
    assert limits(max_num_seqs=3000) == (3000, 3000)
    assert limits(max_num_batched_tokens=16) == (16, 16)
    assert limits(enable_chunked_prefill=False) == (64, 8192)
    assert limits(enable_chunked_prefill=False, max_model_len=100) == (64, 2048)


def test_the_host_pool_is_capped():
    assert plan(swap_space=1).num_host_blocks == GIB // 368_640
    assert plan(swap_space=0).num_host_blocks == 0
    assert plan(num_gpu_blocks_override=10).num_host_blocks == 20
    small = plan(machine=Machine("cpu", 4 * GIB, 3 * GIB, 4 * GIB), kv_cache_memory_bytes=GIB)  # 4 GiB is the default
    assert small.num_host_blocks * small.block_bytes <= 0.9 * 3 * GIB - small.total
    assert small.num_host_blocks > 1000


def test_what_windows_waste():
    spec = replace(SMOLLM2, layers=(LayerSpec(window=1024),) * 20 + (LayerSpec(),) * 10)
    found = plan(spec)
    assert found.window_waste == 20 * (8192 - 1024) * 2 * 3 * 64 * 2
    assert plan().window_waste == 0


@pytest.mark.parametrize(
    ("kind", "config", "option", "device", "expected"),
    [
        ("folder", {"torch_dtype": "bfloat16"}, "auto", "auto", BF16),
        ("folder", {"dtype": "float16"}, "auto", "cpu", BF16),
        ("folder", {"dtype": "float16"}, "auto", "cuda", torch.float16),
        ("folder", {"dtype": "float16"}, "half", "cpu", torch.float16),
        ("folder", {"torch_dtype": "float32"}, "auto", "auto", torch.float32),
        ("folder", {}, "auto", "auto", torch.float32),
        ("folder", {"torch_dtype": "bfloat16"}, "float32", "auto", torch.float32),
        ("folder", {"torch_dtype": "float32"}, "bfloat16", "auto", BF16),
        ("gguf", {}, "auto", "auto", BF16),
        ("gguf", {"torch_dtype": "float16"}, "auto", "auto", BF16),
        ("gguf", {"torch_dtype": "float32"}, "auto", "auto", torch.float32),
        ("gguf", {}, "float", "auto", torch.float32),
    ],
)
def test_dtype(kind, config, option, device, expected):
    source = ModelSource(kind, Path("."), config)
    assert resolve_dtype(EngineConfig(model="m", dtype=option, device=device), source) == expected


def test_an_unknown_dtype_of_a_checkpoint_is_named():
    with pytest.raises(ConfigError, match="'float8_e4m3fn' is not supported"):
        resolve_dtype(EngineConfig(model="m"), ModelSource("folder", Path("."), {"torch_dtype": "float8_e4m3fn"}))
