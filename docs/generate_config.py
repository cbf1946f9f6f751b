"""Writes docs/config.md from EngineConfig and ServerConfig, so that the page cannot disagree with the code.

``python docs/generate_config.py`` writes the page, ``--check`` only compares and exits with 1 when it is out of date.
"""

import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from generated import write_or_compare

from octavo.config import ENVIRONMENT, EngineConfig
from octavo.server.config import ServerConfig

PAGE = Path(__file__).with_name("config.md")

HEAD = """\
# Options

Every option of `EngineConfig` (which is also `EngineArgs`). The same names are keyword arguments of `LLM`, and flags
of the commands, with dashes or underscores: `max_model_len=4096` is `--max-model-len 4096` or `--max_model_len 4K`. A
switch has a negative form, `--no-enable-prefix-caching`. A value that is not legal, or that this version cannot
honour, is an error that names the option and the value; nothing is accepted and ignored.

The defaults are those of `LLMEngine` and of the commands. One differs elsewhere: `LLM` sets `disable_log_stats` to `True`
unless it is given, and so do `octavo bench` always, and `octavo generate` and `octavo chat` on a terminal.

`dtype` is the type in which weights and KV cache are *stored*. On a CPU the computation between them
(activations, norms, softmax, logits) is float32 whatever it is. `auto` takes the checkpoint's own type, with bfloat16 for
float16 and for quantised GGUF weights; `float32` computes with dequantised float32 weights throughout.

`max_model_len` bounds prompt and output together. A request whose prompt plus `max_tokens` is more is refused, never
shortened; without `max_tokens` (None) a request may run to that end.

This page is written by `make config-docs` from the code.

| option | default | meaning |
|---|---|---|
"""

SERVER = """
## Options of the server

Flags of `octavo serve`, beside all of the above. Lists take several values: `--api-key one two`. `octavo serve --help=WORD`
shows the flags that have to do with a word, `--config FILE.yaml` reads them from a file, and a flag on the command line wins
over the file. On a GPU `octavo serve` takes 256 for `max_num_seqs` and 8192 for `max_num_batched_tokens` where none is given.

| option | default | meaning |
|---|---|---|
"""

VARIABLES = {
    "OCTAVO_API_KEY": "key that clients of `octavo serve` must send, where neither `--api-key` nor `--api-key-file` is given",
    "OCTAVO_CACHE": "folder of the default model; else `$XDG_CACHE_HOME/octavo`, else `~/.cache/octavo`",
    "OCTAVO_CUDA_ARCHS": "read by the build of the CUDA kernels: what they are compiled for, such as `9.0a;8.0+PTX`; "
    "else the GPUs of the machine",
    "OCTAVO_LOGGING_LEVEL": "`DEBUG`, `INFO` (default), `WARNING` or `ERROR`",
}


def page() -> str:
    """The whole page."""
    rows, server = ([f"| `{f.name}` | {_default(f)} | {_meaning(f)} |\n" for f in fields(kind)]
                    for kind in (EngineConfig, ServerConfig))
    assert set(VARIABLES) == set(ENVIRONMENT), "a variable without words"
    variables = [f"| `{name}` | {text} |\n" for name, text in VARIABLES.items()]
    head = "\n## Environment variables\n\nThe commands warn about any other variable that begins with `OCTAVO_`.\n\n"
    return "".join([HEAD, *rows, SERVER, *server, head, "| variable | meaning |\n|---|---|\n", *variables])


def _default(f: "Field[Any]") -> str:
    if f.default is MISSING:
        return "required" if f.default_factory is MISSING else "`{}`"
    return f"`{f.default!r}`".replace("'", '"')


def _meaning(f: "Field[Any]") -> str:
    text = f.metadata["help"].replace("|", "\\|")
    choices = f.metadata["choices"]
    return f"{text}; one of {', '.join(f'`{choice}`' for choice in choices)}" if choices else text


if __name__ == "__main__":
    sys.exit(write_or_compare(PAGE, page))
