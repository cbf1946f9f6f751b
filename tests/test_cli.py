"""The octavo command: parsing habits, exit codes, and endings without a traceback."""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import octavo
from octavo import ops
from octavo.cli import FlagParser, build_parser, dashed, main
from octavo.commands import info
from octavo.errors import CapacityError, ConfigError, EngineDead, ModelError, OctavoError, RequestError

CONFIG = Path(__file__).resolve().parents[1] / "benchmarks" / "models" / "qwen3-0.6b"


def usage(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The message of a command line that is wrong."""
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_dashes_and_underscores_are_equal_in_flags_only() -> None:
    assert dashed(["--max_tokens", "5", "--top_p=a_b", "some_file", "--", "--x_y"]) == [
        "--max-tokens", "5", "--top-p=a_b", "some_file", "--", "--x_y"]
    args = build_parser().parse_args(["generate", "m", "--max_tokens", "5", "--prompt", "a_b --c_d"])
    assert (args.sampling_max_tokens, args.prompt) == (5, ["a_b --c_d"])


def test_a_flag_is_never_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown flag --max-tok (did you mean --max-tokens?)" in usage(capsys, "generate", "m", "--max-tok", "5")


@pytest.mark.parametrize(("words", "message"), [
    (("generate", "m", "--temprature", "1"), "unknown flag --temprature (did you mean --temperature?)"),
    (("generate", "--temprature=1"), "unknown flag --temprature (did you mean --temperature?)"),
    (("generate", "m", "--zzzzz"), "unknown flag --zzzzz\n"),
    (("--versoin",), "unknown flag --versoin (did you mean --version?)"),
    (("bench", "latency", "--modle", "m"), "unknown flag --modle (did you mean --model?)"),
    (("bench", "latency"), "required: --model"),
    (("generate",), "required: model"),
    (("generate", "m", "--enable-lora"), "--enable-lora is a flag of vLLM that Octavo does not have: LoRA"),
    (("chat", "m", "--lora-modules", "a=b"), "--lora-modules is a flag of vLLM that Octavo does not have: LoRA"),
    (("plan", "m", "--speculative-config", "{}"), "that Octavo does not have: speculative decoding"),
    (("bench", "latency", "--model", "m", "--num-speculative-tokens", "3"), "--num-speculative-tokens is a flag of vLLM"),
    (("bench", "throughput", "--model", "m", "-ep"), "-ep is a flag of vLLM that Octavo does not have: mixtures of experts"),
    (("run-batch", "-i", "a", "-o", "b", "--model", "m", "--enable_lora"), "--enable-lora is a flag of vLLM"),
    (("serve", "m", "--speculative_model=n"), "--speculative-model is a flag of vLLM"),
    (("generate", "m", "--compilation-config.level", "3"), "octavo: error: --compilation-config is a flag of vLLM"),
    (("serve", "m", "--compilation-config.level=3"), "octavo: error: --compilation-config is a flag of vLLM"),
    (("serve", "m", "-O3"), "octavo: error: -O is a flag of vLLM"),
    (("serve", "m", "-q", "awq"), "octavo: error: -q is a flag of vLLM that Octavo does not have: --quantization"),
    (("generate", "m", "extra"), "unexpected argument 'extra'"),
    (("generate", "m", "-x"), "unexpected argument '-x'"),
    (("generat", "m"), "generat"),
    (("generate", "m", "--max-tokens", "many"), "--max-tokens: must be a whole number"),
    (("generate", "m", "--logit-bias", "5"), "--logit-bias: must be a JSON object"),
    (("generate", "m", "--logit-bias", '{"a": 1}'), "--logit-bias: must have token ids as keys"),
    (("generate", "m", "--structured-outputs", "[1]"), "--structured-outputs: must be a JSON object"),
    (("bench", "serve", "--extra-body", "a"), "--extra-body: must be a JSON object"),
    (("generate", "m", "--block-size", "12"), "--block-size"),
    (("generate", "m", "--prompt"), "--prompt"),
])
def test_wrong_usage_is_two_lines_and_exit_code_2(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = usage(capsys, *words)
    assert error.startswith("octavo: error: ") and message in error
    assert error.count("\n") == 2 and error.splitlines()[1].startswith("See: octavo") and error.endswith("--help\n")


def test_no_flag_of_ours_is_called_a_flag_of_vllm_s() -> None:
    def below(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
        for action in parser._actions:
            for child in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
                yield from (child, *below(child))

    loading = [parser for parser in below(build_parser()) if isinstance(parser, FlagParser) and parser.elsewhere]
    assert len(loading) >= 7, "serve, generate, chat, run-batch, plan, two benchmarks"
    for parser in loading:
        both = set(parser.elsewhere) & set(parser._option_string_actions)
        assert both == ({"-q"} if parser.prog == "octavo chat" else set()), parser.prog  # --quick there


def test_a_value_may_look_like_a_flag_after_an_equals_sign() -> None:
    assert build_parser().parse_args(["generate", "m", "--prompt=--not-a-flag"]).prompt == ["--not-a-flag"]
    assert build_parser().parse_args(["generate", "m", "--presence-penalty", "-1.5"]).sampling_presence_penalty == -1.5


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"octavo {octavo.__version__}\n"


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "generate" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["generate", "chat", "complete", "run-batch", "plan", "bench", "info"])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0 and f"usage: octavo {command}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", [OctavoError, ConfigError, ModelError, RequestError, CapacityError, EngineDead])
def test_octavo_s_own_errors_are_one_line_and_exit_code_1(
    kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> int:
        raise kind("seed must be\nsmall.")

    monkeypatch.setattr(info, "run", fail)
    assert main(["info"]) == 1
    assert capsys.readouterr().err == "octavo: error: seed must be small.\n"


def test_a_bug_stays_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(info, "run", fail)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def run(*words: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-m", "octavo", *words], capture_output=True, text=True,
                          env={**os.environ, **environ}, stdin=subprocess.DEVNULL, timeout=120)


def test_an_unknown_variable_is_warned_about() -> None:
    done = run("plan", "/no/such/model", OCTAVO_CASHE="x")
    assert "OCTAVO_CASHE is read by nothing (did you mean OCTAVO_CACHE?)" in done.stderr
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("octavo: error: ")


def test_an_unknown_logging_level_is_named() -> None:
    done = run("info", OCTAVO_LOGGING_LEVEL="loud")
    assert done.returncode == 1 and done.stderr.startswith("octavo: error: OCTAVO_LOGGING_LEVEL must be")
    assert "'loud'" in done.stderr


def test_info() -> None:
    done = run("info", OCTAVO_PASSWORD="a-secret", OCTAVO_LOGGING_LEVEL="INFO")
    assert done.returncode == 0 and "a-secret" not in done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if line[0] != " "] == [
        "versions", "devices", "kernels", "environment"]
    assert octavo.__version__ in done.stdout
    variables = done.stdout.partition("environment\n")[2].split()
    assert "OCTAVO_PASSWORD" in variables and "OCTAVO_LOGGING_LEVEL" in variables and "is set" not in done.stdout


def test_plan_needs_a_config_only() -> None:
    done = run("plan", str(CONFIG), "--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "8")
    assert done.returncode == 0, done.stderr
    # 28 layers x 2 x 8 heads x 128 x 2 bytes: the 112 KiB per token that the config implies
    assert "0.11 MiB" in done.stdout or "114688 bytes" in done.stdout
    for part in ("weights", "activations", "KV pool", "total", "tokens that fit", "longest sequence"):
        assert part in done.stdout
    assert "\x1b" not in done.stdout


def test_plan_for_a_device_that_is_not_here() -> None:
    done = run("plan", str(CONFIG), "--device", "cuda", "--device-memory", "80G")
    assert done.returncode == 0 and "on a cuda device" in done.stdout, done.stderr
    done = run("plan", str(CONFIG), "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1 and "--device-memory" in done.stderr


def test_plan_for_the_gpu_that_is_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (70 * 2**30, 80 * 2**30))
    assert main(["plan", str(CONFIG), "--device", "cuda"]) == 0
    told = capsys.readouterr().out
    assert "on a cuda device" in told and "90% of 80.00 GiB of the device (10.00 GiB of them are taken already)" in told


# A GPU that cannot be used, in the ways of worker/gpu.py and worker/memory.py

def failing(error: Exception) -> Callable[..., None]:
    def function(*args: object) -> None:
        raise error

    return function


@pytest.mark.parametrize(("command", "words"), [
    ("generate", [str(CONFIG), "--skip-tokenizer-init"]), ("bench latency", ["--model", str(CONFIG)]),
    ("bench throughput", ["--model", str(CONFIG)])])
@pytest.mark.parametrize(("is_there", "capability", "error", "total", "free", "sentence"), [
    (False, (9, 0), None, 80, 80, r"device cuda: no NVIDIA GPU is found, or its driver is missing or too old for this torch\."),
    (True, (6, 1), None, 80, 80, r"device cuda: A GPU has compute capability 6\.1; 7\.0 is the oldest supported\."),
    (True, (9, 0), torch.OutOfMemoryError("CUDA out of memory."), 80, 0, r"device cuda: A GPU has no free memory at all; .*"),
    (True, (9, 0), None, 1, 1, r"the KV pool would have no block: 90% of 1\.00 GiB of the device leaves .* GiB .*"),
    (True, (9, 0), None, 80, 0.3, r"the KV pool would .* 80\.00 GiB of the device \(79\.70 GiB of them are taken already\).*"),
], ids=["absent", "too old", "full before we come", "too small", "full"])
def test_a_gpu_that_cannot_be_used_is_one_sentence_and_exit_code_1(
    is_there: bool, capability: tuple[int, int], error: Exception | None, total: float, free: float, sentence: str, command: str,
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_there)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 2**30), int(total * 2**30)))
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *shape, device="cpu", **rest: zeros(*shape, **rest))
    monkeypatch.setattr(ops, "load_cuda", lambda: None)
    monkeypatch.setattr(ops, "count_tokens", failing(error) if error else lambda *tensors: None)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt_token_ids": [1, 2]}\n')
    more = ["--input", str(prompts)] if command == "generate" else []
    assert main([*command.split(), *words, *more, "--device", "cuda", "--dtype", "bfloat16", "--load-format", "dummy"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and re.fullmatch(f"octavo: error: {sentence}\n", captured.err), captured


def started(code: str) -> "subprocess.Popen[str]":
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_is_130_without_a_traceback() -> None:
    code = ("import sys, time; from octavo import cli; from octavo.commands import info\n"
            "def wait(args): print('ready', flush=True); time.sleep(60)\n"
            "info.run = wait; sys.exit(cli.main(['info']))")
    with started(code) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        time.sleep(0.1)  # into the sleep
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
    assert (process.returncode, error) == (130, "")


def test_a_closed_pipe_is_quiet() -> None:
    code = ("import sys; from octavo import cli; from octavo.commands import info\n"
            "def talk(args):\n    for i in range(100000): print('line', i)\n    return 0\n"
            "info.run = talk; sys.exit(cli.main(['info']))")
    with started(code) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        error = process.stderr.read()
    assert (process.returncode, error) == (141, "")


def run_in_shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A shell line with OCTAVO standing for the command."""
    line = line.replace("OCTAVO", f"{sys.executable} -m octavo")
    return subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    done = run_in_shell("OCTAVO info > /dev/full")
    assert done.returncode == 1 and "No space left" in done.stderr and "Traceback" not in done.stderr


def test_a_closed_stdin_is_an_empty_one() -> None:
    done = run_in_shell("OCTAVO generate smollm2 <&-")
    assert done.returncode == 1 and done.stderr.startswith("octavo: error: ") and "Traceback" not in done.stderr


def test_what_a_terminal_cannot_show_is_escaped(tmp_path: Path) -> None:
    done = run_in_shell(f"OCTAVO plan {tmp_path}/\u00e9", LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "UnicodeEncodeError" not in done.stderr
