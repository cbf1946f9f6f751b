"""The engine's figures on one GPU: decoding, throughput, and with --startup and --checkpoint the time to the first token.

Weights are made up (bf16), no tokenizer is loaded, prompts are random ids that no other run has had, so the prefix cache has
nothing to give. One engine per model serves all of its workloads, in a process of its own: what fails, or does not fit the
--budget of seconds, costs its own figures and no others, and is named in "notes". Every figure has its floor or ceiling beside
it (benchmarks/ceiling.py, with the copy bandwidth of this card measured in the same run), the target that it was promised, and
as "peer" the best that vLLM 0.26 was measured at on an H100 80GB. A table for people, the last line JSON.

    python benchmarks/engine_gpu.py                                    # the workloads: about four minutes on an H100
    python benchmarks/engine_gpu.py --models llama-3.2-1b --workloads single batch32 --temperatures 0
    python benchmarks/engine_gpu.py --startup --checkpoint --workloads  # the starts alone
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import startup
from ceiling import Network, Rates, copy_bandwidth, decode_rate, first_token_seconds, output_rate

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "benchmarks" / "models"
LENGTHS = ROOT / "benchmarks" / "workloads"
SINGLE, BATCH, SHAREGPT, NANO = "single_128_256", "batch32_128_128", "sharegpt_like", "nano"
SHAPES = {SINGLE: (1, 128, 256), BATCH: (32, 128, 128)}
WORKLOADS = {"single": SINGLE, "batch32": BATCH, "sharegpt_like": SHAREGPT, "nano": NANO}
GRACE = 60.0  # seconds beyond its budget after which the process of a model is ended
NAMES = ("qwen3-0.6b", "llama-3.2-1b", "llama-3.1-8b")
# What vLLM 0.26.0 was measured at on an H100 80GB: the best of its runs.
PEER = {
    f"{SINGLE}/decode_tok_s": (571, 602, 154), f"{SINGLE}/ttft_s": (0.0095, 0.0058, 0.0142),
    f"{BATCH}/decode_tok_s": (13738, 15386, 4545),
    f"{SHAREGPT}/t0/output_tok_s": (20141, 23722, 10017), f"{SHAREGPT}/t1/output_tok_s": (18603, 23898, 10414),
    f"{NANO}/t0/output_tok_s": (19450, 23549, 8232), f"{NANO}/t1/output_tok_s": (18967, 27249, 8171),
    "start_to_first_token_s": (91.8, 77.4, 61.4),
}
TARGET = {
    f"{SINGLE}/decode_tok_s": (1300, 900, 175), f"{BATCH}/decode_tok_s": (22000, 24000, 5000),
    f"{SHAREGPT}/t0/output_tok_s": (36000, 50000, 11300), f"{SHAREGPT}/t1/output_tok_s": (36000, 50000, 11300),
    f"{NANO}/t0/output_tok_s": (21500, 36000, 8800), f"{NANO}/t1/output_tok_s": (21500, 36000, 8800),
    "start_above_torch_s": (3, 3, 8), "checkpoint_to_first_token_s": (None, None, 10),
}
Figures = dict[str, dict[str, Any]]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what was asked for and print it."""
    args = parse(argv)
    started = time.monotonic()
    figures: Figures = {}
    notes: list[str] = []
    if args.workloads:
        for model in args.models:
            try:
                (workloads_of if args.here else in_a_process)(model, args, figures, notes)
            except Exception as error:  # the other models have figures of their own to give
                notes.append(f"{model.name}: {type(error).__name__}: {error}")
    if args.startup or args.checkpoint:
        measure_starts(args, figures, notes)
    show(args, figures, notes, time.monotonic() - started)
    return 1 if notes and not figures else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; models become paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(NAMES), help="names below benchmarks/models, or folders")
    parser.add_argument("--workloads", nargs="*", choices=list(WORKLOADS), default=list(WORKLOADS), help="none: only starts")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0], help="of the throughput workloads")
    parser.add_argument("--budget", type=float, default=85.0, help="seconds a model, loading included (default: 85)")
    parser.add_argument("--iterations", type=int, default=3, help="runs of a latency figure that count (default: 3)")
    parser.add_argument("--requests", type=int, help="take only so many of a lengths file")
    parser.add_argument("--quick", action="store_true", help="temperature 0, one iteration, 200 requests: half a minute")
    parser.add_argument("--startup", action="store_true", help="also time processes from their start to a first token")
    parser.add_argument("--checkpoint", action="store_true", help="also write a checkpoint of the last model and start from it")
    parser.add_argument("--checkpoint-dir", type=Path, help="where (default: /dev/shm, else the temporary folder)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", type=json.loads, default={}, metavar="JSON", help="options of the engine to add or replace")
    parser.add_argument("--here", action="store_true", help="measure in this process instead of one per model")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else list(argv)
    if args.quick:
        args.temperatures, args.iterations, args.requests = args.temperatures[:1], 1, args.requests or 200
    args.models = [MODELS / name if (MODELS / name).is_dir() else Path(name) for name in args.models]
    for model in args.models:
        if not (model / "config.json").is_file():
            parser.error(f"{model} holds no config.json")
    return args


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """How every engine here is made."""
    made = {"dtype": "bfloat16", "load_format": "dummy", "skip_tokenizer_init": True, "max_model_len": 4096,
            "device": args.device, "disable_log_stats": True, "seed": args.seed}
    return {**made, **args.engine}


def in_a_process(model: Path, args: argparse.Namespace, figures: Figures, notes: list[str]) -> None:
    """``workloads_of`` in a process of its own: what it had measured before it failed stays."""
    words = [sys.executable, __file__, "--here", "--models", str(model), "--device", args.device, "--budget", str(args.budget),
             "--iterations", str(args.iterations), "--seed", str(args.seed), "--engine", json.dumps(args.engine),
             "--temperatures", *map(str, args.temperatures), "--workloads", *args.workloads]
    words += [] if args.requests is None else ["--requests", str(args.requests)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        watch = threading.Timer(args.budget + GRACE, child.kill)  # a device that hangs costs one model
        watch.daemon = True
        watch.start()
        for line in child.stdout:
            if not line.startswith("{"):
                print(line, end="", flush=True)
                continue
            found = json.loads(line)
            figures |= found["figures"]
            notes += found["notes"]
            for name, figure in found["figures"].items():
                print(f"{name}: {figure['value']:,.4g} {figure['unit']}", flush=True)
    watch.cancel()
    if child.returncode:
        raise RuntimeError(f"its process ended with {child.returncode}; see the output above")


class Budget:
    """Decides what still fits: a workload is expected to run at the pace of what this model has shown, or at its peer's."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self._pace: list[float] = []  # measured rate over the peer's

    @property
    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def learn(self, rate: float, peer: float | None) -> None:
        """A figure has come out."""
        if peer:
            self._pace.append(rate / peer)

    def expects(self, tokens: int, peer: float | None) -> float:
        """Seconds that so many output tokens will take; 0 when nothing is known."""
        return tokens / (peer * (self._pace[-1] if self._pace else 1.0)) if peer else 0.0


def workloads_of(model: Path, args: argparse.Namespace, figures: Figures, notes: list[str]) -> None:
    """All workloads of one model on one engine: what matters most first."""
    from octavo import LLM
    from octavo.bench import latency, throughput
    from octavo.bench.report import json_line
    from octavo.bench.workload import read_lengths, uniform

    budget, name, net = Budget(args.budget), model.name.lower(), Network.read(model)
    rates = Rates(bandwidth=copy_bandwidth(args.device))

    def put(figure: str, value: float, unit: str, **beside: Any) -> None:
        made = {f"{name}/{figure}": entry(name, figure, value, unit, **beside)}
        figures.update(made)
        print(json_line({"figures": made, "notes": []}) if args.here else f"{name}/{figure}: {value:,.4g} {unit}", flush=True)

    def late(figure: str, expected: float) -> bool:
        left = budget.left
        if expected > left:
            notes.append(f"{name}/{figure} was left out: it needs about {expected:.0f} s, and {max(left, 0):.0f} s of the "
                         f"budget of {args.budget:g} s were left")
        return expected > left

    put("copy_bandwidth_tb_s", rates.bandwidth / 1e12, "TB/s")
    begin = time.monotonic()
    llm = LLM(str(model), **options_of(args))
    vocab, tag = llm.llm_engine.group.info.vocab_size, 1000 * args.seed
    put("load_s", time.monotonic() - begin, "s")

    for workload, (batch, prompt, output) in SHAPES.items():
        peer = peer_of(name, f"{workload}/decode_tok_s")
        wanted = [key for key in args.workloads if WORKLOADS[key] == workload]
        runs = args.iterations + 1
        if not wanted or late(workload, budget.expects(runs * batch * output, peer)):
            continue
        tag += 100
        found = latency.measure(llm, uniform(batch, prompt, output), vocab, num_iters_warmup=1, num_iters=args.iterations,
                                seed=tag)
        budget.learn(found.decode_rate, peer)
        put(f"{workload}/decode_tok_s", found.decode_rate, "tok/s", ceiling=decode_rate(net, rates, batch, prompt, output))
        put(f"{workload}/ttft_s", found.figures()["ttft_s"][0], "s", floor=first_token_seconds(net, rates, batch, prompt))
    for temperature in args.temperatures:
        for key in args.workloads:
            if WORKLOADS[key] in SHAPES:
                continue
            figure = f"{WORKLOADS[key]}/t{temperature:g}/output_tok_s"
            path = str(LENGTHS / f"{key}.json")
            whole = read_lengths(path)
            work = whole if args.requests is None else read_lengths(path, min(args.requests, len(whole.lengths)))
            peer = peer_of(name, figure)
            if late(figure, budget.expects(work.num_output_tokens, peer)):
                continue
            tag += 100
            ran = throughput.measure(llm, work, vocab, temperature=temperature, seed=tag)
            rate = work.num_output_tokens / ran.seconds
            budget.learn(rate, peer)
            beside = {} if work is whole else {"requests": len(work.lengths)}
            put(figure, rate, "tok/s", ceiling=output_rate(net, rates, work.lengths), **beside)
    stats = llm.llm_engine.engine.stats
    put("preempted", stats.preempted_recompute + stats.preempted_swap, "sequences")
    if stats.prefix_hits > 0.001 * stats.prompt_tokens:
        notes.append(f"{name}: {stats.prefix_hits} prompt tokens came from the prefix cache, which was meant to stay cold")
    if args.device == "cuda":
        import torch

        put("peak_reserved_gib", torch.cuda.max_memory_reserved() / 2**30, "GiB")
    llm.close()


def measure_starts(args: argparse.Namespace, figures: Figures, notes: list[str]) -> None:
    """Fill in the figures of the starts: each in a fresh process, torch alone in another one of the same run."""
    base = startup.torch_alone(args.device)
    figures["torch/import_and_first_product_s"] = {"value": rounded(base.seconds), "unit": "s"}
    if args.startup:
        for model in args.models:
            note_start(model.name.lower(), base, lambda model=model: startup.engine(str(model), options_of(args)), figures, notes)
    if not args.checkpoint:
        return
    model = args.models[-1]
    name = model.name.lower()
    try:
        size = startup.checkpoint_bytes(json.loads((model / "config.json").read_text(encoding="utf-8")))
        with tempfile.TemporaryDirectory(dir=args.checkpoint_dir or startup.room_for(size)) as folder:
            begin = time.monotonic()
            startup.write_checkpoint(model, Path(folder))
            print(f"{name}: {size / 2**30:.1f} GiB written in {time.monotonic() - begin:.1f} s", flush=True)
            found = startup.engine(folder, {**options_of(args), "load_format": "safetensors"})
        floor = base.seconds + (size / base.link if base.link else 0.0)
        figure = "checkpoint_to_first_token_s"
        figures[f"{name}/{figure}"] = entry(name, figure, found.first_token, "s", floor=floor)
    except Exception as error:
        notes.append(f"{name}/checkpoint: {type(error).__name__}: {error}")


def note_start(name: str, base: startup.Base, run: Any, figures: Figures, notes: list[str]) -> None:
    """The figures of one start from made-up weights."""
    try:
        found = run()
    except Exception as error:
        notes.append(f"{name}/start: {type(error).__name__}: {error}")
        return
    figure = "start_to_first_token_s"
    figures[f"{name}/{figure}"] = entry(name, figure, found.first_token, "s", floor=base.seconds)
    figures[f"{name}/start_above_torch_s"] = entry(name, "start_above_torch_s", found.first_token - base.seconds, "s")
    figures[f"{name}/start_to_ready_s"] = entry(name, "start_to_ready_s", found.ready, "s")


def peer_of(name: str, figure: str, table: dict[str, Any] = PEER) -> float | None:
    """vLLM's figure (or with TARGET ours to reach) for a model that has one."""
    return table[figure][NAMES.index(name)] if figure in table and name in NAMES else None


def entry(name: str, figure: str, value: float, unit: str, **beside: Any) -> dict[str, Any]:
    """A figure with everything that stands beside it."""
    found: dict[str, Any] = {"value": rounded(value), "unit": unit, **{key: rounded(v) for key, v in beside.items()}}
    for key, table in (("target", TARGET), ("peer", PEER)):
        if (other := peer_of(name, figure, table)) is not None:
            found[key] = other
    return found


def rounded(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{value:.4g}")


def show(args: argparse.Namespace, figures: Figures, notes: list[str], seconds: float) -> None:
    """The table, what was left out, then one line of JSON."""
    from octavo.bench.report import json_line, machine
    from octavo.commands.console import number_text, print_table

    if args.here:  # the process that started this one prints the table
        print(json_line({"figures": {}, "notes": notes}))
        return
    where = machine()
    rows = []
    for name, figure in figures.items():
        bound = figure.get("ceiling") or figure.get("floor")
        share = f"{figure['value'] / bound:.2f}" if bound else "-"
        others = [number_text(figure[key]) if key in figure else "-" for key in ("target", "peer")]
        rows.append((name, figure["unit"], number_text(figure["value"]), *others, number_text(bound) if bound else "-", share))
    title = f"{where['gpu'] or where['machine']}, {seconds:.0f} s"
    print_table(title, ("figure", "unit", "octavo", "target", "vLLM", "bound", "of it"), rows, numeric={2, 3, 4, 5, 6})
    for text in notes:
        print(f"note: {text}")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    command = " ".join(["python", "benchmarks/engine_gpu.py", *args.argv])
    print(json_line({**where, "date": date, "command": command, "figures": figures, "notes": notes}))


if __name__ == "__main__":
    sys.exit(main())
