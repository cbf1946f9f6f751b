"""The whole engine on a GPU: the same answer under other circumstances, every parameter as on the CPU, failures, traffic.

What holds to the bit and what up to near ties. Attention of up to 8 new tokens, norms, rotations, samplers and products of up to
SKINNY_ROWS rows are kernels of our own whose result for a row does not depend on the other rows: where a run computes every
token by them, and in chunks of at most 8 tokens, its bytes do not depend on graphs, overlap, company, swapping. A product of
more rows is another kernel's or cuBLAS's, and a longer chunk is another attention kernel: runs that mix these differ by rounding,
so their tokens may part where two were nearly as likely. float32 on the GPU and on the CPU differ by the order of summation only.
Checksums of the tables wait for the device in every step, which hides races, so most runs go without.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import (
    DEVICE,
    LLAMA,
    Answer,
    Asked,
    answers,
    ask,
    assert_near,
    assert_same,
    difference,
    drain,
    load_benchmark,
    make_checkpoint,
    mixed_requests,
    write_tokenizer,
)

from octavo import LLM, EngineArgs, LLMEngine, SamplingParams
from octavo.errors import OctavoError
from octavo.ops.fused import SKINNY_ROWS

VOCAB = int(LLAMA["vocab_size"])
TRAFFIC_SECONDS = 8.0
# bf16 against bf16: both sides round, so up to twice what one side may be off (see test_families).
NEAR = {"largest": 0.8, "mean": 0.06, "tie": 0.8, "parted": 0.75}
EXACT = {"largest": 1e-3, "mean": 1e-4, "tie": 2e-3, "parted": 0.1}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(make_checkpoint(tmp_path_factory.mktemp("llama"), LLAMA))


def run(model: Path, asked: Asked, **options: Any) -> list[Answer]:
    return ask(model, asked, **{"dtype": "bfloat16", **options})


def named(options: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items())


# To the bit


def short_requests() -> Asked:
    """40 prompts of 1 to 8 tokens: in steps of SKINNY_ROWS tokens nothing leaves the kernels of few rows."""
    return mixed_requests(5, 40, VOCAB, longest=8, output=60, shared=False)


FEW = {"max_num_batched_tokens": SKINNY_ROWS, "enable_prefix_caching": False, "max_num_seqs": SKINNY_ROWS}


@pytest.fixture(scope="module")
def expected_bytes(llama: Path) -> list[Answer]:
    return run(llama, short_requests(), **FEW)


@pytest.mark.parametrize("options", [
    {},
    {"enforce_eager": True},
    {"async_scheduling": False},
    {"enforce_eager": True, "async_scheduling": False},
    {"max_num_seqs": 5},
    {"block_size": 32, "num_gpu_blocks_override": 300},
    {"num_gpu_blocks_override": 24, "preemption_mode": "swap"},
    {"num_gpu_blocks_override": 24, "preemption_mode": "swap", "debug_checksums": True},
    {"num_gpu_blocks_override": 24, "preemption_mode": "swap", "async_scheduling": False, "enforce_eager": True},
], ids=named)
def test_same_bytes(llama: Path, expected_bytes: list[Answer], options: dict[str, Any]) -> None:
    """Again, without graphs, without overlap, in other company, in blocks of another size, swapped out and in."""
    def swapped(llm: LLM) -> None:
        if "preemption_mode" in options:
            assert llm.llm_engine.engine.stats.preempted_swap > 3, "the small pool did not force preemption"

    assert_same(run(llama, short_requests(), check=swapped, **{**FEW, **options}), expected_bytes)


def test_alone_is_the_same_bytes_as_in_company(llama: Path, expected_bytes: list[Answer]) -> None:
    assert_same(run(llama, short_requests(), alone=True, **FEW), expected_bytes)


def test_an_fp8_cache_gives_the_same_bytes_with_and_without_graphs(llama: Path, expected_bytes: list[Answer]) -> None:
    narrow = run(llama, short_requests(), kv_cache_dtype="fp8", **FEW)
    assert_same(run(llama, short_requests(), kv_cache_dtype="fp8", enforce_eager=True, **FEW), narrow)
    assert [answer.logprobs for answer in narrow] != [answer.logprobs for answer in expected_bytes]


# Up to near ties


def long_requests() -> Asked:
    """40 prompts of 1 to 120 tokens, half of them with a common beginning."""
    return mixed_requests(1, 40, VOCAB)


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[Answer]:
    return run(llama, long_requests())


@pytest.mark.parametrize("options", [
    {"enforce_eager": True},
    {"async_scheduling": False},
    {"enable_prefix_caching": False},
    {"long_prefill_token_threshold": 7},
    {"max_num_batched_tokens": 64},
    {"max_num_seqs": 3},
    {"block_size": 64, "num_gpu_blocks_override": 160},
    {"num_gpu_blocks_override": 24, "preemption_mode": "recompute"},
    {"num_gpu_blocks_override": 24, "preemption_mode": "swap"},
    {"num_gpu_blocks_override": 24, "debug_checksums": True},
    {"num_gpu_blocks_override": 24, "preemption_mode": "recompute", "enable_prefix_caching": False, "enforce_eager": True},
    {"scheduling_policy": "sjf"},
], ids=named)
def test_same_up_to_near_ties(llama: Path, expected: list[Answer], options: dict[str, Any]) -> None:
    """The cache on and off, other chunks and steps, preempted and computed again, with graphs and without."""
    def preempted(llm: LLM) -> None:
        kind = options.get("preemption_mode")
        assert kind is None or getattr(llm.llm_engine.engine.stats, f"preempted_{kind}") > 3, "the pool was large enough"

    assert_near(run(llama, long_requests(), check=preempted, **options), expected, **NEAR)


def test_alone_is_near_to_in_company(llama: Path, expected: list[Answer]) -> None:
    assert_near(run(llama, long_requests(), alone=True), expected, **NEAR)


def test_evicted_prefixes_come_back_from_the_host(llama: Path, expected: list[Answer]) -> None:
    """Twice the same through a pool that forgets the first round: the second finds it in host blocks."""
    llm = LLM(str(llama), device=DEVICE, dtype="bfloat16", skip_tokenizer_init=True, seed=7, num_gpu_blocks_override=30,
              swap_space=0.05, preemption_mode="recompute", max_num_seqs=32, max_model_len=256)
    asked = long_requests()
    for _ in range(2):
        outputs = llm.generate([{"prompt_token_ids": p} for p, _ in asked], [s for _, s in asked], use_tqdm=False)
        assert_near(answers(outputs, asked), expected, **NEAR)
    assert llm.llm_engine.engine.stats.prefix_hits_host > 0
    drain(llm)
    llm.llm_engine.engine.check()
    llm.close()


# As on the CPU, in float32


def every_parameter() -> Asked:
    """Each parameter of SamplingParams that acts on the device or between it and the host."""
    base = SamplingParams(temperature=1.0, max_tokens=24, seed=11, logprobs=5, ignore_eos=True, detokenize=False)
    greedy = base.clone(temperature=0.0)
    kinds = [
        greedy, greedy.clone(logprobs=0), greedy.clone(logprobs=20, prompt_logprobs=20), greedy.clone(prompt_logprobs=0),
        greedy.clone(ignore_eos=False, max_tokens=60), greedy.clone(ignore_eos=False, min_tokens=20),
        greedy.clone(stop_token_ids=range(3, 200)), greedy.clone(stop_token_ids=range(3, 300), min_tokens=9),
        greedy.clone(allowed_token_ids=[5, 6, 7, 400]), greedy.clone(logit_bias={77: 100.0}),
        greedy.clone(logit_bias={i: -100.0 for i in range(3, 260)}), greedy.clone(repetition_penalty=1.5),
        greedy.clone(presence_penalty=2.0), greedy.clone(frequency_penalty=-1.0), greedy.clone(logits_processors=[_no_low_ids]),
        base, base.clone(seed=12), base.clone(temperature=0.3), base.clone(temperature=5.0), base.clone(top_k=1),
        base.clone(top_k=30), base.clone(top_p=0.5), base.clone(min_p=0.1), base.clone(top_k=40, top_p=0.9, min_p=0.01),
        base.clone(n=4), base.clone(n=2, best_of=4), base.clone(repetition_penalty=0.7, frequency_penalty=0.3),
        base.clone(allowed_token_ids=range(100, 140), top_p=0.9), base.clone(logits_processors=[_no_low_ids, _no_low_ids]),
        base.clone(temperature=1e-6), base.clone(temperature=1000.0, top_k=3),
        SamplingParams(use_beam_search=True, best_of=4, n=3, temperature=0.0, max_tokens=12, detokenize=False),
        SamplingParams(use_beam_search=True, n=2, temperature=0.0, max_tokens=30, length_penalty=2.0, early_stopping=True,
                       detokenize=False),
    ]
    prompts = [prompt for prompt, _ in mixed_requests(3, len(kinds), VOCAB)]
    return list(zip(prompts, kinds, strict=True))


def _no_low_ids(output: list[int], logits: torch.Tensor) -> torch.Tensor:
    """A logits processor that works in place on whatever device the logits are."""
    assert logits.shape == (VOCAB,)
    logits[: 100 + len(output)] = -torch.inf
    return logits


@pytest.fixture(scope="module")
def on_the_cpu(llama: Path) -> list[Answer]:
    return ask(llama, every_parameter(), dtype="float32", device="cpu")


@pytest.mark.parametrize("options", [{}, {"enforce_eager": True, "async_scheduling": False}, {"max_num_seqs": 6}], ids=named)
def test_every_parameter_means_what_it_means_on_the_cpu(llama: Path, on_the_cpu: list[Answer], options: dict[str, Any]) -> None:
    """The random numbers are the same ones, so sampled tokens are too."""
    found = ask(llama, every_parameter(), **{"dtype": "float32", **options})
    assert_near(found, on_the_cpu, **EXACT)
    assert [a.reason for a in found].count("stop") == [a.reason for a in on_the_cpu].count("stop") >= 2


def test_processed_logprobs(llama: Path) -> None:
    """Of the distribution that was sampled from."""
    asked = [(p, s) for p, s in every_parameter() if not s.use_beam_search and s.prompt_logprobs is None]
    options: dict[str, Any] = {"dtype": "float32", "logprobs_mode": "processed_logprobs"}
    ours, theirs = ask(llama, asked, **options), ask(llama, asked, **options, device="cpu")
    found = difference(ours, theirs)
    assert found.parted <= 0.1 * found.total and found.mean <= 1e-3, found


def test_seeds(llama: Path) -> None:
    """A seed gives the same continuation wherever the request stands, none gives one that the engine's seed decides."""
    prompt = list(range(20, 28))
    seeded = SamplingParams(temperature=1.0, seed=5, max_tokens=20, ignore_eos=True, detokenize=False)
    free = seeded.clone(seed=None)
    asked = [(prompt, s) for s in (seeded, free, seeded, free, seeded.clone(n=3))]
    first = [a.tokens for a in run(llama, asked, **FEW)]
    again = [a.tokens for a in run(llama, asked, **FEW)]
    other = [a.tokens for a in run(llama, asked, **FEW, seed=8)]
    assert first == again and first[0] == first[2] == first[4] == other[0]
    assert len({tuple(tokens) for tokens in (first[0], first[1], first[3], first[5], first[6])}) == 5
    assert other[1] != first[1]


def test_texts_stop_strings_and_bad_words(llama: Path) -> None:
    """What needs a tokenizer: the same on both devices, and words that are forbidden do not come."""
    letters = [4 + i for i, letter in enumerate(sorted(_alphabet())) if letter in "abcdefgh"]
    base = SamplingParams(temperature=1.0, seed=3, max_tokens=60, ignore_eos=True, allowed_token_ids=letters)

    def texts(device: str) -> list[list[tuple[str, Any]]]:
        llm = LLM(str(llama), device=device, dtype="float32", max_num_seqs=8, num_gpu_blocks_override=100, max_model_len=256)
        plain = llm.generate("abc", base, use_tqdm=False)[0].outputs[0].text
        stop = plain[20:23]
        word = plain[30:32]
        params = [base, base.clone(stop=stop), base.clone(stop=[stop], include_stop_str_in_output=True),
                  base.clone(bad_words=[word, "a"]), base.clone(n=3, stop=["ab", "cd", "ef", "gh", "h"])]
        found = [[(c.text, c.stop_reason) for c in o.outputs]
                 for o in llm.generate(["abc"] * len(params), params, use_tqdm=False)]
        assert found[0][0][0] == plain and len(plain) == 60 and set(plain) <= set("abcdefgh")
        assert found[1][0] == (plain[: plain.index(stop)], stop)
        assert found[2][0] == (plain[: plain.index(stop) + len(stop)], stop)
        assert "a" not in found[3][0][0] and word not in found[3][0][0]
        llm.close()
        return found

    assert texts(DEVICE) == texts("cpu")


def _alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())


def test_streams_aborts_and_a_processor_that_fails(llama: Path) -> None:
    """Snapshots grow, an abort frees its blocks at once, a failing processor costs its own request."""
    engine = LLMEngine.from_engine_args(EngineArgs(
        model=str(llama), device=DEVICE, dtype="bfloat16", skip_tokenizer_init=True, disable_log_stats=True, max_num_seqs=8,
        num_gpu_blocks_override=100, max_model_len=256))
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, detokenize=False)

    def broken(output: list[int], logits: torch.Tensor) -> torch.Tensor:
        if len(output) == 4:
            raise ValueError("planted")
        return logits

    prompt = list(range(10, 18))
    for name, given in (("a", params), ("b", params), ("c", params.clone(logits_processors=[broken])), ("d", params)):
        engine.add_request(name, None, given, prompt_token_ids=prompt)
    seen: dict[str, list[int]] = {}
    ends: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens = output.outputs[0].token_ids
            assert tokens[: len(seen.get(output.request_id, []))] == seen.get(output.request_id, [])
            seen[output.request_id] = tokens
            if output.finished:
                ends[output.request_id] = output
        if len(seen.get("b", [])) == 10 and "b" not in ends:
            engine.abort_request("b")
            ends["b"] = None
    while engine.engine.has_work():
        engine.step()
    assert seen["a"] == seen["d"] and seen["b"] == seen["a"][: len(seen["b"])] and 10 <= len(seen["b"]) < 30
    assert ends["c"].error and ends["c"].outputs[0].finish_reason == "error"
    engine.engine.check()
    assert engine.engine.stats.kv_used == 0
    engine.close()


# Traffic


@pytest.fixture(scope="module")
def soak() -> Any:
    return load_benchmark("soak_gpu")


def traffic_engine(model: Path, **options: Any) -> LLMEngine:
    return LLMEngine.from_engine_args(EngineArgs(**{
        "model": str(model), "device": DEVICE, "dtype": "bfloat16", "skip_tokenizer_init": True, "disable_log_stats": True,
        "max_num_seqs": 48, "num_gpu_blocks_override": 200, "max_model_len": 512, "max_num_batched_tokens": 256,
        "swap_space": 0.05, **options}))


@pytest.fixture(params=[{}, {"debug_checksums": True, "preemption_mode": "recompute", "max_num_batched_tokens": 64}], ids=named)
def engine(request: pytest.FixtureRequest, llama: Path) -> Iterator[LLMEngine]:
    engine = traffic_engine(llama, **request.param)
    yield engine
    engine.close()


def test_random_traffic_leaves_nothing_behind(engine: LLMEngine, soak: Any) -> None:
    """All kinds of parameters, aborts at any time; see benchmarks/soak_gpu.py. Half of the time with each of two engines."""
    found = soak.Traffic(engine, seed=1).run(TRAFFIC_SECONDS / 2, rounds=5)
    print(found)
    assert found.requests > 50 and found.aborted > 0 and found.probes > 3
    assert found.host[-1] - found.host[2] < 64 << 20


def test_errors_that_a_caller_makes_change_nothing(llama: Path) -> None:
    llm = LLM(str(llama), device=DEVICE, skip_tokenizer_init=True, max_model_len=64, num_gpu_blocks_override=16, max_num_seqs=4)
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, detokenize=False)
    wanted = llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0].token_ids
    for prompt, given in (([VOCAB], params), ([5] * 65, params), ([5], params.clone(max_tokens=64)),
                          ([5], params.clone(logit_bias={VOCAB: 1.0}))):
        with pytest.raises(OctavoError):
            llm.generate([prompt], given, use_tqdm=False)
    assert llm.generate([[5, 6, 7]], params, use_tqdm=False)[0].outputs[0].token_ids == wanted
    llm.close()
