"""The ``octavo`` command: finds the subcommand, runs it, and turns every way to end into an exit code.

Owns parsing habits and exit codes (0 good, 1 the user's error, 2 wrong usage, 130 Ctrl-C); it does not know what a
subcommand does. Invariant: nothing heavy is imported before a command runs, so ``--help`` is quick, and a user's
mistake is one line on stderr, never a traceback.
"""

import argparse
import difflib
import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from octavo import __version__
from octavo.commands import bench, chat, complete, generate, info, plan, run_batch, serve
from octavo.config import ENVIRONMENT, nearest, unknown_environment
from octavo.errors import ConfigError, OctavoError
from octavo.log import get_logger, setup

COMMANDS = (serve, generate, chat, complete, run_batch, plan, bench, info)
EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPT, EXIT_PIPE = 1, 2, 130, 141

logger = get_logger(__name__)


class FlagParser(argparse.ArgumentParser):
    """ArgumentParser with dashes or underscores in long flags, no abbreviations, and errors of one line.

    Attributes:
        elsewhere: flags that others have and this command has not -> what is there instead.
        rewrite: words -> words, before anything else looks at them.
    """

    elsewhere: Mapping[str, str] = {}
    rewrite: Callable[[list[str]], list[str]] = staticmethod(lambda words: words)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse, after flags are spelt with dashes; an unknown long flag is an error before anything else."""
        words = self.rewrite(dashed(sys.argv[1:] if args is None else args))
        for word in words:
            if word == "--" or (self._subparsers is not None and not word.startswith("-")):
                break  # what follows are values, or belongs to the subcommand's own parser
            name = word.split("=", 1)[0]
            unknown = name not in self._option_string_actions
            if unknown and (self._absent(name) or (name.startswith("--") and " " not in name)):
                self.unknown(name)
        return super().parse_known_args(words, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse; what no parser wanted is named."""
        known, extras = self.parse_known_args(args, namespace)
        if extras:
            self.error(f"unexpected argument {extras[0]!r}")
        return known

    def unknown(self, name: str) -> NoReturn:
        """End with the message for a flag that does not exist."""
        if absent := self._absent(name):
            self.error(f"{absent} is a flag of vLLM that Octavo does not have: {self.elsewhere[absent]}.")
        # Compared without their dashes, which all flags have in common and which would make strangers look alike.
        close = difflib.get_close_matches(name[2:], [flag[2:] for flag in self._option_string_actions], 1)
        self.error(f"unknown flag {name}" + (f" (did you mean --{close[0]}?)" if close else ""))

    def _absent(self, name: str) -> str:
        """The flag of ``elsewhere`` that a word spells, with a key of its JSON (--flag.key) or a number (-O3); "" for none."""
        flag = name.partition(".")[0]
        return next((known for known in (flag, flag.rstrip("0123456789")) if known in self.elsewhere), "")

    def error(self, message: str) -> NoReturn:
        """One line, where to read more, exit code 2."""
        self.exit(EXIT_USAGE, f"octavo: error: {message}\nSee: {self.prog} --help\n")


def dashed(words: Sequence[str]) -> list[str]:
    """The words with ``_`` read as ``-`` in the names of long flags; values, and all after ``--``, stay as they are."""
    found: list[str] = []
    for position, word in enumerate(words):
        if word == "--":
            return found + list(words[position:])
        name, equals, value = word.partition("=")
        flag = name.startswith("--") and " " not in name
        found.append(name.replace("_", "-") + equals + value if flag else word)
    return found


def build_parser() -> FlagParser:
    """The whole command line; each command's namespace carries ``run``, the function to call with it."""
    parser = FlagParser(prog="octavo", description="Run large language models: paged attention, continuous batching.")
    parser.add_argument("--version", action="version", version=f"octavo {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for module in COMMANDS:
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code (usage errors leave through SystemExit, as in argparse)."""
    _mend_streams()
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
        args.argv = sys.argv[1:] if argv is None else list(argv)  # benchmarks report the command that made them
        if args.command is None:
            parser.print_help(sys.stderr)
            return EXIT_USAGE
        _start_logging()
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except OctavoError as error:
        print(f"octavo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        return EXIT_INTERRUPT
    except BrokenPipeError:
        _silence()
        return EXIT_PIPE
    except OSError as error:  # a full disk behind stdout, say; files of ours have errors of their own
        _silence()
        print(f"octavo: error: {error}", file=sys.stderr)
        return EXIT_ERROR


def _mend_streams() -> None:
    """A closed stream reads as empty or swallows, and a terminal that cannot show a character gets its escape.

    No closed descriptor may be left: the next file or socket that is opened would take its number, and with it what
    libraries write to their standard error.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest free number, this one
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  for the whole process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _start_logging() -> None:
    try:
        setup()
    except ValueError:
        level = os.environ.get("OCTAVO_LOGGING_LEVEL")
        raise ConfigError(f"OCTAVO_LOGGING_LEVEL must be DEBUG, INFO, WARNING or ERROR, got {level!r}.") from None
    for name in unknown_environment():
        logger.warning("environment variable %s is read by nothing%s", name, nearest(name, set(ENVIRONMENT)))


def _silence() -> None:
    """Point stdout at nothing: the reader has gone, and the interpreter's own flush at exit would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
