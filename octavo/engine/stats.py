"""Stats: what the engine has done and holds, as plain numbers, and the line that a log gets every ten seconds.

Owns the counters; it does not know how they come about. Invariant: counters only grow, gauges are set once per step.
"""

import dataclasses
import logging
from bisect import bisect_left
from collections import Counter

LOG_SECONDS = 10.0
STEP_SIZES = (1, *(2**i for i in range(3, 15)))
"""Up to how many tokens a step has, for counting steps by their size; one more class holds those that are larger."""


@dataclasses.dataclass(slots=True)
class Stats:
    """Counters since the start, and gauges of the last step.

    Attributes:
        running, waiting, swapped: sequences (gauges); swapped ones wait too. compiling: requests that wait for their grammar
            (gauge); they are among the waiting. kv_blocks, kv_used, kv_cached, host_used,
            host_cached: blocks (gauges).
        prefix_queries, prefix_hits: prompt tokens looked up in the prefix cache, and found there.
        prefix_again: prompt tokens that the cache held and that were computed all the same, since something must be.
        prefix_hits_host: those of the hits that came back from the host tier.
        prompt_tokens, generated_tokens: computed tokens that were known before (recomputed ones too), and sampled ones.
        steps, failed_steps; step_sizes: steps that computed something, by STEP_SIZES. preempted_recompute, preempted_swap:
            sequences.
        finished: sequences by reason. requests: accepted ones.
    """

    running: int = 0
    waiting: int = 0
    swapped: int = 0
    compiling: int = 0
    kv_blocks: int = 0
    kv_used: int = 0
    kv_cached: int = 0
    host_used: int = 0
    host_cached: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    prefix_hits_host: int = 0
    prefix_again: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    failed_steps: int = 0
    preempted_recompute: int = 0
    preempted_swap: int = 0
    requests: int = 0
    step_sizes: list[int] = dataclasses.field(default_factory=lambda: [0] * (len(STEP_SIZES) + 1))
    finished: Counter[str] = dataclasses.field(default_factory=Counter)

    def note_step(self, num_prompt: int, num_generated: int) -> None:
        """Count a step that computed so many tokens that were known before, and sampled so many."""
        self.prompt_tokens += num_prompt
        self.generated_tokens += num_generated
        if num_prompt or num_generated:
            self.step_sizes[bisect_left(STEP_SIZES, num_prompt + num_generated)] += 1

    def copy(self) -> "Stats":
        """A copy that the original shares nothing with."""
        return dataclasses.replace(self, finished=Counter(self.finished), step_sizes=list(self.step_sizes))

    @property
    def kv_usage(self) -> float:
        """Share of the blocks that somebody uses, 0 to 1."""
        return self.kv_used / self.kv_blocks if self.kv_blocks else 0.0


class StatsLog:
    """Writes a line about the last ten seconds when they are over.

    Args:
        logger: gets the line at INFO. now: monotonic seconds at the start.
    """

    def __init__(self, logger: logging.Logger, now: float) -> None:
        self._logger, self._since = logger, now
        self._prompt = self._generated = self._queries = self._hits = 0

    def due(self, now: float) -> bool:
        """True when ten seconds have passed since the last line."""
        return now - self._since >= LOG_SECONDS

    def write(self, stats: Stats, now: float) -> None:
        """Write the line and begin the next interval."""
        seconds = now - self._since
        queries, hits = stats.prefix_queries - self._queries, stats.prefix_hits - self._hits
        self._logger.info(
            "in %.1f tokens/s, out %.1f tokens/s, running %d, waiting %d, swapped %d, KV use %.1f %%, prefix hits %.1f %%",
            (stats.prompt_tokens - self._prompt) / seconds, (stats.generated_tokens - self._generated) / seconds,
            stats.running, stats.waiting, stats.swapped, 100.0 * stats.kv_usage, 100.0 * hits / queries if queries else 0.0)
        self._since, self._prompt, self._generated = now, stats.prompt_tokens, stats.generated_tokens
        self._queries, self._hits = stats.prefix_queries, stats.prefix_hits
