"""The memory plan against arithmetic by hand (SmolLM2-135M, Llama-3.1-8B) and against what a decoder allocates."""

import gc
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.layers.workspace import Fresh, aligned
from octavo.models import registry
from octavo.models.source import ModelSource
from octavo.models.spec import LayerSpec, RopeSpec
from octavo.ops.attention import AttentionMeta
from octavo.worker import machine
from octavo.worker.machine import GIB, MIB, Machine
from octavo.worker.memory import plan_memory, resolve_dtype, step_bytes, weight_bytes

BF16 = torch.bfloat16
MACHINE = Machine("cpu", 16 * GIB, 12 * GIB, 16 * GIB)


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
@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_weights_are_what_a_decoder_holds(tiny, changes, dtype):
    spec = tiny.spec(**changes)
    gc.collect()
    before = [t for t in gc.get_objects() if type(t) is torch.Tensor]  # kept alive: ids of the dead come again
    known = {id(t) for t in before}
    decoder = tiny.decoder(spec, dtype)
    gc.collect()
    own = [t for t in gc.get_objects() if type(t) is torch.Tensor and id(t) not in known]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own}
    assert sum(held.values()) == weight_bytes(spec, dtype, 64)
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


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUPS", ((tmp_path, "max", "current", "inactive_file"),))
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "current").write_text("300000000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100000000\n")
    whole = machine.machine_memory()
    (tmp_path / "max").write_text("1000000000\n")
    boxed = machine.machine_memory()
    assert whole.total > boxed.total == boxed.host_total == 1_000_000_000 and boxed.available <= 800_000_000
