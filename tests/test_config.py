"""EngineConfig: ranges, types, refusals by name, and flags that mean the same as keyword arguments."""

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from octavo.absent import REFUSED as ABSENT
from octavo.config import EngineArgs, EngineConfig, human_int, json_object, nearest, unknown_environment
from octavo.errors import ConfigError

BAD: list[tuple[str, Any]] = [
    ("model", ""), ("model", 3), ("model", None),
    ("tokenizer", 1), ("skip_tokenizer_init", 1), ("skip_tokenizer_init", "yes"),
    ("hf_overrides", [1]), ("hf_overrides", "x"),
    ("load_format", "bitsandbytes"), ("dtype", "int8"), ("dtype", None), ("kv_cache_dtype", "int8"), ("device", "tpu"),
    ("seed", -1), ("seed", 2**64), ("seed", 1.5), ("seed", True),
    ("max_model_len", 0), ("max_model_len", -5), ("max_model_len", 1.0), ("max_model_len", float("nan")),
    ("block_size", 0), ("block_size", 12), ("block_size", 256), ("block_size", "16"),
    ("gpu_memory_utilization", 0.0), ("gpu_memory_utilization", 1.01), ("gpu_memory_utilization", float("nan")),
    ("gpu_memory_utilization", float("inf")), ("gpu_memory_utilization", True), ("gpu_memory_utilization", "0.9"),
    ("kv_cache_memory_bytes", 0), ("num_gpu_blocks_override", 0),
    ("swap_space", -1), ("swap_space", float("inf")), ("swap_space", float("nan")), ("swap_space", 2.0**20),
    ("enable_prefix_caching", None), ("enable_prefix_caching", 0),
    ("max_num_seqs", 0), ("max_num_batched_tokens", 0), ("long_prefill_token_threshold", -1), ("max_logprobs", -1),
    ("scheduling_policy", "lifo"), ("preemption_mode", "never"), ("logprobs_mode", "raw"),
    ("generation_config", "transformers"),
    ("async_scheduling", "on"), ("tensor_parallel_size", 0), ("pipeline_parallel_size", 0),
]
REFUSED: list[tuple[str, Any]] = [
    ("trust_remote_code", True), ("quantization", "awq"), ("tensor_parallel_size", 2), ("pipeline_parallel_size", 2),
]


def make(**values: Any) -> EngineConfig:
    return EngineConfig(**{"model": "m", **values})


@pytest.mark.parametrize(("name", "value"), BAD + REFUSED)
def test_a_bad_value_is_an_error_that_names_option_and_value(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        make(**{name: value})
    assert caught.value.param == name
    assert name in str(caught.value)
    if value not in ("", True):  # an empty string has nothing to show; trust_remote_code=True says it by the name alone
        assert str(value) in str(caught.value)


@pytest.mark.parametrize(("name", "values"), [
    ("block_size", (8, 16, 32, 64, 128)), ("seed", (0, 2**64 - 1)), ("gpu_memory_utilization", (0.01, 1, 1.0)),
    ("swap_space", (0, 0.5, 4)), ("max_model_len", (1, None)), ("dtype", ("half", "float", "bfloat16")),
    ("async_scheduling", (None, True, False)), ("max_logprobs", (0, 20)),
])
def test_good_values_are_kept(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        assert getattr(make(**{name: value}), name) == value


def test_every_option_has_help() -> None:
    assert not [f.name for f in dataclasses.fields(EngineConfig) if not f.metadata["help"]]


def test_there_are_at_most_60_options() -> None:
    assert len(dataclasses.fields(EngineConfig)) <= 60


def test_an_unknown_keyword_names_itself_and_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'max_model_length' \(did you mean max_model_len\?\)") as caught:
        EngineConfig.from_kwargs(model="m", max_model_length=5)
    assert caught.value.param == "max_model_length"


@pytest.mark.parametrize(("name", "words"), [
    ("enable_lora", "LoRA adapters do not exist in Octavo yet; serve merged weights"),
    ("speculative_config", "speculative decoding does not exist in Octavo yet"),  # and not: did you mean generation_config?
    ("max_seq_len_to_capture", "CUDA graphs are captured for all sizes at start; enforce_eager switches them off"),
    ("rope_theta", "hf_overrides.rope_theta replaces the entry of config.json"),
])
def test_a_keyword_of_vllm_s_is_refused_with_what_stands_in_its_place(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig.from_kwargs(model="m", **{name: 1})
    assert str(caught.value) == f"{name} is an option of vLLM that Octavo does not have: {words}."
    assert caught.value.param == name


def test_no_option_is_called_absent() -> None:
    assert not {"--" + f.name.replace("_", "-") for f in dataclasses.fields(EngineConfig)} & set(ABSENT)


def test_what_vllm_s_callers_pass_is_taken() -> None:
    assert EngineConfig.from_kwargs(model="m", dtype=torch.bfloat16, seed=None) == make(dtype="bfloat16", seed=0)
    assert make(generation_config="vllm").generation_config == "vllm"
    with pytest.raises(ConfigError, match=r"dtype must be one of .*, got 'int8'"):
        EngineConfig.from_kwargs(model="m", dtype=torch.int8)
    with pytest.raises(ConfigError, match="dtype must be of type str, got None"):
        EngineConfig.from_kwargs(model="m", dtype=None)


def test_the_budget_must_hold_a_token_of_every_sequence() -> None:
    with pytest.raises(ConfigError, match=r"max_num_batched_tokens \(8\) must be at least max_num_seqs \(16\)"):
        make(max_num_seqs=16, max_num_batched_tokens=8)


def test_it_is_frozen_and_replace_checks_again() -> None:
    config = make()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 3  # type: ignore[misc]
    assert config.replace(seed=3).seed == 3
    with pytest.raises(ConfigError):
        config.replace(seed=-3)


def test_engine_args_is_the_same_class() -> None:
    assert EngineArgs is EngineConfig


def parse(*words: str) -> EngineConfig:
    parser = EngineConfig.add_cli_args(argparse.ArgumentParser(), model="positional")
    return EngineConfig.from_cli_args(parser.parse_args(words))


def test_no_flags_are_the_defaults() -> None:
    assert parse("m") == make()


def test_every_flag_sets_its_field() -> None:
    config = parse(
        "m", "--max-model-len", "32k", "--swap-space", "1.5", "--no-enable-prefix-caching", "--enforce-eager",
        "--hf-overrides", '{"rope_theta": 1e6}', "--block-size", "32", "--no-async-scheduling", "-tp", "1",
        "--chat-template", "t", "--dtype", "float32", "--seed", "9",
    )
    wanted = make(max_model_len=32000, swap_space=1.5, enable_prefix_caching=False, enforce_eager=True,
                  hf_overrides={"rope_theta": 1e6}, block_size=32, async_scheduling=False, chat_template="t",
                  dtype="float32", seed=9)
    assert config == wanted


@pytest.mark.parametrize(("text", "value"), [
    ("4096", 4096), ("32k", 32000), ("32K", 32768), ("1.5k", 1500), ("2m", 2 * 10**6), ("2M", 2**21),
    ("80G", 80 * 2**30),
])
def test_human_int(text: str, value: int) -> None:
    assert human_int(text) == value


@pytest.mark.parametrize("text", ["", "k", "x", "1.5", "3kk", "nan", "1e3", "nank", "infk", "auto"])
def test_human_int_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=f"must be a whole number, .* got '{text}'"):
        human_int(text)


@pytest.mark.parametrize("text", ["", "x", "[1]", "3", "null", '{"a": }', "[" * 100_000])
def test_json_object_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be a JSON object such as .*, got ") as caught:
        json_object(text)
    assert len(str(caught.value)) < 300


def test_a_value_that_no_flag_takes_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--max-model-len", "auto"], ["--hf-overrides", "rope"]):
        with pytest.raises(SystemExit):
            parse("m", *words)
        assert f"argument {words[0]}: must be a " in capsys.readouterr().err


def test_nearest() -> None:
    assert nearest("sede", {"seed", "model"}) == " (did you mean seed?)"
    assert nearest("zzz", {"seed", "model"}) == ""


def test_unknown_environment() -> None:
    assert unknown_environment({"OCTAVO_CACHE": "x", "OCTAVO_CASHE": "y", "PATH": "z"}) == ["OCTAVO_CASHE"]


def test_the_page_of_options_is_up_to_date() -> None:
    root = Path(__file__).resolve().parents[1]
    done = subprocess.run([sys.executable, "docs/generate_config.py", "--check"], capture_output=True, text=True,
                          cwd=root, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == 0, done.stderr
