"""Speed of decode attention on this CPU: one new token of every sequence over a paged cache, against reading that cache once.

Every call reads another layer of a cache larger than the processor's caches, in blocks that lie in random order, so that keys
and values come from memory as they do in a model. The floor is the bandwidth of a plain sum, timed between the calls. With
``--against`` the same is timed for the kernels of another checkout, in a process of its own and in turns with this one, and the
results of both are compared bit by bit. Prints a table for people and one JSON object as the last line:

    python benchmarks/cpu_attention.py --threads 1 2 --against ../octavo-before
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch
from cpu_timing import CACHES, DTYPES, seconds

LIBRARY = Path("octavo") / "ops" / "_C.so"  # within a checkout
ROOT = Path(__file__).resolve().parent.parent
MODELS = {"SmolLM2-135M": (9, 3, 64), "Llama-3.2-1B": (32, 8, 64), "Llama-3.1-8B": (32, 8, 128)}  # heads, kv heads, head_dim
STEPS = ((1, 512), (1, 4096), (16, 1024), (64, 512))  # sequences, keys of each
BLOCK = 16


class Decode:
    """The tensors of one step, the same in every process, and the call on layer i of its cache."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, sequences: int, keys: int, dtype: str) -> None:
        random = torch.Generator().manual_seed(0)
        per_row = -(-keys // BLOCK)
        num_blocks = sequences * per_row
        self.bytes = 2 * sequences * keys * kv_heads * head_dim * DTYPES[dtype].itemsize
        layers = max(2, -(-CACHES // self.bytes))
        self.cache = torch.empty(layers, 2, num_blocks, BLOCK, kv_heads, head_dim, dtype=DTYPES[dtype])
        self.cache[0].normal_(generator=random)
        self.cache[1:] = self.cache[0]
        self.tables = torch.randperm(num_blocks, generator=random).to(torch.int32).view(sequences, per_row)
        self.rows = torch.arange(sequences, dtype=torch.int32)
        self.starts = torch.arange(sequences + 1, dtype=torch.int32)
        self.contexts = torch.full((sequences,), keys, dtype=torch.int32)
        self.q = torch.randn(sequences, heads, head_dim, generator=random)
        self.out = torch.empty_like(self.q)

    def call(self, i: int) -> None:
        k, v = self.cache[i % len(self.cache)]
        torch.ops.octavo.paged_attention(
            self.out, self.q, k, v, self.tables, self.rows, self.starts, self.contexts, self.q.shape[2] ** -0.5, 0, 0.0, None
        )


def work(library: Path, isa: str) -> None:
    """Answers lines of JSON on stdin: a step to prepare (answer: bytes and a digest of its result), or seconds to spend on it."""
    torch.ops.load_library(str(library))
    torch.ops.octavo.set_isa(isa)
    vector = torch.ones(64 << 20)  # 256 MB
    print(json.dumps(torch.ops.octavo.isa()), flush=True)
    step: Decode | None = None
    with torch.inference_mode():
        for line in sys.stdin:
            asked = json.loads(line)
            answer: dict[str, object]
            if "step" in asked:
                step = None  # one cache at a time
                torch.set_num_threads(asked["threads"])
                step = Decode(*asked["step"])
                step.call(0)
                answer = {"bytes": step.bytes, "digest": hashlib.sha256(step.out.numpy().tobytes()).hexdigest()}
            else:
                assert step is not None
                read = vector.numel() * 4 / seconds(lambda i: vector.sum(), 0.0)
                answer = {"seconds": seconds(step.call, asked["budget"]), "read": read}
            print(json.dumps(answer), flush=True)


class Worker:
    """A process with the kernels of one checkout."""

    def __init__(self, checkout: Path, isa: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work", str(checkout / LIBRARY), "--isa", isa], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )
        self.isa = self._answer()

    def _answer(self) -> dict:  # type: ignore[type-arg]
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())  # type: ignore[no-any-return]

    def ask(self, **what: object) -> dict:  # type: ignore[type-arg]
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.communicate()


def measure(workers: list[Worker], threads: int, dtype: str, args: argparse.Namespace) -> list[dict[str, object]]:
    print(f"\n{threads} threads, {dtype} cache, kernels {workers[0].isa}")
    before = f" {'before us':>10} {'gain':>6} {'bits':>9}" if args.against else ""
    print(f"{'model':>14} {'step':>8} {'us':>9} {'GB/s':>6} {'read':>6} {'of read':>8}{before}")
    figures: list[dict[str, object]] = []
    for model in args.models:
        for sequences, keys in args.steps:
            made = [worker.ask(step=(*MODELS[model], sequences, keys, dtype), threads=threads) for worker in workers]
            rounds = [[worker.ask(budget=args.budget / args.rounds) for worker in workers] for _ in range(args.rounds)]
            times = [median(one[i]["seconds"] for one in rounds) for i in range(len(workers))]
            read = median(answer["read"] for one in rounds for answer in one)
            moved = made[0]["bytes"] / times[0]
            us = times[0] * 1e6
            figure = {
                "threads": threads, "dtype": dtype, "model": model, "sequences": sequences, "keys": keys, "us": round(us, 1),
                "gb_per_s": round(moved / 1e9, 2), "read_gb_per_s": round(read / 1e9, 2),
                "of_read_bandwidth": round(moved / read, 3),
            }
            line = f"{model:>14} {f'{sequences}x{keys}':>8} {us:>9.1f}"
            line += f" {moved / 1e9:>6.1f} {read / 1e9:>6.1f} {moved / read:>8.2f}"
            if args.against:
                gain = median(one[1]["seconds"] / one[0]["seconds"] for one in rounds)
                same = made[0]["digest"] == made[1]["digest"]
                figure |= {"before_us": round(times[1] * 1e6, 1), "gain": round(gain, 3), "same_bits": same}
                line += f" {times[1] * 1e6:>10.1f} {gain:>6.2f} {'same' if same else 'different':>9}"
            print(line, flush=True)
            figures.append(figure)
    return figures


def step_of(word: str) -> tuple[int, int]:
    """Sequences, and keys of each; ValueError for what is neither."""
    sequences, keys = map(int, word.split("x"))
    return sequences, keys


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["bfloat16", "float32"], help="types of the cache")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--steps", type=step_of, nargs="+", default=STEPS, help="sequences x keys of each, such as 1x512")
    parser.add_argument("--budget", type=float, default=0.6, help="seconds for each time, in all rounds together")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each process gets")
    parser.add_argument("--against", type=Path, help="another checkout, built with make ext")
    parser.add_argument("--isa", default="auto", help="plain, avx2, avx512 or auto")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.work:
        work(args.work, args.isa)
        return
    checkouts = [ROOT, args.against.resolve()] if args.against else [ROOT]
    workers = [Worker(path, args.isa) for path in checkouts]
    figures = []
    try:
        for threads in args.threads:
            for dtype in args.dtypes:
                figures += measure(workers, threads, dtype, args)
    finally:
        for worker in workers:
            worker.close()
    from octavo.bench.report import (  # not in a worker, which loads the kernels of one checkout and nothing else
        json_line,
        machine,
    )

    name = ["git", "-C", str(checkouts[-1]), "describe", "--always", "--dirty", "--abbrev=12"]
    before = subprocess.run(name, capture_output=True, text=True).stdout.strip() if args.against else None
    print(json_line({"benchmark": "cpu_attention", **machine(), "against": before, "isa": workers[0].isa, "figures": figures}))


if __name__ == "__main__":
    main()
