"""``octavo complete``: continues texts with a model that a server has, streamed as they are made.

Owns the loop over the texts; ``octavo generate`` is the one that loads a model. Invariant: every text is one request,
and one that fails does not end the others.
"""

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from octavo.commands.console import input_lines, on_terminal, write_now
from octavo.commands.options import NOT_IN_CHAT, add_sampling_args
from octavo.commands.remote import add_server_args, remote_model
from octavo.errors import OctavoError

if TYPE_CHECKING:
    from octavo.client.talk import RemoteModel


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "complete", help="continue texts with a server's model",
        description="Continue texts with a model that a server has: each line of the input is one. Without --max-tokens the "
                    "server's own default holds. Ctrl-D ends the input, Ctrl-C stops a continuation.")
    parser.add_argument("-q", "--quick", metavar="TEXT", help="continue this one text and end")
    add_server_args(parser)
    add_sampling_args(parser, without=NOT_IN_CHAT)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Continue every text; returns 1 when one of them failed."""
    with remote_model(args) as model:
        if args.quick is not None:
            return complete(model, args.quick, write_now)
        code = 0
        for line in input_lines():
            text = line.rstrip("\r\n")
            if text:
                code = max(code, complete(model, text, write_now, stoppable=on_terminal()))
        return code


def complete(model: "RemoteModel", text: str, write: Callable[[str], None], *, stoppable: bool = False) -> int:
    """Stream one continuation; a failure is one line on stderr and 1. ``stoppable``: Ctrl-C ends only this one."""
    try:
        model.complete(text, write)
    except OctavoError as error:
        print(f"octavo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if not stoppable:
            raise
    finally:
        print(flush=True)
    return 0
