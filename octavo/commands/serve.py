"""``octavo serve MODEL``: the OpenAI-compatible server.

Owns the flags of the command; it does not know what serving means (server/main.py does). Invariant: a flag of vLLM's
that Octavo does not have is refused by name, with what to use instead.
"""

import argparse
import logging
import os
import sys
from dataclasses import fields
from typing import Any, NoReturn

from octavo.commands.options import add_engine_args, with_hint
from octavo.commands.words import help_about, with_config_file, with_json_flags
from octavo.config import EngineConfig
from octavo.errors import ConfigError, ModelError
from octavo.server.config import ServerConfig


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "serve", help="serve a model over HTTP",
        description="Serve a model over HTTP, with the APIs of OpenAI and others. --help=WORD shows the flags about a word.",
        epilog="--config FILE.yaml holds flags as keys; flags on the command line win. "
               "JSON flags may be dotted: --hf-overrides.rope_theta 1e6.")
    ServerConfig.add_cli_args(parser.add_argument_group("server"))
    add_engine_args(parser, model="positional", optional=True)
    parser.add_argument("--model", dest="model_flag", metavar="MODEL", help="the same as the argument")
    parser.rewrite = lambda words: _rewrite(parser, words)
    parser.set_defaults(run=run)


def _rewrite(parser: argparse.ArgumentParser, words: list[str]) -> list[str]:
    if (answer := help_about(parser, words)) is not None:
        print(answer, end="")
        raise SystemExit(0)
    try:
        words = with_config_file(words, "model")
        json_flags = {"--" + f.name.replace("_", "-") for f in fields(EngineConfig) if f.metadata["kind"] == "json"}
        return with_json_flags(words, json_flags)
    except ConfigError as error:
        parser.error(str(error))


def run(args: argparse.Namespace) -> NoReturn:
    """Serve until told to stop, and end the process."""
    if args.model is not None and args.model_flag is not None:
        raise ConfigError(f"the model is given twice, as {args.model!r} and as {args.model_flag!r}.", "model")
    args.model = args.model or args.model_flag
    if args.model is None:
        raise ConfigError("a model must be given: octavo serve MODEL.", "model")
    config, server = EngineConfig.from_cli_args(args), ServerConfig.from_cli_args(args)
    if not server.api_key and server.api_key_file is None and (key := os.environ.get("OCTAVO_API_KEY")):
        server = server.replace(api_key=(key,))
    from octavo.server.main import run as serve  # brings the web server

    try:
        code = serve(config, server)
    except ModelError as error:
        raise with_hint(error, config) from error
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # the interpreter's own end would wait for a text that is still being tokenised for nobody
