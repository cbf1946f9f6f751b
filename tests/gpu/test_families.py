"""Every family on the GPU against the same checkpoint on the CPU, which tests/models proves against transformers.

Prompt logprobs show the logits at every position of a prompt, greedy continuations those of decoding through the cache; head
sizes are all that the kernels know, with every norm, position, window, cap and projection that a family has.
"""

import random
from pathlib import Path
from typing import Any

import pytest
from support import DEVICE, Answer, Asked, ask, assert_near, make_checkpoint

from octavo import SamplingParams

BASE = {
    "vocab_size": 320, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2,
}
FULL, SLIDING = "full_attention", "sliding_attention"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 500000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e6}
GEMMA = {"num_hidden_layers": 4, "sliding_window": 17, "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 64}


def family(architecture: str, model_type: str, **changes: Any) -> dict[str, Any]:
    """A config.json."""
    return {"architectures": [architecture], "model_type": model_type, **BASE, **changes}


FAMILIES: dict[str, dict[str, Any]] = {
    "llama, 64": family("LlamaForCausalLM", "llama", head_dim=64, rope_parameters=LLAMA3),
    "llama, 128, group of 8, tied": family(
        "LlamaForCausalLM", "llama", head_dim=128, num_attention_heads=8, num_key_value_heads=1, tie_word_embeddings=True),
    "llama, 96, biases": family(
        "LlamaForCausalLM", "llama", head_dim=96, attention_bias=True, mlp_bias=True, num_key_value_heads=4, vocab_size=331),
    "smollm2, 64, nine heads": family(
        "LlamaForCausalLM", "llama", hidden_size=576, num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
        intermediate_size=384, num_hidden_layers=2),
    "mistral, 128, window": family("MistralForCausalLM", "mistral", head_dim=128, sliding_window=19),
    "qwen2, 64": family("Qwen2ForCausalLM", "qwen2", hidden_size=256, tie_word_embeddings=True),
    "qwen2, 80, upper windows": family(
        "Qwen2ForCausalLM", "qwen2", hidden_size=320, use_sliding_window=True, sliding_window=21, max_window_layers=1),
    "qwen3, 128, yarn": family("Qwen3ForCausalLM", "qwen3", head_dim=128, rope_parameters=YARN, tie_word_embeddings=True),
    "qwen3, 192, group of 6": family(
        "Qwen3ForCausalLM", "qwen3", head_dim=192, num_attention_heads=6, num_key_value_heads=1, num_hidden_layers=2),
    "gemma2, 256": family(
        "Gemma2ForCausalLM", "gemma2", head_dim=256, attn_logit_softcapping=5.0, final_logit_softcapping=8.0, **GEMMA),
    "gemma3, 256": family(
        "Gemma3ForCausalLM", "gemma3_text", head_dim=256, layer_types=[SLIDING, FULL, SLIDING, FULL], rope_parameters={
            FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4}}, **GEMMA),
    "phi3, 96, window": family(
        "Phi3ForCausalLM", "phi3", hidden_size=384, sliding_window=23, pad_token_id=0, original_max_position_embeddings=256),
    "smollm3, 64": family(
        "SmolLM3ForCausalLM", "smollm3", hidden_size=256, no_rope_layers=[1, 0, 1], num_key_value_heads=4, pad_token_id=0),
    "gpt2, 64, odd vocabulary": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 331, "n_embd": 192, "n_layer": 3, "n_head": 3,
        "n_positions": 256, "bos_token_id": 1, "eos_token_id": 2},
    "gpt2, 112": {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 320, "n_embd": 224, "n_layer": 2, "n_head": 2,
        "n_positions": 256, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False},
    "neox, 64, a quarter rotated": family(
        "GPTNeoXForCausalLM", "gpt_neox", hidden_size=256, rotary_pct=0.25, rotary_emb_base=10000, layer_norm_eps=1e-5),
    "neox, 80, sequential": family(
        "GPTNeoXForCausalLM", "gpt_neox", hidden_size=320, use_parallel_residual=False, rotary_pct=0.5, num_hidden_layers=2),
    "opt, 64": {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": 320, "hidden_size": 256, "ffn_dim": 320,
        "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256, "word_embed_proj_dim": 256,
        "bos_token_id": 1, "eos_token_id": 2},
    "opt, 64, norms behind": {
        "architectures": ["OPTForCausalLM"], "model_type": "opt", "vocab_size": 320, "hidden_size": 256, "ffn_dim": 320,
        "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 256, "word_embed_proj_dim": 128,
        "do_layer_norm_before": False, "bos_token_id": 1, "eos_token_id": 2},
}


# What bf16 activations may cost, in nat: the mean difference of the eight highest logprobs between transformers in bf16 and in
# float32 with the same rounded weights, on these checkpoints. The largest of some hundred differences was 3.5 to 9 times that.
ROUNDING = {
    "llama, 64": 0.031, "llama, 128, group of 8, tied": 0.051, "llama, 96, biases": 0.034, "smollm2, 64, nine heads": 0.036,
    "mistral, 128, window": 0.037, "qwen2, 64": 0.041, "qwen2, 80, upper windows": 0.053, "qwen3, 128, yarn": 0.039,
    "qwen3, 192, group of 6": 0.023, "gemma2, 256": 0.018, "gemma3, 256": 0.030, "phi3, 96, window": 0.041, "smollm3, 64": 0.054,
    "gpt2, 64, odd vocabulary": 0.013, "gpt2, 112": 0.012, "neox, 64, a quarter rotated": 0.015, "neox, 80, sequential": 0.020,
    "opt, 64": 0.015, "opt, 64, norms behind": 0.017,
}


def bf16(name: str) -> dict[str, float]:
    """Bounds for a checkpoint of FAMILIES. A window that is one token too long or too short moves the mean by 0.1 and more."""
    return {"largest": 15 * ROUNDING[name], "mean": 1.4 * ROUNDING[name], "tie": 15 * ROUNDING[name], "parted": 0.75}


def requests(vocab: int) -> Asked:
    """Prompts of 1, 9, 45 and 100 tokens, every position scored, then 24 greedy tokens."""
    rng = random.Random(vocab)
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=8, prompt_logprobs=8, detokenize=False)
    return [([rng.randrange(3, vocab) for _ in range(length)], params) for length in (1, 9, 45, 100)]


def both(config: dict[str, Any], folder: Path, dtype: str, **options: Any) -> tuple[list[Answer], list[Answer]]:
    """Answers of the device and of the CPU."""
    make_checkpoint(folder, config)
    asked = requests(config["vocab_size"])
    small: dict[str, Any] = {"dtype": dtype, "max_num_seqs": 4, "num_gpu_blocks_override": 80, "max_model_len": 128}
    ours = ask(folder, asked, **small, **options)
    return ours, ask(folder, asked, **small, device="cpu")


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_is_the_cpus_answer(name: str, tmp_path: Path) -> None:
    """Sums in another order, and exponentials good to some units of the last place: 1e-3 nat is a hundred times that."""
    ours, theirs = both(FAMILIES[name], tmp_path, "float32", enforce_eager=True, max_num_batched_tokens=64)
    assert_near(ours, theirs, largest=1e-3, mean=1e-4, tie=2e-3, parted=0.25)


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_is_within_rounding(name: str, tmp_path: Path) -> None:
    """The CPU computes in float32 from the same bf16 weights; a GPU rounds activations to bf16 as well."""
    ours, theirs = both(FAMILIES[name], tmp_path, "bfloat16")
    assert_near(ours, theirs, **bf16(name))


@pytest.mark.parametrize("name", ["llama, 64", "gpt2, 64, odd vocabulary"])
def test_float16_is_within_rounding(name: str, tmp_path: Path) -> None:
    """Three more bits than bf16. A CPU has no float16 of its own: the reference are the weights before they were rounded."""
    make_checkpoint(tmp_path, FAMILIES[name])
    asked = requests(FAMILIES[name]["vocab_size"])
    small: dict[str, Any] = {"max_num_seqs": 4, "num_gpu_blocks_override": 80, "max_model_len": 128}
    ours = ask(tmp_path, asked, **small, dtype="float16")
    assert_near(ours, ask(tmp_path, asked, **small, dtype="float32", device="cpu"), largest=0.06, mean=0.008, tie=0.06,
                parted=0.75)


@pytest.mark.parametrize("block_size", [8, 32, 64, 128])
def test_blocks_of_every_size(block_size: int, tmp_path: Path) -> None:
    """How the cache is laid out is nobody's business but its own."""
    make_checkpoint(tmp_path, FAMILIES["llama, 64"])
    asked = requests(320)
    small: dict[str, Any] = {"max_num_seqs": 4, "num_gpu_blocks_override": 80, "max_model_len": 128, "dtype": "bfloat16"}
    assert_near(ask(tmp_path, asked, **small, block_size=block_size), ask(tmp_path, asked, **small, device="cpu"),
                **bf16("llama, 64"))


def test_the_device_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    """Or all of the above would have compared the CPU with itself."""
    make_checkpoint(tmp_path, FAMILIES["llama, 64"])
    ask(tmp_path, requests(320)[:1], check=lambda llm: _expect(llm.llm_engine.group.info.device))


def _expect(device: str) -> None:
    assert device == DEVICE
