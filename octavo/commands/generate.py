"""``octavo generate MODEL``: prompts from flags, a file or stdin; texts for a person, JSON lines for a program.

Owns how prompts are read and how results are written; it does not know how they are computed. Invariant: one result
per prompt, in input order, and exit code 1 when any of them ended with an error.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from octavo.commands.options import add_sampling_args, engine_options, sampling_changes, with_changes
from octavo.config import EngineConfig
from octavo.errors import RequestError
from octavo.outputs import RequestOutput

Prompt = str | Mapping[str, Any]


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "generate", help="complete prompts", description="Complete prompts with a model, all of them as one batch.")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt (may be repeated)")
    parser.add_argument("--input", metavar="FILE", help="file of prompts; - or nothing at all: stdin")
    parser.add_argument("--input-format", choices=("auto", "text", "jsonl"), default="auto",
                        help='text: a prompt per line; jsonl: a string, {"prompt": ...} or {"prompt_token_ids": [...]} '
                             "per line; auto: jsonl for *.jsonl and when the first line begins with {")
    parser.add_argument("--json", action=argparse.BooleanOptionalAction, default=None,
                        help="JSON lines on stdout; default: when stdout is not a terminal")
    add_sampling_args(parser)
    EngineConfig.add_cli_args(parser, model="positional")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read the prompts, complete them, write the results."""
    prompts = read_prompts(args)
    config = EngineConfig.from_cli_args(args)
    from octavo.llm import LLM  # loads torch, which --help and a wrong flag must not

    llm = LLM(**engine_options(config))
    try:
        defaults = llm.get_default_sampling_params().clone(max_tokens=None)
        params = with_changes(defaults, sampling_changes(args))
        outputs = llm.generate(list(prompts), params, use_tqdm=sys.stderr.isatty())
    finally:
        llm.close()
    write = write_json if args.json or (args.json is None and not sys.stdout.isatty()) else write_text
    codes = [write(index, output) for index, output in enumerate(outputs)]
    return max(codes)


def read_prompts(args: argparse.Namespace) -> list[Prompt]:
    """The prompts of ``--prompt``, ``--input`` or stdin; RequestError names the file and the line of a bad one."""
    if args.prompt and args.input:
        raise RequestError(f"prompt and input cannot both be given, got --input {args.input!r}.", "input")
    if args.prompt:
        return list(args.prompt)
    if args.input in (None, "-"):
        if args.input is None and sys.stdin.isatty():
            raise RequestError("prompt is missing: give --prompt, --input FILE, or prompts on stdin.", "prompt")
        return _required("stdin", parse_prompts("stdin", sys.stdin, args.input_format))
    try:
        text = Path(args.input).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"input {args.input!r} cannot be read: {error}.", "input") from None
    kind = "jsonl" if args.input_format == "auto" and args.input.endswith(".jsonl") else args.input_format
    return _required(args.input, parse_prompts(args.input, text.split("\n"), kind))


def parse_prompts(name: str, lines: Iterable[str], kind: str) -> list[Prompt]:
    """One prompt per line that is not blank; ``kind`` is text, jsonl, or auto (by the first such line)."""
    filled = [(number, line.rstrip("\r\n")) for number, line in enumerate(lines, 1) if line.strip()]
    if kind == "auto":
        kind = "jsonl" if filled and filled[0][1].lstrip().startswith("{") else "text"
    return [line if kind == "text" else _parse_json(name, number, line) for number, line in filled]


def _parse_json(name: str, number: int, line: str) -> Prompt:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name} line {number} is not JSON ({error}): {line!r:.100}; --input-format text reads "
                           "plain lines.", "input") from None
    if not isinstance(value, str | dict):
        raise RequestError(f"{name} line {number} must be a string or an object, got {line!r:.100}.", "input")
    return value


def _required(name: str, prompts: list[Prompt]) -> list[Prompt]:
    if not prompts:
        raise RequestError(f"{name} holds no prompt.", "prompt")
    return prompts


def write_json(index: int, output: RequestOutput) -> int:
    """Write one result as a line of JSON; returns 1 when it ended with an error, else 0."""
    record = {"index": index, **dataclasses.asdict(output)}
    del record["request_id"], record["finished"]
    print(json.dumps(_plain(record), ensure_ascii=False, allow_nan=False))
    return int(output.error is not None)


def _plain(value: Any) -> Any:
    """The value with string keys, and null for infinities, which JSON has no word for (a masked token's logprob)."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(index: int, output: RequestOutput) -> int:
    """Write one result for a person; returns 1 when it ended with an error, else 0."""
    prompt = f"{len(output.prompt_token_ids)} token ids" if output.prompt is None else " ".join(output.prompt.split())
    print(f"[{index}] {prompt[:100]}{'...' if len(prompt) > 100 else ''}")
    for completion in output.outputs:
        text = completion.text or " ".join(map(str, completion.token_ids))
        mark = f"({completion.index + 1}) " if len(output.outputs) > 1 else ""
        reason = "" if completion.finish_reason == "stop" else f"  [{completion.finish_reason}]"
        print(mark + text.strip() + reason)
    print()
    if output.error is not None:
        print(f"octavo: error: prompt {index}: {output.error}", file=sys.stderr)
    return int(output.error is not None)
