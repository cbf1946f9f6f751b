"""Speed of the norms, the activations and the writes to the cache on this GPU, against a copy's bandwidth measured beside them.

Few rows are what a decode step gives between two products: time of a call in a graph, inputs in the second-level cache as they
are there. 4096 rows are a prefill: bytes read and written over time, buffers rotated so that they come from memory. Swapping is
measured in both directions against a plain copy of pinned memory. Prints a table for people and one JSON object as the last line:

    python benchmarks/kernels_pointwise.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache

import torch
from timing import seconds
from torch import Tensor

from octavo import ops

MODELS = {  # hidden, intermediate, q heads, kv heads, head_dim
    "0.6B": (1024, 3072, 16, 8, 128),
    "1B": (2048, 8192, 32, 8, 64),
    "8B": (4096, 14336, 32, 8, 128),
}
FEW, MANY = (1, 32, 256), 4096
REPLAYS = 9
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
Case = tuple[Callable[[], None], int]  # a call on buffers of its own, and the bytes it has to move


def new(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, device="cuda").to(dtype)


def graph_time(calls: list[Callable[[], None]]) -> float:
    """Seconds of one call; few calls are repeated, so that the graph takes long enough for a stable reading."""
    return seconds(calls * max(1, 64 // len(calls)), REPLAYS)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of torch's best copy of a tensor that is far larger than any cache."""
    a, b = new(1 << 28), new(1 << 28)
    return 4 * a.numel() / min(graph_time([call] * 4) for call in (lambda: b.copy_(a), lambda: torch.neg(a, out=b)))


@lru_cache
def copy_time(size: int) -> float:
    """Seconds in which torch copies so much that `size` bytes are read and written: small copies are slower than large ones."""
    pairs = [(new(size // 4), new(size // 4)) for _ in range(max(4, min(64, (256 << 20) // size)))]
    return graph_time([lambda a=a, b=b: torch.neg(a, out=b) for a, b in pairs])


def norm_case(name: str, rows: int, hidden: int) -> Case:
    x, weight, stream = new(rows, hidden), new(hidden, dtype=torch.float32), new(rows, hidden, dtype=torch.float32)
    eight = name.endswith("fp8")
    out = new(rows, hidden, dtype=E4M3 if eight else BF16)
    scale = [new(rows, dtype=torch.float32)] if eight else []
    residual = [stream] if name.startswith("add") else []
    last = (weight, 1e-6, 0.0) if "rms" in name else (weight, weight, 1e-6)
    call = getattr(ops, name)
    return lambda: call(out, *scale, *residual, x, *last), rows * hidden * (2 + out.element_size() + 8 * len(residual))


def activation_case(name: str, rows: int, width: int, kind: str) -> Case:
    eight = name.endswith("fp8")
    x, out = new(rows, 2 * width), new(rows, width, dtype=E4M3 if eight else BF16)
    scale = [new(rows, dtype=torch.float32)] if eight else []
    call = getattr(ops, name)
    return lambda: call(out, *scale, x, kind), rows * width * (4 + out.element_size())


def head_case(rows: int, heads: tuple[int, int, int], normed: bool, kv: torch.dtype) -> Case:
    q_heads, kv_heads, dim = heads
    qkv = new(rows, q_heads + 2 * kv_heads, dim)
    q, k, v = qkv.split([q_heads, kv_heads, kv_heads], 1)
    caches = [new(-(-rows // 16) + 1, 16, kv_heads, dim, dtype=kv) for _ in range(2)]
    slots, table = torch.randperm(rows, device="cuda"), new(8192, dim, dtype=torch.float32)
    positions = torch.arange(rows, device="cuda")
    weights = [new(dim, dtype=torch.float32) if normed else None] * 2
    size = rows * dim * (4 * q_heads + 2 * kv_heads * (2 + caches[0].element_size()) + 4)  # with a row of the table
    scale = 1.0 if kv == BF16 else 0.05
    return lambda: ops.rotate_and_cache(
        q, k, v, *caches, slots, positions, table, False, *weights, 1e-6, 0.0, scale, scale
    ), size


def write_case(rows: int, heads: tuple[int, int, int], gather: bool) -> Case:
    _, kv_heads, dim = heads
    key, value = new(rows, kv_heads, dim), new(rows, kv_heads, dim)
    caches = [new(-(-rows // 16) + 1, 16, kv_heads, dim) for _ in range(2)]
    slots = torch.randperm(rows, device="cuda")
    call = ops.gather_kv if gather else ops.write_kv
    return lambda: call(key, value, *caches, slots), 8 * rows * kv_heads * dim


def lookup_case(rows: int, hidden: int, table: Tensor) -> Case:
    ids, out = torch.randint(0, len(table), (rows,), device="cuda"), new(rows, hidden, dtype=torch.float32)
    return lambda: ops.lookup(out, ids, table), 6 * rows * hidden


def cases_of(model: str) -> dict[str, Callable[[int], Case]]:
    hidden, width, *rest = MODELS[model]
    heads = (rest[0], rest[1], rest[2])
    table = new(32000, hidden)
    names = ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "rms_norm_fp8", "add_rms_norm_fp8")
    cases: dict[str, Callable[[int], Case]] = {name: lambda n, name=name: norm_case(name, n, hidden) for name in names}
    cases["silu gated"] = lambda n: activation_case("gated_activation", n, width, "silu")
    cases["gelu gated"] = lambda n: activation_case("gated_activation", n, width, "gelu")
    cases["silu gated fp8"] = lambda n: activation_case("gated_activation_fp8", n, width, "silu")
    cases["rotate_and_cache"] = lambda n: head_case(n, heads, False, BF16)
    cases["rotate_and_cache norm"] = lambda n: head_case(n, heads, True, BF16)
    cases["rotate_and_cache norm fp8"] = lambda n: head_case(n, heads, True, E4M3)
    cases["write_kv"] = lambda n: write_case(n, heads, False)
    cases["gather_kv"] = lambda n: write_case(n, heads, True)
    cases["lookup"] = lambda n: lookup_case(n, hidden, table)
    return cases


def rotated(make: Callable[[int], Case], rows: int) -> float:
    """Time of a call over buffers that together exceed the cache, or over 16 where rows are few."""
    first = make(rows)
    count = 16 if rows < MANY else max(4, min(64, (256 << 20) // first[1]))
    return graph_time([first[0], *(make(rows)[0] for _ in range(count - 1))])


def swap_rates() -> dict[str, float]:
    """GB/s of swapping 64 blocks of an 8B model (pieces of 32 KiB, 2 MiB a block), and of plain copies of as much."""
    layers, blocks = 32, 64
    pool, host = new(layers, 2, blocks, 16, 8, 128), torch.zeros(layers, 2, blocks, 16, 8, 128, dtype=BF16).pin_memory()
    pairs = torch.stack([torch.randperm(blocks), torch.randperm(blocks)], 1).int()
    size = pool.numel() * 2

    def rate(call: Callable[[], object]) -> float:
        times = []
        for _ in range(6):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3)
        return size / sorted(times)[2] * 1e-9

    return {
        "swap out": rate(lambda: ops.swap_blocks(pool, host, pairs)),
        "plain copy out": rate(lambda: host.copy_(pool, non_blocking=True)),
        "swap in": rate(lambda: ops.swap_blocks(host, pool, pairs)),
        "plain copy in": rate(lambda: pool.copy_(host, non_blocking=True)),
    }


def copy_blocks_rate() -> float:
    """Bytes per second, read and written, of copying 32 blocks of an 8B model."""
    pool = new(32, 2, 64, 16, 8, 128)
    pairs = torch.randperm(64).view(32, 2).int()
    return pool.numel() * 2 / graph_time([lambda: ops.copy_blocks(pool, pairs)])


def main() -> None:
    ops.load_cuda()
    bandwidth = copy_bandwidth()
    figures: dict[str, dict[str, object]] = {"copy": {"value": round(bandwidth * 1e-12, 3), "unit": "TB/s"}}
    print(f"{torch.cuda.get_device_name()}: copy {bandwidth * 1e-12:.2f} TB/s")
    print(f"{'':34}" + "".join(f"{f'us at {n}':>11}" for n in (*FEW, MANY)) + f"{'TB/s':>8}{'share':>7}{'copy us':>9}")
    for model in MODELS:
        for name, make in cases_of(model).items():
            times = [rotated(make, n) for n in (*FEW, MANY)]
            size = make(MANY)[1]
            rate, like = size / times[-1], copy_time(size)
            row = "".join(f"{t * 1e6:11.2f}" for t in times)
            print(f"{model:5}{name:29}{row}{rate * 1e-12:8.2f}{rate / bandwidth:7.0%}{like * 1e6:9.2f}", flush=True)
            figures[f"{name}, {model}, {MANY} rows"] = {
                "value": round(rate * 1e-12, 3), "unit": "TB/s", "ceiling": round(bandwidth * 1e-12, 3),
                "peer": round(size / like * 1e-12, 3),
            }
            figures[f"{name}, {model}, 1 row"] = {"value": round(times[0] * 1e6, 2), "unit": "us"}
            torch.cuda.empty_cache()
    rate = copy_blocks_rate()
    figures["copy_blocks"] = {"value": round(rate * 1e-12, 3), "unit": "TB/s", "ceiling": round(bandwidth * 1e-12, 3)}
    rates = swap_rates()
    print(f"copy_blocks {rate * 1e-12:.2f} TB/s; GB/s: " + ", ".join(f"{name} {value:.1f}" for name, value in rates.items()))
    for way in ("out", "in"):
        figures[f"swap {way}"] = {
            "value": round(rates[f"swap {way}"], 1), "unit": "GB/s", "ceiling": round(rates[f"plain copy {way}"], 1)
        }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
