"""Flags that all commands against a server share: its address, the key, the name of the model.

Owns how a server is named on the command line; it does not know what is asked of it. Invariant: a key comes from a flag
or from OPENAI_API_KEY, is sent to the server that the user named, and is never printed.
"""

import argparse
import os
from typing import TYPE_CHECKING, Any

from octavo.commands.options import changed, sampling_changes
from octavo.config import EngineConfig
from octavo.errors import ConfigError

if TYPE_CHECKING:
    from octavo.client.talk import RemoteModel

DEFAULT_URL = "http://localhost:8000/v1"


def add_key_arg(parser: Any) -> None:
    """Add ``--api-key``."""
    parser.add_argument("--api-key", metavar="KEY", help="bearer token for the server (default: OPENAI_API_KEY)")


def api_key(args: argparse.Namespace) -> str | None:
    """The flag's key, or else the environment's."""
    return args.api_key or os.environ.get("OPENAI_API_KEY") or None


def add_server_args(parser: Any) -> None:
    """Add what names a server and one of its models."""
    group = parser.add_argument_group("server")
    group.add_argument("--url", help=f"(default: {DEFAULT_URL})")
    group.add_argument("--model-name", metavar="NAME", help="name sent to the server (default: the first that it lists)")
    add_key_arg(group)


def remote_model(args: argparse.Namespace) -> "RemoteModel":
    """The model of a server that a command line names, with its sampling flags; OctavoError when it cannot be had."""
    engine = changed(args, EngineConfig)
    if engine:
        name = next(iter(engine))
        raise ConfigError(f"{name} is for a model that is loaded here, not for a server, got {engine[name]!r}.", name)
    from octavo.client.connection import Address  # asyncio and ssl, which --help does not need
    from octavo.client.talk import open_model

    return open_model(Address.parse(args.url or DEFAULT_URL), api_key(args), args.model_name, sampling_changes(args))
