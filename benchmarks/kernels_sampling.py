"""Sampling kernels: time of greedy, temperature, cut rows and log-probabilities against reading the logits once.

    python benchmarks/kernels_sampling.py [--rows 1 8 32 256 1024] [--vocab 128256 151936] [--quick]

A figure is the median of graph replays, each over buffers that together exceed the L2 cache. The floor of every case is one
read of the logits at COPY_BANDWIDTH. "wide" logits are normal with deviation 3, so that top_p 0.9 keeps thousands of tokens;
the others have eight peaks in each row as well, as a language model's have.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial

import torch
from timing import seconds

import octavo.ops as ops

COPY_BANDWIDTH = 3.0e12
CACHE = 50 << 20

# temperature, top_k, top_p, min_p
CASES: dict[str, tuple[float, int, float, float]] = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "temperature": (0.8, 0, 1.0, 0.0),
    "top_k 50": (0.8, 50, 1.0, 0.0),
    "top_p 0.9": (0.8, 0, 0.9, 0.0),
    "k+p+min_p": (0.8, 50, 0.9, 0.02),
    "wide top_p 0.9": (1.0, 0, 0.9, 0.0),
}


def microseconds(calls: list[Callable[[], None]]) -> float:
    """Of one call; few calls are repeated, so that the graph takes long enough for a stable reading."""
    return 1e6 * seconds(calls * max(1, 40 // len(calls)))


def make_logits(rows: int, vocab: int, peaks: int) -> torch.Tensor:
    logits = torch.randn(rows, vocab, device="cuda") * 3
    if peaks:
        at = torch.randint(0, vocab, (rows, peaks), device="cuda")
        logits.scatter_(1, at, 14 + 6 * torch.rand(rows, peaks, device="cuda"))
    return logits


def sampling(buffers: list[torch.Tensor], case: tuple[float, int, float, float]) -> float:
    rows = buffers[0].shape[0]
    temperature, top_k, top_p, min_p = case

    def column(value: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.full((rows,), value, dtype=dtype, device="cuda")

    columns = (column(temperature, torch.float32), column(top_k, torch.int32), column(top_p, torch.float32),
               column(min_p, torch.float32), torch.arange(rows, device="cuda"), column(0, torch.int32), column(7, torch.int32))
    tokens = column(-1, torch.int32)
    return microseconds([partial(ops.sample, tokens, x, *columns) for x in buffers])


def logprobs(buffers: list[torch.Tensor], k: int) -> float:
    rows = buffers[0].shape[0]
    tokens = torch.arange(rows, dtype=torch.int32, device="cuda")
    logprob, rank, top = torch.empty(rows, device="cuda"), torch.empty_like(tokens), torch.empty(rows, k, device="cuda")
    ids = torch.empty(rows, k, dtype=torch.int32, device="cuda")
    return microseconds([partial(ops.token_logprobs, logprob, rank, ids, top, x, tokens) for x in buffers])


def penalties(buffers: list[torch.Tensor]) -> float:
    rows, vocab = buffers[0].shape
    counts = torch.zeros(rows, vocab, dtype=torch.int32, device="cuda")
    counts[:, ::997] = 1
    prompt = torch.zeros(rows, vocab, dtype=torch.bool, device="cuda")
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    amounts = [torch.full((rows,), x, device="cuda") for x in (1.1, 0.1, 0.0)]
    return microseconds([partial(ops.penalties, x, counts, prompt, slots, *amounts) for x in buffers])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 256, 1024])
    parser.add_argument("--vocab", type=int, nargs="+", default=[128256, 151936])
    parser.add_argument("--quick", action="store_true", help="one vocabulary, three sizes")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.vocab = [1, 32, 256], [151936]
    ops.load_cuda()
    torch.manual_seed(0)
    figures: dict[str, dict[str, object]] = {}
    for vocab in args.vocab:
        print(f"vocab {vocab}: us (share of one read at {COPY_BANDWIDTH / 1e12:.1f} TB/s)")
        for rows in args.rows:
            floor = rows * vocab * 4 / COPY_BANDWIDTH * 1e6
            count = max(2, min(40, 2 * CACHE // (rows * vocab * 4) + 1))
            buffers = [make_logits(rows, vocab, 8) for _ in range(count)]
            times = {name: sampling(buffers, case) for name, case in CASES.items() if not name.startswith("wide")}
            times |= {f"logprobs {k}": logprobs(buffers, k) for k in (0, 5, 20)}
            times["penalties"] = penalties(buffers)
            buffers = [make_logits(rows, vocab, 0) for _ in range(count)]
            times |= {name: sampling(buffers, case) for name, case in CASES.items() if name.startswith("wide")}
            table = ", ".join(f"{name} {time:.1f} ({floor / time:.0%})" for name, time in times.items())
            print(f"  {rows:5d} rows, floor {floor:6.1f}: {table}")
            for name, time in times.items():
                figures[f"sampling {name}, {rows} x {vocab}"] = {"value": round(time, 2), "unit": "us", "floor": round(floor, 2)}
            del buffers
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
