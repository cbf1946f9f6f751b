"""Host time of a decode step, everything but the model: schedule, submit to a group that returns at once, update, output.

Rows start with different prompt lengths, so that in every step some need a block, some publish one and some finish; prompts
are distinct, the prefix cache is on and the KV pool is full of old prefixes, so that each new block evicts one; with
--host-blocks they go to a host tier that is full as well, and evict there. Every step of the measured interval is counted,
garbage collection included. Table for people, last line JSON, with the machine and the commit.

    python benchmarks/engine_overhead.py [--rows 256 1024] [--steps 160] [--stream] [--overlap] [--host-blocks 8]
"""

import argparse
import time

import numpy as np

from octavo.bench.report import json_line, machine
from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.messages import EngineRequest
from octavo.params import SamplingParams
from octavo.plan import GroupInfo, StepPlan, StepResult

BLOCK_SIZE, MAX_MODEL_LEN, VOCAB = 16, 1024, 50_000
WARMUP = 32


class Instant:
    """A step that was computed at once."""

    def __init__(self, found: StepResult) -> None:
        self._found = found

    def result(self) -> StepResult:
        return self._found

    def done(self) -> bool:
        return True


class InstantGroup:
    """A group whose steps take no time: random tokens, drawn beforehand."""

    def __init__(self, rows: int, *, asynchronous: bool, host_blocks: int) -> None:
        blocks = rows * 36
        self.info = GroupInfo(
            num_blocks=blocks, num_host_blocks=rows * host_blocks, block_bytes=1 << 16, block_size=BLOCK_SIZE,
            max_model_len=MAX_MODEL_LEN, max_num_seqs=rows, max_num_batched_tokens=1 << 20, vocab_size=VOCAB, device="cpu")
        self.asynchronous = asynchronous
        self._tokens = np.random.default_rng(0).integers(10, VOCAB, rows + 8192, dtype=np.int32)

    def submit(self, plan: StepPlan) -> "Instant":
        at = plan.step % 4096
        return Instant(StepResult(epoch=plan.epoch, step=plan.step, tokens=self._tokens[at : at + len(plan.sample_rows)]))

    def set_processors(self, row: int, generation: int, processors: object, constraint: object = None) -> None:
        raise AssertionError("no request here has processors")

    def host_ready(self) -> bool:
        return True

    def expect_host(self) -> None:
        pass

    def close(self) -> None:
        pass


def measure(rows: int, steps: int, *, stream: bool, overlap: bool, host_blocks: int) -> dict[str, float]:
    """Microseconds per step: mean, median, worst; and what happened in the interval."""
    config = EngineConfig(model="none", disable_log_stats=True, async_scheduling=overlap)
    engine = Engine(config, InstantGroup(rows, asynchronous=overlap, host_blocks=host_blocks), seed=0)
    rng = np.random.default_rng(1)

    def add(i: int, max_tokens: int) -> None:
        prompt = rng.integers(0, VOCAB, int(rng.integers(32, 160))).tolist()
        engine.add(EngineRequest(
            request_id=str(i), prompt_token_ids=prompt, eos_token_ids=(1, 2), stream=stream,
            params=SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=False)))

    for i in range(2 * rows):  # fill the pool with prefixes that nobody uses
        add(-1 - i, 300)
    while engine.has_work():
        engine.step()
    # Most rows outlive the interval; one in eight finishes inside it.
    for i in range(rows):
        inside = i % 8 == 0
        add(i, int(rng.integers(WARMUP + 8, WARMUP + steps)) if inside else WARMUP + steps + int(rng.integers(16, 200)))
    engine.step()
    for _ in range(WARMUP):
        engine.step()
    state = engine._state
    times, ended, appended = [], 0, -state.stats.generated_tokens
    clock = time.perf_counter_ns
    for _ in range(steps):
        begin = clock()
        out = engine.step()
        times.append(clock() - begin)
        ended += len(out.ended)
    appended += state.stats.generated_tokens
    running = state.num_running
    engine.check()
    us = np.array(times) / 1e3
    return {"rows": rows, "mean_us": round(float(us.mean()), 1), "median_us": round(float(np.median(us)), 1),
            "p99_us": round(float(np.quantile(us, 0.99)), 1), "max_us": round(float(us.max()), 1),
            "finished": ended, "running_at_end": running, "tokens": appended}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--stream", action="store_true", help="every request streams")
    parser.add_argument("--overlap", action="store_true", help="plan a step before the last one's tokens are known")
    parser.add_argument("--host-blocks", type=int, default=0, help="host blocks per row; 0: no second tier")
    args = parser.parse_args()
    budget = {256: 200, 1024: 400}
    results = []
    print(f"{'rows':>6} {'mean us':>9} {'median':>9} {'p99':>9} {'max':>9} {'finished':>9} {'budget':>7}")
    for rows in args.rows:
        r = measure(rows, args.steps, stream=args.stream, overlap=args.overlap, host_blocks=args.host_blocks)
        results.append(r)
        print(f"{rows:>6} {r['mean_us']:>9} {r['median_us']:>9} {r['p99_us']:>9} {r['max_us']:>9} {r['finished']:>9}"
              f" {budget.get(rows, '-'):>7}")
    print(json_line({**machine(), "benchmark": "engine_overhead", "steps": args.steps, "stream": args.stream,
                     "overlap": args.overlap, "host_blocks": args.host_blocks, "results": results}))


if __name__ == "__main__":
    main()
