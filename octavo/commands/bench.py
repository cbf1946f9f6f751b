"""``octavo bench latency|throughput|serve``: a table for people, then one line of JSON for programs.

Owns the flags of the two that run an engine in this process, and the order of things; measuring is in ``octavo.bench``,
and ``serve`` is in ``bench_serve``. Invariant: prompts are random token ids and
no tokenizer is loaded, so a folder that holds only config.json is enough with ``--load-format dummy``.
"""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from octavo.commands import bench_serve
from octavo.commands.console import number_text, print_table
from octavo.commands.options import add_engine_args, engine_options, with_hint
from octavo.config import EngineConfig, human_int
from octavo.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from octavo.bench.workload import Workload
    from octavo.llm import LLM

WORDS = {  # figures of the JSON line, in words for the table
    "mean_s": "whole batch, mean", "median_s": "whole batch, median", "p90_s": "whole batch, 90th percentile",
    "ttft_s": "time to the first token, median", "decode_tok_s": "decoding, all requests together",
    "tpot_ms": "time per output token of a request", "output_tok_s": "output tokens",
    "total_tok_s": "prompt and output tokens", "request_s": "requests", "elapsed_s": "time for all",
}
SHAPE = {"num_prompts": 64, "input_len": 128, "output_len": 64}  # throughput without --lengths: seconds on a CPU
NOTE = "Prompts are random token ids; no tokenizer is loaded. The last line of the output is JSON."


def add_parser(commands: Any) -> None:
    """Add the subcommand and its two kinds."""
    parser = commands.add_parser("bench", help="measure latency, throughput or a server", description=f"Measure. {NOTE}")
    kinds = parser.add_subparsers(title="benchmarks", metavar="KIND", dest="kind", required=True)
    latency = kinds.add_parser("latency", help="one batch, again and again", description=f"Time one batch. {NOTE}")
    latency.add_argument("--input-len", type=human_int, default=32, help="prompt tokens of a request (default: 32)")
    latency.add_argument("--output-len", type=human_int, default=128, help="output tokens of a request (default: 128)")
    latency.add_argument("--batch-size", type=human_int, default=8, help="requests at once (default: 8)")
    latency.add_argument("--num-iters-warmup", type=human_int, default=2,
                         help="runs before those that count (default: 2)")
    latency.add_argument("--num-iters", type=human_int, default=10, help="runs that count (default: 10)")
    throughput = kinds.add_parser(
        "throughput", help="many requests at once", description=f"Time many requests given at once. {NOTE}")
    throughput.add_argument("--num-prompts", type=human_int, help="requests (default: 64, or all of --lengths)")
    throughput.add_argument("--input-len", type=human_int, help="prompt tokens of a request (default: 128)")
    throughput.add_argument("--output-len", type=human_int, help="output tokens of a request (default: 64)")
    throughput.add_argument("--lengths", metavar="FILE", help="JSON list of [prompt tokens, output tokens] per request")
    throughput.add_argument("--temperature", type=float, default=0.0, help="of every request (default: 0, greedy)")
    for kind, run in ((latency, run_latency), (throughput, run_throughput)):
        add_engine_args(kind)
        kind.set_defaults(run=run)
    bench_serve.add_kind(kinds)


def run_latency(args: argparse.Namespace) -> int:
    """Measure and print the latency of one batch."""
    from octavo.bench import latency
    from octavo.bench.workload import uniform

    workload = uniform(args.batch_size, args.input_len, args.output_len)
    llm, vocab_size = _load(args)
    try:
        found = latency.measure(llm, workload, vocab_size, num_iters_warmup=args.num_iters_warmup,
                                num_iters=args.num_iters, seed=args.seed, use_tqdm=sys.stderr.isatty())
    finally:
        llm.close()
    _print(args, workload, found.figures())
    return 0


def run_throughput(args: argparse.Namespace) -> int:
    """Measure and print the throughput of a workload."""
    from octavo.bench import throughput
    from octavo.params import SamplingParams

    workload = _workload(args)
    SamplingParams(temperature=args.temperature)  # refuses a bad value before the model is loaded
    llm, vocab_size = _load(args)
    try:
        found = throughput.measure(llm, workload, vocab_size, temperature=args.temperature, seed=args.seed,
                                   use_tqdm=sys.stderr.isatty())
    finally:
        llm.close()
    _print(args, workload, found.figures())
    return 0


def _workload(args: argparse.Namespace) -> "Workload":
    from octavo.bench.workload import read_lengths, uniform

    if args.lengths is None:
        given = SHAPE | {name: getattr(args, name) for name in SHAPE if getattr(args, name) is not None}
        return uniform(**given)
    for name in ("input_len", "output_len"):
        if getattr(args, name) is not None:
            raise ConfigError(f"{name} cannot be combined with lengths, got {getattr(args, name)}.", name)
    return read_lengths(args.lengths, args.num_prompts)


def _load(args: argparse.Namespace) -> "tuple[LLM, int]":
    config = EngineConfig.from_cli_args(args).replace(skip_tokenizer_init=True, disable_log_stats=True)
    from octavo.llm import LLM  # loads torch, which --help and a wrong flag must not

    try:
        llm = LLM(**engine_options(config))
    except ModelError as error:
        raise with_hint(error, config) from error
    return llm, llm.llm_engine.group.info.vocab_size


def _print(args: argparse.Namespace, workload: "Workload", figures: dict[str, tuple[float, str]]) -> None:
    from octavo.bench.report import document, json_line

    title = f"{args.model}: {len(workload.lengths)} requests, {workload.num_prompt_tokens} prompt and " \
            f"{workload.num_output_tokens} output tokens"
    rows = [(_words(name), number_text(value), unit) for name, (value, unit) in figures.items()]
    print_table(title, ("figure", "value", "unit"), rows, numeric={1})
    print(json_line(document(args.model, workload.name, figures, args.argv)))


def _words(name: str) -> str:
    """A figure's name for people: t0/output_tok_s is output tokens, temperature 0."""
    prefix, _, figure = name.rpartition("/")
    return WORDS[figure] + (f", temperature {prefix.removeprefix('t')}" if prefix else "")
