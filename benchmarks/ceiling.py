"""What one GPU could give at most: bytes and arithmetic. No host, no launch gaps, no kernel that is less than ideal.

Owns the arithmetic behind every floor and ceiling that stands beside an engine figure; it measures nothing but the copy
bandwidth. A step of the model reads every matrix once and the keys and values of every running sequence once; a product takes
the larger of the time for its weights' bytes and the time for its arithmetic, and the parts of a step follow one another.

    python benchmarks/ceiling.py benchmarks/models/llama-3.2-1b benchmarks/workloads/nano.json
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STEP_BUDGET = 16384  # tokens of a step, as the engine's own default
ROWS = (128, 256, 384, 512, 768, 1024)  # max_num_seqs to choose from: the best one is the ceiling
BYTES = 2  # of a weight and of an element of the cache: bf16


@dataclass(frozen=True)
class Rates:
    """What the card does in a second.

    Attributes:
        bandwidth: bytes, read and written ones together. flops: of bf16 products of the shapes of serving; a square product of
            8192 is 10 to 20 % faster, and no layer has that shape.
    """

    bandwidth: float = 3.0e12
    flops: float = 650e12


@dataclass(frozen=True)
class Network:
    """The sizes of a network that cost something.

    Attributes:
        layers, head: weights of the matrices that a token meets, and of the output head. kv_bytes: of a token in the cache.
        attention_flops: per pair of a query and a key, all layers.
    """

    layers: int
    head: int
    kv_bytes: int
    attention_flops: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> "Network":
        """The sizes of a config.json with gated MLP and grouped attention."""
        hidden, count, heads = config["hidden_size"], config["num_hidden_layers"], config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        dim = config.get("head_dim") or hidden // heads
        attention = hidden * dim * (2 * heads + 2 * kv_heads)  # q and o, k and v
        return cls(
            layers=count * (attention + 3 * hidden * config["intermediate_size"]), head=hidden * config["vocab_size"],
            kv_bytes=count * kv_heads * dim * 2 * BYTES, attention_flops=count * heads * dim * 4)

    @classmethod
    def read(cls, folder: Path | str) -> "Network":
        """The sizes of a model folder."""
        return cls.of(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))

    @property
    def weight_bytes(self) -> int:
        """Bytes that every step reads."""
        return BYTES * (self.layers + self.head)


def step_seconds(net: Network, rates: Rates, *, tokens: int, rows: int, kv_tokens: float, prompt_pairs: float = 0.0) -> float:
    """The least time of a step.

    Args:
        tokens: computed ones. rows: those of them whose logits are needed. kv_tokens: read from the cache, all rows together.
        prompt_pairs: pairs of query and key that prompts compute.
    """
    body = max(BYTES * net.layers / rates.bandwidth, 2.0 * net.layers * tokens / rates.flops)
    head = max(BYTES * net.head / rates.bandwidth, 2.0 * net.head * rows / rates.flops)
    return body + head + kv_tokens * net.kv_bytes / rates.bandwidth + net.attention_flops * prompt_pairs / rates.flops


def decode_rate(net: Network, rates: Rates, batch: int, prompt: int, output: int) -> float:
    """Tokens a second after the first one, when ``batch`` requests of one shape decode together: bytes over bandwidth."""
    contexts = np.arange(prompt + 1, prompt + output, dtype=np.float64)  # keys that the second, third, ... token reads
    moved = net.weight_bytes * len(contexts) + batch * net.kv_bytes * contexts.sum()
    return batch * len(contexts) * rates.bandwidth / float(moved)


def first_token_seconds(net: Network, rates: Rates, batch: int, prompt: int) -> float:
    """The least time of one step that computes the prompts of a batch."""
    pairs = batch * prompt * prompt / 2
    return step_seconds(net, rates, tokens=batch * prompt, rows=batch, kv_tokens=0.0, prompt_pairs=pairs)


def workload_seconds(net: Network, rates: Rates, lengths: Sequence[tuple[int, int]], max_seqs: int) -> float:
    """Seconds for requests given at once: admitted in order while rows and the step's budget last, no chunks."""
    prompts = np.array([p for p, _ in lengths], np.int64)
    outputs = np.array([o for _, o in lengths], np.int64)
    context, left = np.empty(0, np.int64), np.empty(0, np.int64)
    seconds, taken = 0.0, 0
    while taken < len(prompts) or len(left):
        tokens, first = len(left), taken
        while taken < len(prompts) and len(left) + taken - first < max_seqs and (
                tokens + prompts[taken] <= STEP_BUDGET or tokens == 0):
            tokens += int(prompts[taken])
            taken += 1
        new = prompts[first:taken]
        seconds += step_seconds(net, rates, tokens=tokens, rows=len(left) + len(new), kv_tokens=float(context.sum()),
                                prompt_pairs=float((new.astype(np.float64) ** 2).sum()) / 2)
        context, left = np.concatenate((context, new)) + 1, np.concatenate((left, outputs[first:taken])) - 1
        going = left > 0
        context, left = context[going], left[going]
    return seconds


def output_rate(net: Network, rates: Rates, lengths: Sequence[tuple[int, int]], rows: Iterable[int] = ROWS) -> float:
    """The most output tokens a second of a workload, with the best max_num_seqs of ``rows``."""
    return sum(o for _, o in lengths) / min(workload_seconds(net, rates, lengths, n) for n in rows)


def copy_bandwidth(device: str) -> float:
    """Bytes a second of a large copy inside the device's memory, read and written ones counted."""
    import torch

    size, rounds = (1 << 30, 12) if device == "cuda" else (1 << 26, 5)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)  # pages and clocks come up
    times = []
    for _ in range(rounds):
        if device == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            target.copy_(source)
            times.append(time.perf_counter() - begin)
    del source, target
    if device == "cuda":
        torch.cuda.empty_cache()
    return 2.0 * size / sorted(times)[rounds // 2]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the ceiling of a lengths file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder with config.json")
    parser.add_argument("lengths", help="JSON list of [prompt tokens, output tokens]")
    args = parser.parse_args(argv)
    lengths = [(p, o) for p, o in json.loads(Path(args.lengths).read_text(encoding="utf-8"))]
    net, rates = Network.read(args.model), Rates()
    total = sum(o for _, o in lengths)
    seconds, rows = min((workload_seconds(net, rates, lengths, n), n) for n in ROWS)
    print(f"{Path(args.model).name} {Path(args.lengths).stem}: {seconds:.2f} s, {total / seconds:,.0f} output tok/s "
          f"with {rows} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
