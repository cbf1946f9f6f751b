"""``octavo generate MODEL``: prompts from flags, a file or stdin; texts for a person, JSON lines for a program.

Owns how prompts are read and how results are written; it does not know how they are computed. Invariant: one result
per prompt, in input order and as soon as those before it are written, and exit code 1 when any ended with an error.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from octavo.commands.options import add_engine_args, add_sampling_args, sampling_changes, with_changes, with_hint
from octavo.config import EngineConfig
from octavo.errors import ModelError, RequestError
from octavo.outputs import CompletionOutput, RequestOutput
from octavo.params import SamplingParams

if TYPE_CHECKING:
    from octavo.llm import LLMEngine

Prompt = str | Mapping[str, Any]


def add_parser(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "generate", help="complete prompts", description="Complete prompts with a model, all of them as one batch.")
    add_sampling_args(parser)
    group = parser.add_argument_group("input and output")
    group.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt (may be repeated)")
    group.add_argument("--input", metavar="FILE", help="file of prompts; - or nothing at all: stdin")
    group.add_argument("--input-format", choices=("auto", "text", "jsonl"), default="auto",
                       help='text: a prompt per line; jsonl: a string, {"prompt": ...} or {"prompt_token_ids": [...]} '
                            "per line; auto: jsonl for *.jsonl and when the first line begins with {")
    group.add_argument("--json", action=argparse.BooleanOptionalAction, default=None,
                       help="JSON lines on stdout; default: when stdout is not a terminal")
    add_engine_args(parser, model="positional")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read the prompts, complete them, write the results."""
    prompts = read_prompts(args)
    config = EngineConfig.from_cli_args(args)
    tty = sys.stdout.isatty()
    as_json = not tty if args.json is None else args.json
    engine = _load(config.replace(disable_log_stats=True) if tty else config)  # a person reads answers there
    try:
        changes = sampling_changes(args)
        params = with_changes(engine.default_params(None), changes)
        if sys.stderr.isatty() and "max_tokens" not in changes:
            print(f"no --max-tokens: up to {_longest(engine)} tokens a prompt, the prompt included", file=sys.stderr)
        live = tty and not as_json and len(prompts) == params.width == 1
        bar = _bar(len(prompts)) if sys.stderr.isatty() and not live else None
        write = write_json if as_json else LiveText() if live else write_text
        try:
            return write_all(answers(engine, prompts, params, live, bar), write, bar)
        finally:
            if bar is not None:
                bar.close()
    finally:
        engine.close()


def answers(engine: "LLMEngine", prompts: Sequence[Prompt], params: SamplingParams, live: bool = False,
            bar: Any = None) -> Iterator[tuple[int, RequestOutput]]:
    """Results in input order, each as soon as it and those before it have ended.

    Args:
        live: yield unfinished states too (of a single prompt). bar: told of every request that ends.

    Raises:
        RequestError: a prompt is refused; nothing has been computed.
    """
    for index, prompt in enumerate(prompts):
        try:
            engine.add_request(str(index), prompt, params, stream=live)
        except RequestError as error:
            if len(prompts) == 1:
                raise
            raise RequestError(f"prompt {index} of {len(prompts)}: {error}", error.param, error.code) from error
    done: dict[int, RequestOutput] = {}
    following = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                done[int(output.request_id)] = output
                if bar is not None:
                    bar.update(1)
            elif live:
                yield int(output.request_id), output
        while following in done:
            yield following, done.pop(following)
            following += 1
    assert following == len(prompts), "a request ended without a result"


def write_all(results: Iterable[tuple[int, RequestOutput]], write: Callable[[int, RequestOutput], int],
              bar: Any = None) -> int:
    """Write every result; returns 1 when any ended with an error, else 0."""
    code = 0
    for index, output in results:
        with nullcontext() if bar is None else bar.external_write_mode():
            code = max(code, write(index, output))
            sys.stdout.flush()
    return code


def _load(config: EngineConfig) -> "LLMEngine":
    from octavo.llm import LLMEngine  # loads torch, which --help and a wrong flag must not

    try:
        return LLMEngine.from_engine_args(config)
    except ModelError as error:
        raise with_hint(error, config) from error


def _longest(engine: "LLMEngine") -> int:
    info = engine.group.info
    return min(info.max_model_len, info.num_blocks * info.block_size)


def _bar(total: int) -> Any:
    from tqdm import tqdm  # 30 ms, and only a terminal wants it

    return tqdm(total=total, desc="Processed prompts", unit="req", dynamic_ncols=True, file=sys.stderr)


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
    print(_heading(index, output))
    for completion in output.outputs:
        mark = f"({completion.index + 1}) " if len(output.outputs) > 1 else ""
        print(mark + _body(completion) + _reason(completion))
    return _close_text(index, output)


class LiveText:
    """``write_text`` for a single result of one continuation, called with every state that it goes through."""

    def __init__(self) -> None:
        self._shown: str | None = None

    def __call__(self, index: int, output: RequestOutput) -> int:
        """Write what is new; returns 1 when the result ended with an error, else 0."""
        completion = output.outputs[0]
        if self._shown is None:
            self._shown = ""
            print(_heading(index, output))
        # Stripped texts grow as their texts do: what stands at an end now is written once something follows it.
        text = _body(completion) if output.finished else completion.text.strip()
        print(text[len(self._shown):], end="")
        self._shown = text
        if not output.finished:
            return 0
        print(_reason(completion))
        return _close_text(index, output)


def _heading(index: int, output: RequestOutput) -> str:
    prompt = f"{len(output.prompt_token_ids)} token ids" if output.prompt is None else " ".join(output.prompt.split())
    return f"[{index}] {prompt[:100]}{'...' if len(prompt) > 100 else ''}"


def _body(completion: CompletionOutput) -> str:
    return (completion.text or " ".join(map(str, completion.token_ids))).strip()


def _reason(completion: CompletionOutput) -> str:
    return "" if completion.finish_reason == "stop" else f"  [{completion.finish_reason}]"


def _close_text(index: int, output: RequestOutput) -> int:
    print()
    if output.error is not None:
        print(f"octavo: error: prompt {index}: {output.error}", file=sys.stderr)
    return int(output.error is not None)
