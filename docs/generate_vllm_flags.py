"""Writes docs/vllm-flags.md from the parser of ``octavo serve`` and the table of refused flags.

Owns which of our flags vLLM has under the same name, and the words about differences; names and defaults come from the parser,
the refusals from octavo/absent.py. Invariant: every flag of the parser is classified exactly once, and no word is
about a flag that is not there. ``--check`` only compares and exits with 1 when the page is out of date.
"""

import argparse
import sys
from pathlib import Path

from generated import write_or_compare

from octavo.absent import REFUSED
from octavo.cli import build_parser
from octavo.commands.options import REFUSED as ONE_VALUE

PAGE = Path(__file__).with_name("vllm-flags.md")

HEAD = """\
# Flags of vllm serve

Every flag of `vllm serve` that Octavo knows of, and every flag of `octavo serve` that vLLM lacks; what they mean is on the page
of [options](config.md). The habits of the command line are the same: `--config FILE.yaml`, dotted JSON flags
(`--hf-overrides.rope_theta 1e6`), dashes or underscores, `--no-` forms, `--help=WORD`, numbers such as `32k`. A flag that is on
neither list is an error too, which names the nearest known one. See [Coming from vLLM](migrate-from-vllm.md) for everything
else. This page is written by `make config-docs` from the code.
"""

# Flags with vLLM's name and meaning; where something differs, what.
SAME: dict[str, str] = {
    "model": "no default: a model must be named; also a GGUF file, or `smollm2`",
    "--model": "the same as the argument",
    "--host": "default `127.0.0.1`; vLLM listens on every interface",
    "--port": "",
    "--uds": "",
    "--root-path": "requests are taken with and without the prefix",
    "--ssl-keyfile": "",
    "--ssl-certfile": "",
    "--ssl-ca-certs": "makes a client certificate a condition",
    "--api-key": "guards every route but the probes and the static page, not only `/v1`",
    "--allowed-origins": "several words instead of a JSON list",
    "--allowed-methods": "several words instead of a JSON list",
    "--allowed-headers": "several words instead of a JSON list",
    "--allow-credentials": "",
    "--enable-request-id-headers": "on by default",
    "--served-model-name": "",
    "--api-server-count": "default 1",
    "--chat-template-content-format": "",
    "--trust-request-chat-template": "",
    "--enable-auto-tool-choice": "on by default; `--no-enable-auto-tool-choice` switches it off",
    "--tool-call-parser": "found in the chat template unless it is given",
    "--reasoning-parser": "found in the chat template unless it is given; `none` switches it off",
    "--enable-prompt-tokens-details": "",
    "--enable-force-include-usage": "",
    "--enable-log-requests": "",
    "--max-log-len": "default: nothing of a prompt is logged; needs `--enable-log-requests`",
    "--uvicorn-log-level": "",
    "--disable-uvicorn-access-log": "",
    "--otlp-traces-endpoint": "http only; one span per request",
    "--shutdown-timeout": "default 30 s; vLLM ends requests at once",
    "--tokenizer": "",
    "--skip-tokenizer-init": "the server then takes no text, so only the offline API has a use for it",
    "--revision": "for model and tokenizer",
    "--download-dir": "",
    "--trust-remote-code": "refused: no code of a checkpoint is ever run",
    "--hf-overrides": "",
    "--load-format": "auto, safetensors, pt, gguf, dummy",
    "--dtype": "on a CPU the type of storage; see [options](config.md)",
    "--kv-cache-dtype": "fp8 (e4m3) on a GPU",
    "--quantization": "refused: there are no quantised kernels yet; GGUF files are widened when loaded",
    "--device": "auto, cpu, cuda; gone from newer versions of vLLM",
    "--seed": "",
    "--max-model-len": "no `auto`: without the flag, the model's length fitted to the KV pool",
    "--block-size": "",
    "--gpu-memory-utilization": "default 0.9; 0.92 in newer versions of vLLM",
    "--kv-cache-memory-bytes": "",
    "--num-gpu-blocks-override": "",
    "--swap-space": "GiB of the second tier: swapped requests and evicted prefixes; gone from newer versions of vLLM",
    "--enable-prefix-caching": "",
    "--max-num-seqs": "default 64 on a CPU, 256 on a GPU, whatever its size",
    "--max-num-batched-tokens": "default 2048 on a CPU, 8192 on a GPU",
    "--enable-chunked-prefill": "",
    "--long-prefill-token-threshold": "",
    "--scheduling-policy": "`sjf` too",
    "--preemption-mode": "gone from newer versions of vLLM",
    "--async-scheduling": "",
    "--enforce-eager": "",
    "--tensor-parallel-size": "refused beyond 1: one device so far",
    "--pipeline-parallel-size": "refused beyond 1: one device so far",
    "--generation-config": "`octavo` is another word for `vllm`; no folder",
    "--override-generation-config": "",
    "--chat-template": "",
    "--max-logprobs": "",
    "--logprobs-mode": "",
    "--disable-log-stats": "",
}

OWN = (
    "--api-key-file", "--metrics-auth", "--metrics-compat", "--request-timeout", "--queue-timeout", "--step-timeout",
    "--keep-alive", "--header-timeout", "--body-timeout", "--send-timeout", "--max-connections", "--max-queued-requests",
    "--max-queued-tokens", "--max-body-bytes", "--max-header-bytes", "--max-headers", "--max-json-depth", "--max-stream-buffer",
    "--max-held-bytes", "--max-n", "--max-prompts", "--max-sequences", "--max-logprob-entries", "--max-stop", "--max-stop-chars",
    "--max-logit-bias", "--max-schema-bytes", "--max-schema-depth", "--max-regex-bytes", "--max-grammar-cache-bytes",
    "--batch-invariant", "--debug-checksums",
)


def page() -> str:
    """The whole page."""
    actions = {(action.option_strings or [action.dest])[0]: action for action in _parser()._actions if action.dest != "help"}
    assert set(actions) == set(SAME) | set(OWN), set(actions) ^ (set(SAME) | set(OWN))
    assert not set(SAME) & set(OWN) and not set(REFUSED) & set(actions)
    one_value = sorted(name for name, words in SAME.items() if words.startswith("refused"))
    assert one_value == sorted(ONE_VALUE), one_value
    rows = [f"| `{_spelling(action)}` | {_default(action)} | {_difference(SAME[name])} |\n"
            for name, action in actions.items() if name in SAME]
    own = [f"| `{_spelling(actions[name])}` | {_default(actions[name])} | {actions[name].help} |\n" for name in OWN]
    refused = [f"| `{name}` | {hint} |\n" for name, hint in sorted(REFUSED.items(), key=lambda pair: pair[0].lstrip("-").lower())]
    return "".join([
        HEAD, "\n## The same\n\nWith the differences that there are. An empty default is decided at start.\n\n",
        "| flag | default | difference |\n|---|---|---|\n", *rows,
        "\n## Refused\n\nEach of these is an error that names the flag and says what is written here.\n\n",
        "| flag of vLLM | instead |\n|---|---|\n", *refused,
        "\n## Octavo's own\n\n| flag | default | meaning |\n|---|---|---|\n", *own])


def _parser() -> argparse.ArgumentParser:
    commands = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    parser: argparse.ArgumentParser = commands.choices["serve"]
    return parser


def _spelling(action: argparse.Action) -> str:
    shown = [word for word in action.option_strings if not word.startswith("--no-")]
    return "`, `".join(shown or ["MODEL"])


def _default(action: argparse.Action) -> str:
    value = action.default
    if value in (None, "", {}) or value is argparse.SUPPRESS:
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _difference(words: str) -> str:
    return words or "-"


if __name__ == "__main__":
    sys.exit(write_or_compare(PAGE, page))
