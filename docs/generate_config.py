"""Writes docs/config.md from EngineConfig, so that the page cannot disagree with the code.

``python docs/generate_config.py`` writes the page, ``--check`` only compares and exits with 1 when it is out of date.
"""

import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from octavo.config import ENVIRONMENT, EngineConfig

PAGE = Path(__file__).with_name("config.md")

HEAD = """\
# Options

Every option of `EngineConfig` (which is also `EngineArgs`). The same names are keyword arguments of `LLM`, and flags
of the commands, with dashes or underscores: `max_model_len=4096` is `--max-model-len 4096` or `--max_model_len 4K`. A
switch has a negative form, `--no-enable-prefix-caching`. A value that is not legal, or that this version cannot
honour, is an error that names the option and the value; nothing is accepted and ignored.

This page is written by `make config-docs` from the code.

| option | default | meaning |
|---|---|---|
"""

VARIABLES = {
    "OCTAVO_CACHE": "folder of the default model; else `$XDG_CACHE_HOME/octavo`, else `~/.cache/octavo`",
    "OCTAVO_API_KEY": "reserved for the server",
    "OCTAVO_LOGGING_LEVEL": "`DEBUG`, `INFO` (default), `WARNING` or `ERROR`",
    "OCTAVO_CUDA_ARCHS": "reserved for the CUDA build",
    "OCTAVO_INTERNAL_PORT": "reserved for more than one process",
}


def page() -> str:
    """The whole page."""
    rows = [f"| `{f.name}` | {_default(f)} | {_meaning(f)} |\n" for f in fields(EngineConfig)]
    assert set(VARIABLES) == set(ENVIRONMENT), "a variable without words"
    variables = [f"| `{name}` | {text} |\n" for name, text in VARIABLES.items()]
    head = "\n## Environment variables\n\nThe commands warn about any other variable that begins with `OCTAVO_`.\n\n"
    return "".join([HEAD, *rows, head, "| variable | meaning |\n|---|---|\n", *variables])


def _default(f: "Field[Any]") -> str:
    if f.default is MISSING:
        return "required" if f.default_factory is MISSING else "`{}`"
    return f"`{f.default!r}`".replace("'", '"')


def _meaning(f: "Field[Any]") -> str:
    text = f.metadata["help"].replace("|", "\\|")
    choices = f.metadata["choices"]
    return f"{text}; one of {', '.join(f'`{choice}`' for choice in choices)}" if choices else text


def main() -> int:
    """Write or compare."""
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if PAGE.read_text(encoding="utf-8") == page():
        return 0
    print(f"{PAGE} is out of date: run make config-docs", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
