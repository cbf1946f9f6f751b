"""Random traffic for minutes: every kind of parameter, bursts and pauses, aborts in any state; nothing may leak or go wrong.

Rounds of traffic, each run until nothing is left. After every round the engine's own check must hold, no block may be in use,
and the device's memory must be what it was after the first rounds. Among the traffic a probe goes round: the same greedy
request, which must get the same answer as the first time, except where two tokens were nearly as likely. The weights are random
but not made to be small, so that the probe means something.

    python benchmarks/soak_gpu.py --minutes 6
    python benchmarks/soak_gpu.py --minutes 1 --rounds 4 --memory 0.1   # beside others: never more than a tenth of the GPU
"""

import argparse
import datetime
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PROBE_TOKENS, PROBE_EVERY = 24, 25
TIE = 0.6  # nat: what bf16 may do to two logprobs of a model of random weights
SETTLE = 2  # rounds until every graph is captured and every buffer of the allocator is there
WANTED_MINUTES = 6.0
SLACK = 1 << 20  # bytes of live device memory that may come and go
HOST_SLACK = 64 << 20  # bytes by which this process may have grown at the end


@dataclass
class Soak:
    """What happened.

    Attributes:
        seconds, rounds, steps; requests, aborted, tokens; preempted: sequences. reasons: how continuations ended.
        live, reserved: bytes of device memory after each round. host: bytes of this process. probes: answers compared.
        parted: probes that differed at a near tie.
    """

    seconds: float = 0.0
    rounds: int = 0
    steps: int = 0
    requests: int = 0
    aborted: int = 0
    tokens: int = 0
    preempted: int = 0
    probes: int = 0
    parted: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    live: list[int] = field(default_factory=list)
    reserved: list[int] = field(default_factory=list)
    host: list[int] = field(default_factory=list)


class Traffic:
    """One engine and what was asked of it. AssertionError says what is wrong.

    Args:
        engine: an LLMEngine with skip_tokenizer_init. seed: of everything random. most: requests at once.
    """

    def __init__(self, engine: Any, *, seed: int = 0, most: int = 60) -> None:
        info = engine.group.info
        self.engine, self.found = engine, Soak()
        self._rng, self._most = random.Random(seed), most
        self._vocab, self._longest = info.vocab_size, min(info.max_model_len, info.num_blocks * info.block_size)
        self._max_n = min(4, info.max_num_seqs)
        self._open: dict[str, Any] = {}  # request id -> its parameters
        self._shared = self._ids(self._longest // 3)
        self._probe = self._ids(min(40, self._longest // 4))
        self._probe_answer: Any = None
        self._count = 0

    def run(self, seconds: float, *, rounds: int = 6) -> Soak:
        """Traffic for so long, in so many rounds."""
        start = time.monotonic()
        for number in range(rounds):
            self._round(start + seconds * (number + 1) / rounds)
            self._settle()
        self.found.seconds, self.found.rounds = time.monotonic() - start, rounds
        stats = self.engine.engine.stats
        self.found.preempted, self.found.steps = stats.preempted_recompute + stats.preempted_swap, stats.steps
        assert stats.failed_steps == 0, f"{stats.failed_steps} steps failed"
        return self.found

    def _round(self, until: float) -> None:
        rng, wanted = self._rng, self._most
        while time.monotonic() < until:
            if rng.random() < 0.01:
                wanted = rng.choice([0, 1, 3, self._most // 2, self._most, 2 * self._most])
            while self.engine.get_num_unfinished_requests() < wanted and rng.random() < 0.8:
                self._send()
            if not self.engine.has_unfinished_requests():
                self._send()
            self._step()
            if rng.random() < 0.03 and self._open:
                self._abort(rng.choice(list(self._open)))
            if rng.random() < 0.002:
                for name in list(self._open)[:: rng.randint(1, 3)]:
                    self._abort(name)
            if rng.random() < 0.02:
                self.engine.engine.check()

    def _settle(self) -> None:
        """Finish everything, and look at what is left."""
        while self.engine.has_unfinished_requests() or self.engine.engine.has_work():
            self._step()
        assert not self._open, f"never answered: {sorted(self._open)[:5]}"
        self.engine.engine.check()
        stats = self.engine.engine.stats
        assert stats.kv_used == 0 and stats.host_used == 0 and stats.running == 0 and stats.waiting == 0, stats
        found = self.found
        live, reserved = _device_memory()
        found.live.append(live)
        found.reserved.append(reserved)
        found.host.append(_host_memory())
        if len(found.live) > SETTLE:
            assert live <= found.live[SETTLE - 1] + SLACK, f"live device memory after each round: {found.live}"

    def _step(self) -> None:
        for output in self.engine.step():
            if not output.finished:
                continue
            name = output.request_id
            assert name in self._open, f"{name} was answered after its end"
            params = self._open.pop(name)
            assert output.error is None, f"{name} ({params}): {output.error}"
            for completion in output.outputs:
                self.found.reasons[str(completion.finish_reason)] += 1
                self.found.tokens += len(completion.token_ids)
                assert completion.finish_reason in ("stop", "length"), (name, completion.finish_reason)
                assert 1 <= len(completion.token_ids) <= params.max_tokens, (name, len(completion.token_ids))
                assert all(0 <= token < self._vocab for token in completion.token_ids), name
                if params.allowed_token_ids is not None:
                    assert set(completion.token_ids) <= {*params.allowed_token_ids, 2}, name
            if name.startswith("probe"):
                self._compare(output.outputs[0])

    def _compare(self, completion: Any) -> None:
        """The probe's answer against its first one."""
        self.found.probes += 1
        if self._probe_answer is None:
            self._probe_answer = completion
            return
        first = self._probe_answer
        for at, (token, wanted) in enumerate(zip(completion.token_ids, first.token_ids, strict=True)):
            place = first.logprobs[at]
            assert token in place, f"the probe's token {at} is {token}, which was not among the likely ones"
            apart = abs(completion.logprobs[at][token].logprob - place[token].logprob)
            assert apart <= TIE, f"the probe's logprob {at} has moved by {apart}"
            if token != wanted:
                gap = place[wanted].logprob - place[token].logprob
                assert gap <= TIE, f"the probe's token {at} is {token} instead of {wanted}, which was {gap} nat more likely"
                self.found.parted += 1
                return

    def _abort(self, name: str) -> None:
        self.engine.abort_request(name)
        del self._open[name]
        self.found.aborted += 1

    def _ids(self, count: int) -> list[int]:
        return [self._rng.randrange(3, self._vocab) for _ in range(count)]

    def _send(self) -> None:
        from octavo import SamplingParams

        self._count += 1
        self.found.requests += 1
        if self._count % PROBE_EVERY == 1:
            name, prompt = f"probe{self._count}", self._probe
            params = SamplingParams(temperature=0.0, max_tokens=PROBE_TOKENS, logprobs=5, ignore_eos=True, detokenize=False)
        else:
            name, (prompt, params) = str(self._count), self._request()
        self.engine.add_request(name, None, params, prompt_token_ids=prompt, stream=self._rng.random() < 0.5)
        self._open[name] = params

    def _request(self) -> tuple[list[int], Any]:
        """A prompt, often beginning as others do, and parameters of any kind that fit it."""
        from octavo import SamplingParams

        rng, longest = self._rng, self._longest
        length = min(int(rng.expovariate(1 / 40)) + 1, longest // 2) if rng.random() < 0.9 else rng.randint(1, longest // 2)
        prompt = (self._shared[: rng.randint(0, len(self._shared))] if rng.random() < 0.5 else []) + self._ids(length)
        prompt = prompt[: longest - 8]
        room = longest - len(prompt)
        output = rng.randint(1, max(1, min(room, 64 if rng.random() < 0.9 else room)))
        values: dict[str, Any] = {"max_tokens": output, "ignore_eos": rng.random() < 0.5, "detokenize": False}
        if rng.random() < 0.1 and self._max_n > 1:
            width = rng.randint(2, self._max_n)
            values["max_tokens"] = min(output, 64)  # beams grow side by side: the pool must hold all of them
            return prompt, SamplingParams(use_beam_search=True, best_of=width, temperature=0.0, **values)
        values["temperature"] = rng.choice([0.0, 0.0, 0.6, 1.0, 1.4])
        values["n"] = rng.choice([1, 1, 1, 1, rng.randint(1, self._max_n)])
        for name, chance, value in (
                ("top_k", 0.2, rng.randint(1, 50)), ("top_p", 0.2, rng.uniform(0.1, 1.0)), ("min_p", 0.1, rng.uniform(0.0, 0.3)),
                ("repetition_penalty", 0.1, rng.uniform(0.8, 1.4)), ("frequency_penalty", 0.1, rng.uniform(-1.0, 1.0)),
                ("presence_penalty", 0.1, rng.uniform(-1.0, 1.0)), ("seed", 0.5, rng.getrandbits(64)),
                ("logprobs", 0.1, rng.randint(0, 20)), ("prompt_logprobs", 0.05, rng.randint(0, 5)),
                ("min_tokens", 0.1, rng.randint(0, output)), ("stop_token_ids", 0.2, self._ids(3)),
                ("allowed_token_ids", 0.05, self._ids(20)), ("logit_bias", 0.1, {i: rng.uniform(-5, 5) for i in self._ids(4)}),
                ("logits_processors", 0.03, [_cooler])):
            if rng.random() < chance:
                values[name] = value
        return prompt, SamplingParams(**values)


def _cooler(output: list[int], logits: Any) -> Any:
    """A logits processor: the longer the output, the flatter."""
    return logits / (1.0 + 0.01 * len(output))


def _device_memory() -> tuple[int, int]:
    import torch

    if not torch.cuda.is_available():
        return 0, 0
    torch.cuda.synchronize()
    return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()


def _host_memory() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the traffic on a small model of random weights; exit code 1 when something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=WANTED_MINUTES)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--blocks", type=int, default=300, help="of the KV pool: fewer are needed than asked for (default: 300)")
    parser.add_argument("--memory", type=float, help="share of the GPU's memory beyond which an allocation fails (default: none)")
    parser.add_argument("--checksums", action="store_true", help="compare the tables in every step, which waits for the device")
    args = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else list(argv)
    from octavo import EngineArgs, LLMEngine
    from octavo.bench.report import json_line, machine, rounded

    if args.memory is not None and args.device == "cuda":
        import torch

        torch.cuda.set_per_process_memory_fraction(args.memory)
    sys.path.insert(0, str(ROOT / "tests" / "gpu"))
    from support import LLAMA, make_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), LLAMA)
        engine = LLMEngine.from_engine_args(EngineArgs(
            model=folder, dtype="bfloat16", skip_tokenizer_init=True, device=args.device, disable_log_stats=True,
            max_num_seqs=64, num_gpu_blocks_override=args.blocks, swap_space=0.05, max_model_len=512, max_num_batched_tokens=512,
            debug_checksums=args.checksums))
    found = Traffic(engine, seed=args.seed, most=90).run(60 * args.minutes, rounds=args.rounds)
    engine.close()
    settled = min(SETTLE, len(found.host) - 1)
    growth = found.host[-1] - found.host[settled]
    print(f"{found.seconds:.0f} s, {found.steps} steps, {found.requests} requests ({found.aborted} aborted), "
          f"{found.tokens} tokens, {found.preempted} preemptions, {found.probes} probes ({found.parted} parted at a near tie), "
          f"{dict(found.reasons)}")
    print("MiB after each round:", ", ".join(
        f"{name} {[n >> 20 for n in values]}" for name, values in (
            ("live", found.live), ("reserved", found.reserved), ("host", found.host))))
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    figures = {
        "soak/minutes": {"value": rounded(found.seconds / 60), "unit": "min", "target": WANTED_MINUTES},
        "soak/requests": {"value": found.requests, "unit": ""},
        "soak/aborted": {"value": found.aborted, "unit": ""}, "soak/preempted": {"value": found.preempted, "unit": "sequences"},
        "soak/live_growth_bytes": {"value": found.live[-1] - found.live[settled], "unit": "B", "target": SLACK},
        "soak/reserved_growth_bytes": {"value": found.reserved[-1] - found.reserved[settled], "unit": "B"},
        "soak/host_growth_bytes": {"value": growth, "unit": "B", "target": HOST_SLACK},
    }
    print(json_line({**machine(), "date": date, "command": " ".join(["python", "benchmarks/soak_gpu.py", *words]),
                     "figures": figures}))
    return int(growth > HOST_SLACK)


if __name__ == "__main__":
    sys.exit(main())
