"""What a user sees is a frozen list: public names, commands, flags, options, sampling parameters, outputs.

A change here is a decision, not an accident: the list changes in the same commit as the code, and the changelog says
so.
"""

import argparse
import dataclasses
import importlib
import tomllib
from pathlib import Path

import octavo
from octavo.cli import build_parser
from octavo.config import ENVIRONMENT, EngineConfig
from octavo.outputs import CompletionOutput, Logprob, RequestOutput
from octavo.params import SamplingParams
from octavo.server.config import ServerConfig

ROOT = Path(__file__).resolve().parents[1]

NAMES = """
LLM AsyncEngineArgs AsyncLLMEngine CompletionOutput EngineArgs EngineConfig LLMEngine RequestOutput SamplingParams
StructuredOutputsParams __version__
"""

OPTIONS = """
model tokenizer skip_tokenizer_init revision download_dir trust_remote_code hf_overrides load_format dtype
kv_cache_dtype quantization device seed max_model_len block_size gpu_memory_utilization kv_cache_memory_bytes
num_gpu_blocks_override swap_space enable_prefix_caching max_num_seqs max_num_batched_tokens enable_chunked_prefill
long_prefill_token_threshold scheduling_policy preemption_mode async_scheduling enforce_eager batch_invariant
tensor_parallel_size pipeline_parallel_size generation_config override_generation_config chat_template max_logprobs
logprobs_mode disable_log_stats debug_checksums
"""

SAMPLING = """
n best_of presence_penalty frequency_penalty repetition_penalty temperature top_p top_k min_p seed stop stop_token_ids
ignore_eos include_stop_str_in_output max_tokens min_tokens logprobs prompt_logprobs detokenize skip_special_tokens
spaces_between_special_tokens logit_bias allowed_token_ids bad_words logits_processors use_beam_search length_penalty
early_stopping structured_outputs
"""

SAMPLING_FLAGS = """
--n --best-of --presence-penalty --frequency-penalty --repetition-penalty --temperature --top-p --top-k --min-p
--sampling-seed --stop --stop-token-ids --ignore-eos --include-stop-str-in-output --max-tokens --min-tokens --logprobs
--prompt-logprobs --detokenize --skip-special-tokens --spaces-between-special-tokens --logit-bias --allowed-token-ids
--bad-words --use-beam-search --length-penalty --early-stopping --structured-outputs
"""
NOT_IN_CHAT = """
--n --best-of --logprobs --prompt-logprobs --detokenize --use-beam-search --length-penalty --early-stopping
"""

SERVER = """
host port uds root_path ssl_keyfile ssl_certfile ssl_ca_certs api_key api_key_file metrics_auth allowed_origins
allowed_methods allowed_headers allow_credentials enable_request_id_headers served_model_name api_server_count
chat_template_content_format trust_request_chat_template enable_auto_tool_choice tool_call_parser reasoning_parser
enable_prompt_tokens_details enable_force_include_usage enable_log_requests max_log_len uvicorn_log_level
disable_uvicorn_access_log metrics_compat otlp_traces_endpoint request_timeout queue_timeout shutdown_timeout
step_timeout keep_alive header_timeout body_timeout send_timeout max_connections max_queued_requests
max_queued_tokens max_held_bytes max_body_bytes max_header_bytes max_headers max_json_depth max_stream_buffer max_n max_prompts
max_sequences max_logprob_entries max_stop max_stop_chars max_logit_bias
max_schema_bytes max_schema_depth max_regex_bytes max_grammar_cache_bytes
"""

# command -> its own positionals and flags, beside those of EngineConfig and SamplingParams
COMMANDS = {
    "serve": "model --model",
    "generate": "model --prompt --input --input-format --json",
    "chat": "model --system-prompt --url --model-name --api-key -q",
    "complete": "--url --model-name --api-key -q",
    "run-batch": "-i -o --model --url --api-key --max-concurrency --disable-tqdm --served-model-name "
    "--chat-template-content-format --enable-auto-tool-choice --tool-call-parser --reasoning-parser",
    "plan": "model --device-memory",
    "bench latency": "--model --input-len --output-len --batch-size --num-iters-warmup --num-iters",
    "bench throughput": "--model --num-prompts --input-len --output-len --lengths --temperature",
    "bench serve": "--backend --base-url --host --port --endpoint --model --served-model-name --api-key --header "
    "--dataset-name --dataset-path --lengths --num-prompts --random-input-len --random-output-len --random-range-ratio "
    "--random-prefix-len --prefix-repetition-num-prefixes --prefix-repetition-prefix-len --prefix-repetition-suffix-len "
    "--prefix-repetition-output-len --sharegpt-output-len --custom-output-len --request-rate --burstiness "
    "--max-concurrency --ramp-up-strategy --ramp-up-start-rps --ramp-up-end-rps --ignore-eos --num-warmups --temperature "
    "--top-p --top-k --min-p --frequency-penalty --presence-penalty --repetition-penalty --extra-body --goodput "
    "--percentile-metrics --metric-percentiles --seed --tokenizer --save-result --save-detailed --result-dir "
    "--result-filename --metadata --plot --disable-tqdm",
    "info": "",
}


def leaves(parser: argparse.ArgumentParser, path: str = "") -> dict[str, argparse.ArgumentParser]:
    """The commands that can be run, by their words."""
    nested = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not nested:
        return {path: parser}
    found: dict[str, argparse.ArgumentParser] = {}
    for word, sub in nested[0].choices.items():
        found |= leaves(sub, f"{path} {word}".strip())
    return found


def flags(parser: argparse.ArgumentParser) -> set[str]:
    """First spelling of each flag, and the names of positionals; --help left out."""
    return {(a.option_strings or [a.dest])[0] for a in parser._actions} - {"-h"}


def test_public_names() -> None:
    assert set(octavo.__all__) == set(NAMES.split())


def test_public_names_are_where_they_say() -> None:
    for name, module in octavo._HOME.items():
        if module != "octavo.llm":  # that one loads the engine; the end-to-end tests use it
            assert getattr(octavo, name) is getattr(importlib.import_module(module), name)
    assert set(octavo._HOME) == set(octavo.__all__) - {"__version__"} and set(octavo.__all__) <= set(dir(octavo))


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    assert not hasattr(octavo, "AsyncEngine")


def test_options() -> None:
    assert [f.name for f in dataclasses.fields(EngineConfig)] == OPTIONS.split()


def test_options_of_the_server() -> None:
    assert [f.name for f in dataclasses.fields(ServerConfig)] == SERVER.split()


def test_sampling_parameters() -> None:
    assert [f.name for f in dataclasses.fields(SamplingParams)] == SAMPLING.split()


def test_outputs() -> None:
    kinds = (RequestOutput, CompletionOutput, Logprob)
    names = {kind: " ".join(f.name for f in dataclasses.fields(kind)) for kind in kinds}
    assert names == {
        RequestOutput: "request_id prompt prompt_token_ids prompt_logprobs outputs finished num_cached_tokens error",
        CompletionOutput: "index text token_ids cumulative_logprob logprobs finish_reason stop_reason",
        Logprob: "logprob rank decoded_token",
    }


def test_environment() -> None:
    assert set(ENVIRONMENT) == {"OCTAVO_API_KEY", "OCTAVO_CACHE", "OCTAVO_CUDA_ARCHS", "OCTAVO_LOGGING_LEVEL"}


def test_flags_of_every_command() -> None:
    engine = {"--" + name.replace("_", "-") for name in OPTIONS.split()} - {"--model"}
    sampling = set(SAMPLING_FLAGS.split())
    talking = sampling - set(NOT_IN_CHAT.split())
    server = {"--" + name.replace("_", "-") for name in SERVER.split()}
    extra = {"info": set(), "generate": engine | sampling, "chat": engine | talking, "complete": talking,
             "bench serve": set(), "serve": engine | server}
    found = {name: flags(parser) for name, parser in leaves(build_parser()).items()}
    assert found == {name: set(own.split()) | extra.get(name, engine) for name, own in COMMANDS.items()}


def test_every_sampling_parameter_has_a_flag() -> None:
    """All but logits_processors, which are Python functions."""
    spelt = SAMPLING_FLAGS.replace("--sampling-seed", "--seed").replace("-", "_").split()
    assert {flag.removeprefix("__") for flag in spelt} == set(SAMPLING.split()) - {"logits_processors"}


def test_the_version_is_the_package_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert octavo.__version__ == project["version"]
