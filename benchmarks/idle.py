"""What the GPU does while a batch decodes, seen from the profiler's trace: idle time between steps, waits of the host, kernels.

Owns the reading of the trace. A step is everything that was launched from the moment its plan went to the device until the next
one did; kernels are matched to launches by the trace's correlation ids, those of a graph included. Reported: the share of time
from the last kernel of a step to the first of the next (wanted: under 3 %), calls by which the host waits (wanted: one event
wait a step, no stream or device synchronisation), kernels a step, and the kernels by time: the instrument for tuning. Tracing
makes kernels and launches slower, so the time of a step without it stands beside. A table for people, the last line JSON.

    python benchmarks/idle.py --model benchmarks/models/llama-3.2-1b --batch 32
"""

import argparse
import bisect
import datetime
import itertools
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = "octavo step"  # the range in which a plan is submitted
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
EVENT_WAIT = re.compile(r"cu(da)?EventSynchronize")
FULL_WAIT = re.compile(  # what allocates or copies through pageable memory waits as well
    r"cu(da)?(Stream|Device|Ctx)Synchronize|cuda(Memcpy|Malloc|Free|HostAlloc|FreeHost)$|cuMem(Alloc|Free)(_v2)?$")
MOST_IDLE = 0.03
WARM = 40


@dataclass
class Kernel:
    """All runs of the kernels of one name: how many, and their microseconds."""

    count: int = 0
    micros: float = 0.0


@dataclass
class Trace:
    """What a trace says about its whole steps.

    Attributes:
        steps: how many. window_us: from the first kernel of the first to the last kernel of the last of them.
        gap_us: from the last kernel of a step to the first of the next, all of them. covered_us: time in which at least one
            kernel or copy ran. calls: of the runtime and the driver by name. kernels: by name.
    """

    steps: int = 0
    window_us: float = 0.0
    gap_us: float = 0.0
    covered_us: float = 0.0
    calls: Counter[str] = field(default_factory=Counter)
    kernels: dict[str, Kernel] = field(default_factory=dict)

    @property
    def idle_share(self) -> float:
        """Share of the time between steps."""
        return self.gap_us / self.window_us if self.window_us else 0.0

    def waits(self, kind: re.Pattern[str]) -> int:
        """Calls whose name is of a kind."""
        return sum(count for name, count in self.calls.items() if kind.match(name))


def analyse(events: Sequence[dict[str, Any]]) -> Trace:
    """Read the events of a Chrome trace. The first and the last marked step may be cut, and are left out."""
    marks = sorted(e["ts"] for e in events if e.get("cat") == "user_annotation" and e.get("name") == MARK)
    found = Trace()
    if len(marks) < 4:
        return found
    first, last = marks[1], marks[-1]

    def step_of(ts: float) -> int:
        return bisect.bisect_right(marks, ts) - 1

    owner: dict[int, int] = {}
    for e in events:
        if e.get("cat") in CALLS and first <= e["ts"] < last:
            found.calls[e["name"]] += 1
            if (correlation := e.get("args", {}).get("correlation")) is not None:
                owner[correlation] = step_of(e["ts"])
    spans: dict[int, tuple[float, float]] = {}
    busy: list[tuple[float, float]] = []
    for e in events:
        if e.get("cat") not in DEVICE_WORK or (step := owner.get(e.get("args", {}).get("correlation"))) is None:
            continue
        begin, end = e["ts"], e["ts"] + e["dur"]
        busy.append((begin, end))
        kernel = found.kernels.setdefault(e["name"], Kernel())
        kernel.count, kernel.micros = kernel.count + 1, kernel.micros + e["dur"]
        if e["cat"] == "kernel":
            old = spans.get(step, (begin, end))
            spans[step] = (min(old[0], begin), max(old[1], end))
    steps = sorted(spans)
    found.steps = len(marks) - 2
    if steps:
        found.window_us = spans[steps[-1]][1] - spans[steps[0]][0]
        found.gap_us = sum(max(0.0, spans[b][0] - spans[a][1]) for a, b in itertools.pairwise(steps))
    until = -1.0
    for begin, end in sorted(busy):
        found.covered_us += max(0.0, end - max(begin, until))
        until = max(until, end)
    return found


def short(name: str) -> str:
    """A kernel's name without its return type and parameters."""
    name = re.sub(r"\(anonymous namespace\)::|octavo::cuda::|^void ", "", name)
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth <= 0 and i:
            return name[:i]
    return name


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    args = parse(argv)
    engine = start(args)
    for _ in range(WARM):
        engine.step()
    seconds = timed(engine, args.steps)
    found = traced(engine, args)
    engine.engine.check()
    engine.close()
    show(args, found, seconds)
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "benchmarks" / "models" / "llama-3.2-1b")
    parser.add_argument("--batch", type=int, default=32, help="requests that decode (default: 32)")
    parser.add_argument("--prompt", type=int, default=128, help="prompt tokens of a request (default: 128)")
    parser.add_argument("--steps", type=int, default=200, help="steps that are traced (default: 200)")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top", type=int, default=25, help="kernels to list (default: 25)")
    parser.add_argument("--keep", type=Path, help="write the trace there, for chrome://tracing or Perfetto")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="options of the engine to add or replace")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    return args


def start(args: argparse.Namespace) -> Any:
    """An engine whose requests all decode, and go on for longer than anything here measures."""
    from octavo import EngineArgs, LLMEngine, SamplingParams
    from octavo.bench.workload import random_prompts

    engine = LLMEngine.from_engine_args(EngineArgs(**{
        "model": str(args.model), "dtype": "bfloat16", "load_format": "dummy", "skip_tokenizer_init": True,
        "max_model_len": 4096, "device": args.device, "disable_log_stats": True, **args.engine}))
    output = 2 * args.steps + WARM + args.batch * args.prompt // 256 + 100
    params = SamplingParams(temperature=args.temperature, ignore_eos=True, detokenize=False, max_tokens=output)
    for i, ids in enumerate(random_prompts([args.prompt] * args.batch, engine.group.info.vocab_size, 1)):
        engine.add_request(str(i), None, params, prompt_token_ids=ids, stream=False)
    stats, before = engine.engine.stats, 0
    while stats.generated_tokens - before < args.batch:  # until a step gives everybody a token: no prompt is left
        before = stats.generated_tokens
        engine.step()
    return engine


def timed(engine: Any, steps: int) -> list[float]:
    """Seconds of steps without the profiler."""
    found, before = [], time.perf_counter()
    for _ in range(steps):
        engine.step()
        now = time.perf_counter()
        found.append(now - before)
        before = now
    return found


def traced(engine: Any, args: argparse.Namespace) -> Trace:
    """Profile steps; every plan that goes to the device is marked."""
    from torch.profiler import ProfilerActivity, profile, record_function

    group = engine.group
    submit = group.submit

    def marked(plan: Any) -> Any:
        with record_function(MARK):
            return submit(plan)

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if args.device == "cuda" else [])]
    group.submit = marked
    try:
        with profile(activities=kinds) as profiler:
            for _ in range(args.steps + 2):
                engine.step()
    finally:
        del group.submit
    with tempfile.TemporaryDirectory() as folder:
        path = args.keep or Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return analyse([e for e in events if e.get("ph") == "X"])


def show(args: argparse.Namespace, found: Trace, seconds: list[float]) -> None:
    """The kernels, the calls, the figures, then one line of JSON."""
    from octavo.bench.report import json_line, machine, rounded
    from octavo.commands.console import number_text, print_table

    steps = max(found.steps, 1)
    figures: dict[str, dict[str, Any]] = {"step_us": {"value": 1e6 * median(seconds), "unit": "us"}}
    notes = []
    if found.kernels:
        total = sum(k.micros for k in found.kernels.values())
        kernels = sum(k.count for k in found.kernels.values())
        event, full = found.waits(EVENT_WAIT), found.waits(FULL_WAIT)
        figures |= {
            "idle_share": {"value": found.idle_share, "unit": "", "target": MOST_IDLE},
            "gap_us": {"value": found.gap_us / steps, "unit": "us"},
            "traced_step_us": {"value": found.window_us / steps, "unit": "us"},
            "device_busy_us": {"value": found.covered_us / steps, "unit": "us"},
            "kernels_a_step": {"value": kernels / steps, "unit": ""},
            "event_waits_a_step": {"value": event / steps, "unit": "", "target": 1},
            "full_waits": {"value": full, "unit": f"in {steps} steps", "target": 0},
        }
        top = sorted(found.kernels.items(), key=lambda item: -item[1].micros)[: args.top]
        rows = [(f"{k.count / steps:.1f}", f"{k.micros / k.count:.2f}", f"{k.micros / steps:.1f}", f"{k.micros / total:.1%}",
                 short(name)[:110]) for name, k in top]
        print_table(f"{args.model.name}, batch {args.batch}: kernels of {steps} steps",
                    ("a step", "mean us", "us a step", "share", "kernel"), rows, numeric={0, 1, 2, 3})
        calls = [(f"{count / steps:.2f}", name) for name, count in found.calls.most_common()]
        print_table("calls of the host", ("a step", "call"), calls, numeric={0})
    else:
        notes.append("the trace holds no kernels: only the time of a step is known" if args.device == "cuda" else
                     "there is no trace of a CPU's kernels: only the time of a step is known")
    print_table("figures", ("figure", "unit", "value", "target"), [
        (key, f["unit"], number_text(f["value"]), number_text(f["target"]) if "target" in f else "-")
        for key, f in figures.items()], numeric={2, 3})
    for note in notes:
        print(f"note: {note}")
    name = f"{args.model.name.lower()}/decode_batch{args.batch}/"
    made = {name + key: {k: rounded(v) if isinstance(v, float) else v for k, v in f.items()} for key, f in figures.items()}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    print(json_line({**machine(), "date": date, "command": " ".join(["python", "benchmarks/idle.py", *args.argv]),
                     "figures": made, "notes": notes}))


if __name__ == "__main__":
    sys.exit(main())
