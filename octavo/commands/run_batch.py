"""``octavo run-batch``: a file of requests in OpenAI's batch format, answered by a server of its own or by one that runs.

Owns the flags and the order of things; lines and results are in ``octavo.client.batch``. Invariant: run again with the
same files, it does only what has no result yet; the exit code is 1 while the output holds a result that is no success.
"""

import argparse
import os
import sys
from contextlib import nullcontext
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

from octavo.commands.options import add_engine_args, changed, words_of
from octavo.commands.remote import DEFAULT_URL, add_key_arg, api_key
from octavo.config import EngineConfig, add_flag, human_int
from octavo.errors import ConfigError
from octavo.server.config import ServerConfig

if TYPE_CHECKING:
    from octavo.client.batch import Output
    from octavo.client.connection import Address
    from octavo.client.private import PrivateServer

HOURS = 6 * 3600.0  # a request may take so many seconds
SERVER = ("served_model_name", "chat_template_content_format", "enable_auto_tool_choice", "tool_call_parser", "reasoning_parser")


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "run-batch", help="answer a file of requests",
        description="Answer a file of requests in OpenAI's batch format. Run again, it goes on where it stopped.")
    parser.add_argument("-i", "--input-file", required=True, metavar="FILE",
                        help='JSON lines: {"custom_id": ..., "method": "POST", "url": "/v1/...", "body": {...}}')
    parser.add_argument("-o", "--output-file", required=True, metavar="FILE", help="JSON lines; results are appended")
    parser.add_argument("--url", help="of a server that runs, instead of --model")
    add_key_arg(parser)
    parser.add_argument("--max-concurrency", type=human_int, default=256, metavar="INT",
                        help="requests under way (default: 256)")
    parser.add_argument("--disable-tqdm", action="store_true", help="show no progress")
    server = parser.add_argument_group("server of its own")
    for field in fields(ServerConfig):
        if field.name in SERVER:
            add_flag(cast(argparse.ArgumentParser, server), field)  # a group has the part of a parser that is used
    add_engine_args(parser, optional=True)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer what has no result yet; returns 1 when the output holds a failure."""
    from octavo.client import batch  # asyncio and ssl, which --help does not need
    from octavo.client.connection import Address
    from octavo.client.private import PrivateServer

    if args.max_concurrency < 1:
        raise ConfigError(f"max_concurrency must be at least 1, got {args.max_concurrency}.", "max_concurrency")
    own = {**changed(args, EngineConfig), **changed(args, ServerConfig, SERVER)}
    if (args.url is None) == (args.model is None):
        raise ConfigError("model or url must be given, and not both.", "model")
    if args.url is not None and own:
        name = next(iter(own))
        raise ConfigError(f"{name} is for a server of its own and cannot be combined with url, got {own[name]!r}.", name)
    if args.model is not None and args.api_key is not None:
        raise ConfigError("api_key is for a server that runs and cannot be combined with model.", "api_key")
    address = Address.parse(args.url or DEFAULT_URL)
    if args.model is not None:
        EngineConfig.from_cli_args(args)  # refuses a bad value before anything starts
    if os.path.exists(args.output_file) and os.path.samefile(args.input_file, args.output_file):
        raise ConfigError(f"output_file must be another file than input_file, got {args.output_file!r}.", "output_file")
    total = batch.count(args.input_file)
    output = batch.Output(args.output_file)
    try:
        before = output.held
        if any(True for _ in batch.jobs(args.input_file, output)):  # a model is loaded only if something is left to do
            words = words_of({name: value for name, value in own.items() if name != "model"})
            words += ["--max-queued-requests", str(max(512, 2 * args.max_concurrency)), "--disable-uvicorn-access-log"]
            with nullcontext() if args.model is None else PrivateServer([args.model, *words]) as private:
                _answer(args, private.address if private is not None else address, private, output, total)
        print(f"{args.output_file}: {total} lines, {before} of them answered before, {output.failed} failed", file=sys.stderr)
        return int(output.failed > 0)
    finally:
        output.close()


def _answer(args: argparse.Namespace, address: "Address", private: "PrivateServer | None", output: "Output",
            total: int) -> None:
    import asyncio  # all of this is loaded already, but for the sake of --help not at the top

    from octavo.client import batch
    from octavo.client.connection import Client

    bar = None if args.disable_tqdm or not sys.stderr.isatty() else _bar(total, output.held)

    async def work() -> None:
        client = Client(address, api_key=None if private is not None else api_key(args), timeout=HOURS)
        try:
            if private is not None:
                await private.ready(client)
            await batch.run(client, batch.jobs(args.input_file, output), output, args.max_concurrency,
                            lambda: None if bar is None else bar.update(1))
        finally:
            await client.close()

    try:
        asyncio.run(work())
    finally:
        if bar is not None:
            bar.close()


def _bar(total: int, done: int) -> Any:
    from tqdm import tqdm  # 30 ms, and only a terminal wants it

    return tqdm(total=total, initial=done, desc="Lines", unit="line", dynamic_ncols=True, file=sys.stderr)
