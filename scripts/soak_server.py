"""Load a server for a long time and in earnest: the runs L01 to L14 of tests/serving/loads.py in full size.

    make soak                       # all of them, some minutes
    make soak SOAK="--minutes 60"   # the mix of the end takes an hour
    make soak SOAK="--only burst churn"

Starts its own server around a tiny random model, prints a line per run and ends with exit code 1 when a promise was broken.
The run of two replicas behind a proxy (L13) needs a proxy and is not here; L09 is the run "preemption".
"""

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "serving"))

import loads
import tinymodel
from crowd import Crowd
from loads import Figures
from served import Served, memory
from web import completion

MAX_GROWTH = 1 << 20
"""Bytes by which a process may grow per 10,000 requests, once it is warm."""


def stream(number: int) -> dict[str, Any]:
    return completion(f"Client {number}", stream=True, max_tokens=600 if number % 10 else 60)


def whole(number: int) -> dict[str, Any]:
    return stream(number) | {"stream": False}


def prefill(number: int) -> dict[str, Any]:
    return completion([3 + (number + 7 * n) % 300 for n in range(2000 if number % 10 else 100)], max_tokens=8)


def several(number: int) -> dict[str, Any]:
    return completion(f"Client {number}", n=8, seed=number, temperature=1.0, max_tokens=100 if number % 10 else 20)


def lists(number: int) -> dict[str, Any]:
    return completion([f"Prompt {n} of {number}" for n in range(64)], max_tokens=40 if number % 10 else 4)


async def burst(served: Served, seconds: float) -> Figures:
    return await loads.burst(served, 2000, 512) | await loads.patient(served, 800)


async def storms(served: Served, seconds: float) -> Figures:
    figures = {}
    for make, clients in ((stream, 1000), (prefill, 400), (whole, 1000), (several, 200), (lists, 60)):
        figures[f"{make.__name__}: left"] = (await loads.storm(served, make, clients, 10 if make is stream else 3, 2.0))["left"]
    return figures | await loads.freed(served, lambda number: stream(10 * number + 1), 50, 0.5)


async def preemption(served: Served, seconds: float) -> Figures:
    """128 clients on a pool of an eighth; compared with a server of the usual size."""
    crowd = await Crowd(served, 128, max_tokens=150).replies()
    alone = await loads.alone(served, Crowd.bodies_of(128, max_tokens=150)[::8])
    assert [reply.token_ids for reply in crowd][::8] == alone
    assert served.look()["preempted"] > 0
    return {"preempted": served.look()["preempted"]}


async def mix(served: Served, seconds: float) -> Figures:
    """L14: everything again and again, and the memory of both processes over it."""
    began, requests, series = time.monotonic(), 0.0, list[tuple[float, tuple[int, int]]]()
    while time.monotonic() - began < seconds:
        requests += (await loads.closed_loop(served, 10.0, 64, seed=len(series)))["requests"]
        requests += sum((await loads.poison(served, 5.0, 32, seed=len(series))).values())
        requests += (await loads.storm(served, stream, 200, 1, 1.0, seed=len(series)))["left"]
        series.append((requests, (memory(served.pid), memory(served.engine_pid))))
    figures: Figures = {"requests": requests}
    warm = series[len(series) // 3 :]
    for place, name in enumerate(("API", "engine")):
        per_request = slope([(count, sizes[place]) for count, sizes in warm])
        figures[f"{name} KiB per 10k"] = per_request * 10_000 / 1024
        # A slope over less than this is noise of the allocator.
        assert warm[-1][0] - warm[0][0] < 20_000 or per_request * 10_000 < MAX_GROWTH, f"{name} process grows"
    return figures


def slope(points: list[tuple[float, int]]) -> float:
    """Of the line through some points, by least squares."""
    x, y = sum(p[0] for p in points) / len(points), sum(p[1] for p in points) / len(points)
    width = sum((p[0] - x) ** 2 for p in points)
    return sum((p[0] - x) * (p[1] - y) for p in points) / width if width else 0.0


@dataclass(frozen=True)
class Run:
    """A run: what it does, and on what server."""

    name: str
    what: str
    work: Callable[[Served, float], Coroutine[Any, Any, Figures]]
    options: tuple[str, ...] = ()
    server: dict[str, Any] = field(default_factory=dict)


RUNS = (
    Run("closed-loop", "L01: 256 clients", lambda served, seconds: loads.closed_loop(served, seconds, 256)),
    Run("burst", "L02: 2000 calls at once", burst),
    Run("storms", "L03 to L06: nine of ten leave", storms),
    Run("fuzz", "L07: leave and ask again", lambda served, seconds: loads.fuzz(served, 2000)),
    Run("poison", "L08: bad among good", lambda served, seconds: loads.poison(served, seconds, 64)),
    Run("preemption", "L09: too small a pool", preemption, ("--max-model-len", "512"), {"blocks": 64}),
    Run("schemas", "L10: 10,000 schemas", lambda served, seconds: loads.schemas(served, 10_000, 16)),
    Run("long-and-short", "L11: long prompts beside short", lambda served, seconds: loads.long_and_short(served, seconds, 60)),
    Run("churn", "L12: connections", lambda served, seconds: loads.churn(served, int(500 * seconds), 200)),
    Run("mix", "L14: all of it, and the memory", mix),
)


def soak(run: Run, model: Path, seconds: float) -> Figures:
    """One run on a fresh server, with what must hold afterwards."""
    with Served(model, *run.options, **run.server) as served:
        figures = asyncio.run(run.work(served, seconds))
        served.settle(within=5.0)
        served.check_descriptors()
        assert served.end() == 0
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description="Load a server in earnest and see what it promises.")
    parser.add_argument("--minutes", type=float, default=2.0, help="of each run that has no end of its own")
    parser.add_argument("--only", nargs="+", choices=[run.name for run in RUNS], help="these runs")
    args = parser.parse_args()
    broken = 0
    with tempfile.TemporaryDirectory() as folder:
        model = tinymodel.save(Path(folder))
        for run in RUNS:
            if args.only and run.name not in args.only:
                continue
            began = time.monotonic()
            try:
                figures = soak(run, model, 60.0 * args.minutes)
                said = "ok      " + ", ".join(f"{name} {value:g}" for name, value in figures.items())
            except Exception as error:
                broken += 1
                said = f"BROKEN  {type(error).__name__}: {str(error)[:600]}"
            print(f"{run.name:15} {run.what:32} {time.monotonic() - began:7.1f} s  {said}", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
