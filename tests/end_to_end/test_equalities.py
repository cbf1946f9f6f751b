"""The same answer, whatever else runs: tokens and logprobs compared by bytes under --batch-invariant.

Every case runs the same requests twice under different circumstances: cache on or off, other chunk sizes, alone or with
30 others, preempted or not, driven by LLM or by LLMEngine.step, planned ahead or not.
"""

import random
import struct
from pathlib import Path
from typing import Any

import pytest

from octavo import LLM, EngineArgs, LLMEngine, RequestOutput, SamplingParams
from octavo.ops import library

pytestmark = pytest.mark.skipif(not library.built(), reason="bytes are promised by the compiled kernels only")

Answer = list[tuple[list[int], bytes, str | None]]


def requests(seed: int, count: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 120 tokens, half of them with a shared beginning; greedy and sampled, with and without extras."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, 211) for _ in range(70)]
    found = []
    for i in range(count):
        prompt = [rng.randrange(3, 211) for _ in range(rng.randint(1, 50))]
        if i % 2:
            prompt = shared[: rng.randint(1, 70)] + prompt
        extras: dict[str, Any] = [
            {"temperature": 0.0},
            {"temperature": 1.0},
            {"temperature": 0.7, "top_p": 0.8},
            {"temperature": 1.3, "top_k": 12},
            {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2},
            {"temperature": 0.9, "frequency_penalty": 0.5},
            {"temperature": 1.0, "n": 3},
        ][i % 7]
        found.append(
            (prompt, SamplingParams(max_tokens=rng.randint(1, 40), seed=1000 + i, logprobs=3, ignore_eos=i % 3 == 0, **extras))
        )
    return found


def answer(output: RequestOutput) -> Answer:
    """Tokens, the bytes of every logprob in order of rank, and how each continuation ended."""
    found = []
    for completion in output.outputs:
        values = [(i, p.logprob, p.rank) for step in completion.logprobs or [] for i, p in step.items()]
        found.append(
            (completion.token_ids, b"".join(struct.pack("<idi", i, v, r or 0) for i, v, r in values), completion.finish_reason)
        )
    return found


def run(model: Path, asked: list[tuple[list[int], SamplingParams]], *, alone: bool = False, **options: Any) -> list[Answer]:
    llm = LLM(str(model), skip_tokenizer_init=True, **{"batch_invariant": True, "dtype": "float32", "seed": 7, **options})
    batches = [[one] for one in asked] if alone else [asked]
    outputs = [
        o
        for batch in batches
        for o in llm.generate([{"prompt_token_ids": p} for p, _ in batch], [s for _, s in batch], use_tqdm=False)
    ]
    stats = llm.llm_engine.engine.stats
    if options.get("num_gpu_blocks_override", 10**6) < 100:
        kind = options.get("preemption_mode", "auto")
        assert kind == "auto" or getattr(stats, f"preempted_{kind}") > 3, "the small pool did not force preemption"
    llm.llm_engine.engine.check()
    llm.close()
    return [answer(o) for o in outputs]


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[Answer]:
    return run(tiny, requests(1, 31))


@pytest.mark.parametrize(
    "options",
    [
        {"enable_prefix_caching": False},
        {"long_prefill_token_threshold": 1},
        {"long_prefill_token_threshold": 7},
        {"long_prefill_token_threshold": 16},
        {"enable_chunked_prefill": False},
        {"max_num_batched_tokens": 64},
        {"max_num_seqs": 3},
        {"block_size": 8},
        {"async_scheduling": True},
        {"async_scheduling": True, "long_prefill_token_threshold": 7, "debug_checksums": True},
        {"num_gpu_blocks_override": 14, "preemption_mode": "recompute"},
        {"num_gpu_blocks_override": 14, "preemption_mode": "swap"},
        {"num_gpu_blocks_override": 14, "preemption_mode": "swap", "async_scheduling": True, "debug_checksums": True},
        {"num_gpu_blocks_override": 14, "preemption_mode": "recompute", "async_scheduling": True, "enable_prefix_caching": False},
        {"scheduling_policy": "sjf"},
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()),
)
def test_same_bytes(tiny: Path, expected: list[Answer], options: dict[str, Any]) -> None:
    assert run(tiny, requests(1, 31), **options) == expected


@pytest.mark.parametrize("ahead", [False, True])
def test_evicted_prefixes_come_back_with_the_same_bytes(tiny: Path, expected: list[Answer], ahead: bool) -> None:
    """Twice the same requests through a pool that forgets the first round: with host blocks they come back from there."""
    for swap_space in (0.0, 0.01):
        llm = LLM(
            str(tiny), skip_tokenizer_init=True, batch_invariant=True, dtype="float32", seed=7, num_gpu_blocks_override=28,
            swap_space=swap_space, async_scheduling=ahead, debug_checksums=True, preemption_mode="recompute",
        )
        for _ in range(2):
            prompts, params = zip(*requests(1, 31), strict=True)
            outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], list(params), use_tqdm=False)
            assert [answer(o) for o in outputs] == expected
        stats = llm.llm_engine.engine.stats
        assert (stats.prefix_hits_host > 0) == (stats.host_cached > 0) == (swap_space > 0)
        llm.llm_engine.engine.check()
        llm.close()


def test_alone_equals_with_thirty_others(tiny: Path, expected: list[Answer]) -> None:
    assert run(tiny, requests(1, 31), alone=True) == expected


def test_stepped_by_hand_equals_generate(tiny: Path, expected: list[Answer]) -> None:
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=str(tiny), skip_tokenizer_init=True, batch_invariant=True, dtype="float32", seed=7, disable_log_stats=True
        )
    )
    waiting = list(enumerate(requests(1, 31)))
    done: dict[str, RequestOutput] = {}
    while waiting or engine.has_unfinished_requests():
        if waiting:  # one joins per step: every step is a different batch
            i, (prompt, params) = waiting.pop(0)
            engine.add_request(str(i), None, params, prompt_token_ids=prompt)
        done |= {o.request_id: o for o in engine.step() if o.finished}
    engine.close()
    assert [answer(done[str(i)]) for i in range(31)] == expected


def test_default_mode_keeps_the_promise_too(tiny: Path, expected: list[Answer]) -> None:
    """The kernels of a CPU sum in a fixed order in any case; the option only refuses to start without them."""
    assert run(tiny, requests(1, 31), alone=True, batch_invariant=False) == expected
