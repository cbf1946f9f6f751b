"""Requests that arrive at random while others decode: what a reader of a stream sees.

A driver over LLMEngine (add_request, step): lengths of benchmarks/workloads/sharegpt_like.json, arrivals of a Poisson process
at a share of the offline throughput, small steps (max_num_batched_tokens) so that prompts slip in between decodes. Reported:
time to the first token, time between the tokens of a request, the time of a step that only decodes with as many rows as the
engine usually had, the 99th percentile of the first over the second (wanted: at most 2), and the share of steps that replayed
a graph (wanted: at least 95 %). The first requests warm up and do not count. A table for people, the last line JSON.

    python benchmarks/poisson.py --model benchmarks/models/llama-3.2-1b --offline 50000   # output tok/s; without it: measured now
"""

import argparse
import datetime
import gc
import itertools
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
LENGTHS = ROOT / "benchmarks" / "workloads" / "sharegpt_like.json"
MOST_RATIO, LEAST_GRAPHS = 2.0, 0.95
NEAR = 0.125  # how far the rows of a step may be from the usual number to count as "as many rows"
DECODE_PROBE = 64  # steps of pure decoding that are run afterwards when too few of that kind came by themselves


@dataclass
class Step:
    """One call of ``step``: when it returned, seconds since the one before it, and what the step that it reports computed."""

    at: float
    seconds: float
    prompt_tokens: int
    rows: int


@dataclass
class Measured:
    """What the driver saw.

    Attributes:
        first: seconds to the first token. between: seconds between tokens of a request. steps: all of them.
        graph_steps, runner_steps: of the runner, None where it does not count.
    """

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    graph_steps: int | None = None
    runner_steps: int | None = None


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parse(argv)
    from octavo import EngineArgs, LLMEngine
    from octavo.bench.workload import read_lengths

    gc.freeze()  # as docs/python-api.md advises whoever drives an engine
    work = read_lengths(str(LENGTHS))
    lengths = list(work.lengths)[: args.requests] if args.requests else list(work.lengths)
    offline = args.offline or offline_rate(args)
    rate = args.share * offline / (sum(o for _, o in lengths) / len(lengths))
    engine = LLMEngine.from_engine_args(EngineArgs(**{
        "model": str(args.model), "dtype": "bfloat16", "load_format": "dummy", "skip_tokenizer_init": True,
        "max_model_len": 4096, "device": args.device, "disable_log_stats": True,
        "max_num_batched_tokens": args.max_num_batched_tokens, "max_num_seqs": min(args.max_num_batched_tokens, 512),
        **args.engine}))
    warm = lengths[: args.warmup]
    drive(engine, warm, rate, args, seed=args.seed + 1)  # graphs that are captured on demand are there afterwards
    found = drive(engine, lengths, rate, args, seed=args.seed)
    usual = int(median(step.rows for step in found.steps if step.rows))
    alone, how = decode_only(engine, found, usual, args)
    engine.engine.check()
    engine.close()
    show(args, found, offline, rate, usual, alone, how)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "benchmarks" / "models" / "llama-3.2-1b")
    parser.add_argument("--offline", type=float, help="output tokens a second with everything given at once")
    parser.add_argument("--share", type=float, default=0.8, help="of the offline throughput (default: 0.8)")
    parser.add_argument("--requests", type=int, help="the first so many of the lengths file (default: all)")
    parser.add_argument("--warmup", type=int, default=300, help="requests before those that count (default: 300)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--max-num-batched-tokens", type=int, default=512)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="options of the engine to add or replace")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    return args


def offline_rate(args: argparse.Namespace) -> float:
    """Output tokens a second of the whole workload given at once, by ``octavo bench`` in a process of its own."""
    words = [sys.executable, "-m", "octavo", "bench", "throughput", "--model", str(args.model), "--dtype", "bfloat16",
             "--load-format", "dummy", "--max-model-len", "4096", "--device", args.device, "--lengths", str(LENGTHS),
             "--temperature", str(args.temperature)]
    words += ["--num-prompts", str(args.requests)] if args.requests else []
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    figures = json.loads(done.stdout.splitlines()[-1])["figures"]
    return float(next(figure["value"] for name, figure in figures.items() if name.endswith("/output_tok_s")))


def drive(engine: Any, lengths: Sequence[tuple[int, int]], rate: float, args: argparse.Namespace, seed: int) -> Measured:
    """Send requests as they arrive, step while there is work, and note when tokens come."""
    from octavo import SamplingParams
    from octavo.bench.workload import random_prompts

    rng, clock = random.Random(seed), time.perf_counter
    prompts = random_prompts([p for p, _ in lengths], engine.group.info.vocab_size, 7919 * (seed + 1))
    base = SamplingParams(temperature=args.temperature, ignore_eos=True, detokenize=False)
    params = [base.clone(max_tokens=o) for _, o in lengths]
    due, at = [], 0.0
    for _ in lengths:
        at += rng.expovariate(rate)
        due.append(at)
    found, runner = Measured(), engine.group.runner
    counters = [getattr(runner, name, None) for name in ("graph_steps", "steps")]
    last: dict[str, tuple[int, float]] = {}  # tokens that a request has, and when the last of them came
    stats = engine.engine.stats
    prompt_tokens, generated, sent = stats.prompt_tokens, stats.generated_tokens, 0
    start = before = clock()
    while sent < len(lengths) or engine.has_unfinished_requests():
        now = clock() - start
        while sent < len(lengths) and due[sent] <= now:
            engine.add_request(f"{seed}-{sent}", None, params[sent], prompt_token_ids=prompts[sent])
            last[f"{seed}-{sent}"] = (0, start + due[sent])
            sent += 1
        if not engine.has_unfinished_requests():
            time.sleep(max(0.0, due[sent] - now))
            before = clock()
            continue
        outputs = engine.step()
        now = clock()
        for output in outputs:
            count = len(output.outputs[0].token_ids)
            had, then = last[output.request_id]
            if count > had:
                (found.between if had else found.first).append(now - then)
                last[output.request_id] = (count, now)
            if output.finished:
                assert output.error is None and count == params[int(output.request_id.split("-")[1])].max_tokens, output
        stats = engine.engine.stats
        found.steps.append(Step(now, now - before, stats.prompt_tokens - prompt_tokens, stats.generated_tokens - generated))
        before, prompt_tokens, generated = now, stats.prompt_tokens, stats.generated_tokens
    if all(counter is not None for counter in counters):
        found.graph_steps, found.runner_steps = runner.graph_steps - counters[0], runner.steps - counters[1]
    return found


def decode_only(engine: Any, found: Measured, usual: int, args: argparse.Namespace) -> tuple[float, str]:
    """Median seconds of steps that only decode with about the usual number of rows, and where they come from."""
    def near(steps: list[Step]) -> list[float]:
        pairs = itertools.pairwise(steps)  # a step that follows one with a prompt may still wait for it
        return [b.seconds for a, b in pairs
                if not a.prompt_tokens and not b.prompt_tokens and abs(b.rows - usual) <= max(1, NEAR * usual)]

    seen = near(found.steps)
    if len(seen) >= DECODE_PROBE // 2:
        return median(seen), f"{len(seen)} steps among the others"
    prompt = int(median(p for p, _ in json.loads(LENGTHS.read_text(encoding="utf-8"))))
    probe = drive(engine, [(prompt, DECODE_PROBE * 2)] * usual, 1e9, args, seed=args.seed + 2)
    seen = near(probe.steps)
    return median(seen), f"{len(seen)} steps of {usual} rows that decoded alone afterwards"


def show(args: argparse.Namespace, found: Measured, offline: float, rate: float, usual: int, alone: float, how: str) -> None:
    """The table, then one line of JSON."""
    from octavo.bench.report import json_line, machine, rounded
    from octavo.commands.console import number_text, print_table

    name = f"{args.model.name.lower()}/poisson{round(100 * args.share)}/"
    between, first = np.array(found.between), np.array(found.first)
    p99 = float(np.quantile(between, 0.99))
    mixed = sum(1 for step in found.steps if step.prompt_tokens) / len(found.steps)
    worst = sorted(found.steps, key=lambda step: -step.seconds)[:3]
    figures: dict[str, dict[str, Any]] = {
        "offline_tok_s": {"value": offline, "unit": "tok/s"}, "requests_s": {"value": rate, "unit": "req/s"},
        "ttft_p50_ms": {"value": 1e3 * float(np.median(first)), "unit": "ms"},
        "ttft_p99_ms": {"value": 1e3 * float(np.quantile(first, 0.99)), "unit": "ms"},
        "itl_p50_ms": {"value": 1e3 * float(np.median(between)), "unit": "ms"},
        "itl_p99_ms": {"value": 1e3 * p99, "unit": "ms", "floor": 1e3 * alone},
        "decode_step_ms": {"value": 1e3 * alone, "unit": "ms", "rows": usual},
        "itl_p99_over_decode_step": {"value": p99 / alone, "unit": "", "target": MOST_RATIO},
        "mixed_steps_share": {"value": mixed, "unit": ""},
    }
    notes = [f"decode_step_ms: median of {how}", "longest steps: " + ", ".join(
        f"{1e3 * s.seconds:.1f} ms ({s.rows} rows, {s.prompt_tokens} prompt tokens)" for s in worst)]
    if found.graph_steps is None or not found.runner_steps:
        notes.append("graph_share is missing: the runner counts no graph_steps and steps")
    else:
        figures["graph_share"] = {"value": found.graph_steps / found.runner_steps, "unit": "", "target": LEAST_GRAPHS}
    rows = [(key, f["unit"], number_text(f["value"]), number_text(f["target"]) if "target" in f else "-")
            for key, f in figures.items()]
    print_table(f"{args.model.name}, {rate:.1f} requests a second, steps of {args.max_num_batched_tokens} tokens",
                ("figure", "unit", "value", "target"), rows, numeric={2, 3})
    for note in notes:
        print(f"note: {note}")
    rounding = {key: {k: rounded(v) if isinstance(v, float) else v for k, v in f.items()} for key, f in figures.items()}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    print(json_line({**machine(), "date": date, "command": " ".join(["python", "benchmarks/poisson.py", *args.argv]),
                     "figures": {name + key: value for key, value in rounding.items()}, "notes": notes}))


if __name__ == "__main__":
    sys.exit(main())
