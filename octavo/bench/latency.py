"""Latency of one batch: time from the call to the last token, and to the first.

Owns the measuring; it does not know tables or JSON. Invariant: every iteration has prompts of its own, so nothing is
answered from the prefix cache, and what was run to warm up is not counted.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median, quantiles
from typing import Any

from octavo.bench.workload import Offline, Workload, random_prompts, run
from octavo.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds of the iterations of one batch.

    Attributes:
        workload: one shape, len(lengths) requests.
        seconds: per iteration, until the last token of the batch.
        first_token: per iteration, of the same batch shape with one output token; equal to ``seconds`` when one is all.
    """

    workload: Workload
    seconds: tuple[float, ...]
    first_token: tuple[float, ...]

    @property
    def decode_rate(self) -> float:
        """Output tokens per second after the first, all requests together; 0 when there is only the first."""
        batch, steps = len(self.workload.lengths), self.workload.lengths[0][1] - 1
        span = median(self.seconds) - median(self.first_token)
        return batch * steps / span if steps and span > 0 else 0.0

    def figures(self) -> dict[str, tuple[float, str]]:
        """name -> (value, unit)."""
        found = {"mean_s": (fmean(self.seconds), "s"), "median_s": (median(self.seconds), "s")}
        if len(self.seconds) > 1:
            found["p90_s"] = (quantiles(self.seconds, n=10, method="inclusive")[-1], "s")
        found["ttft_s"] = (median(self.first_token), "s")
        if self.decode_rate:
            batch = len(self.workload.lengths)
            found["decode_tok_s"] = (self.decode_rate, "tok/s")
            found["tpot_ms"] = (1000 * batch / self.decode_rate, "ms")
        return found


def measure(llm: Offline, workload: Workload, vocab_size: int, *, num_iters_warmup: int, num_iters: int, seed: int = 0,
            use_tqdm: bool = False, clock: Callable[[], float] = time.perf_counter) -> Latency:
    """Run one batch several times, greedily.

    Args:
        workload: from ``uniform``. vocab_size: ids of the random prompts lie below it.
        num_iters_warmup: runs that are not counted, 0 or more. num_iters: runs that are, 1 or more.
        use_tqdm: show a bar on stderr that counts runs; it moves between them only.
    """
    for name, value, least in (("num_iters_warmup", num_iters_warmup, 0), ("num_iters", num_iters, 1)):
        if value < least:
            raise ConfigError(f"{name} must be at least {least}, got {value}.", name)
    inputs, outputs = zip(*workload.lengths, strict=True)
    ones = [1] * len(outputs)
    first_runs = 0 if max(outputs) == 1 else num_iters
    bar = _progress(num_iters_warmup + num_iters + first_runs) if use_tqdm else None

    def timed(lens: list[int], salt: int) -> float:
        prompts = random_prompts(inputs, vocab_size, seed + salt)
        start = clock()
        run(llm, prompts, lens, 0.0, False)
        seconds = clock() - start
        if bar is not None:
            bar.update(1)
        return seconds

    for i in range(num_iters_warmup):
        timed(list(outputs), i)
    base = num_iters_warmup
    seconds = [timed(list(outputs), base + i) for i in range(num_iters)]
    first = [timed(ones, base + num_iters + i) for i in range(first_runs)] or seconds
    if bar is not None:
        bar.close()
    return Latency(workload, tuple(seconds), tuple(first))


def _progress(total: int) -> Any:
    from tqdm import tqdm  # only when a bar is shown: its import costs 30 ms

    return tqdm(total=total, desc="Runs of the batch", unit="run", dynamic_ncols=True)
