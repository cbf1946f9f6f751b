"""Throughput of many requests given at once.

Owns the measuring; it does not know tables or JSON. Invariant: the time is from the call to the last token of the last
request, with every token of the workload computed.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from octavo.bench.workload import Offline, Workload, random_prompts, run


@dataclass(frozen=True, slots=True)
class Throughput:
    """Seconds that a workload took.

    Attributes:
        workload: what was computed. temperature: 0 is greedy. seconds: for all of it.
    """

    workload: Workload
    temperature: float
    seconds: float

    def figures(self) -> dict[str, tuple[float, str]]:
        """name -> (value, unit)."""
        work, prefix = self.workload, f"t{self.temperature:g}/"
        return {
            prefix + "output_tok_s": (work.num_output_tokens / self.seconds, "tok/s"),
            prefix + "total_tok_s": ((work.num_prompt_tokens + work.num_output_tokens) / self.seconds, "tok/s"),
            prefix + "request_s": (len(work.lengths) / self.seconds, "req/s"),
            prefix + "elapsed_s": (self.seconds, "s"),
        }


def measure(llm: Offline, workload: Workload, vocab_size: int, *, temperature: float = 0.0, seed: int = 0,
            use_tqdm: bool = False, clock: Callable[[], float] = time.perf_counter) -> Throughput:
    """Run the workload once, after one short request that warms up.

    Args:
        vocab_size: ids of the random prompts lie below it. temperature: of every request.
    """
    run(llm, random_prompts([8], vocab_size, seed + 1), [2], temperature, False)
    prompts = random_prompts([prompt for prompt, _ in workload.lengths], vocab_size, seed)
    start = clock()
    run(llm, prompts, [output for _, output in workload.lengths], temperature, use_tqdm)
    return Throughput(workload, temperature, clock() - start)
