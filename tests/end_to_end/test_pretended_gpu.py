"""The GPU's path without a GPU: the whole engine on a pretended device gives the answers of the CPU.

The device is CPU tensors with the reference functions behind the operators (pretend.py), so everything but the kernels runs:
staging, device rows, padded graphs, tokens that arrive a step late, the sampling of rows that ask for more than a token.
"""

import random
from pathlib import Path
from typing import Any

import pytest
from pretend import PretendGpu, use_references

from octavo import LLM, SamplingParams
from octavo.worker.cuda_runner import CudaRunner
from octavo.worker.group import GpuGroup, LocalGroup

OPTIONS: dict[str, Any] = {"dtype": "float32", "seed": 7, "max_model_len": 256, "max_num_seqs": 24, "swap_space": 0.01}


def requests(seed: int, count: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of 1 to 90 tokens with everything that a row can ask for."""
    rng = random.Random(seed)
    shared = [rng.randrange(3, 211) for _ in range(60)]
    found = []
    for i in range(count):
        prompt = [rng.randrange(3, 211) for _ in range(rng.randint(1, 40))]
        if i % 2:
            prompt = shared[: rng.randint(1, 60)] + prompt
        extras: dict[str, Any] = [
            {"temperature": 0.0},
            {"temperature": 1.0, "logprobs": 3},
            {"temperature": 0.7, "top_p": 0.8, "prompt_logprobs": 2},
            {"temperature": 1.3, "top_k": 12, "logit_bias": {5: 4.0, 7: -3.0}},
            {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.2, "logprobs": 0},
            {"temperature": 0.9, "frequency_penalty": 0.5, "presence_penalty": 0.3},
            {"temperature": 1.0, "n": 3},
            {"temperature": 0.0, "min_tokens": 6, "stop_token_ids": [9, 10, 11]},
            {"temperature": 0.8, "allowed_token_ids": list(range(20, 60))},
        ][i % 9]
        params = SamplingParams(max_tokens=rng.randint(6, 30), seed=1000 + i, ignore_eos=i % 3 == 0, **extras)
        found.append((prompt, params))
    return found


def answers(llm: LLM, asked: list[tuple[list[int], SamplingParams]]) -> list[Any]:
    """Tokens, ends, and logprobs rounded to what two orders of summation leave equal."""
    outputs = llm.generate([{"prompt_token_ids": p} for p, _ in asked], [s for _, s in asked], use_tqdm=False)
    found = []
    for output in outputs:
        prompt = [{i: round(p.logprob, 2) for i, p in step.items()} for step in output.prompt_logprobs or [] if step]
        for c in output.outputs:
            steps = [{i: (round(p.logprob, 2), p.rank) for i, p in step.items()} for step in c.logprobs or []]
            found.append((c.token_ids, c.finish_reason, c.stop_reason, steps, prompt))
    llm.llm_engine.engine.check()
    return found


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """on_gpu(model, **options): an LLM on a pretended GPU."""
    monkeypatch.setattr("octavo.llm.check_supported", lambda config: None)

    def make(model: Path, **options: Any) -> LLM:
        use_references(monkeypatch)
        monkeypatch.setattr(
            "octavo.llm.make_group",
            lambda config, source: GpuGroup(config, source, runner=CudaRunner(config, source, gpu=PretendGpu())),
        )
        return LLM(str(model), skip_tokenizer_init=True, **{**OPTIONS, "debug_checksums": True, **options})

    return make


@pytest.fixture(scope="module")
def asked() -> list[tuple[list[int], SamplingParams]]:
    return requests(3, 36)


@pytest.fixture(scope="module")
def expected(tiny: Path, asked: Any) -> list[Any]:
    llm = LLM(str(tiny), skip_tokenizer_init=True, **OPTIONS)
    assert isinstance(llm.llm_engine.group, LocalGroup)
    found = answers(llm, asked)
    llm.close()
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"enforce_eager": True},
        {"async_scheduling": False},
        {"max_num_batched_tokens": 40},
        {"num_gpu_blocks_override": 24, "preemption_mode": "recompute"},
        {"num_gpu_blocks_override": 24, "preemption_mode": "swap"},
        {"enable_prefix_caching": False, "block_size": 8},
    ],
    ids=lambda options: ",".join(options) or "default",
)
def test_the_answers_of_the_cpu(tiny: Path, on_gpu: Any, asked: Any, expected: list[Any], options: dict[str, Any]) -> None:
    llm = on_gpu(tiny, **options)
    assert answers(llm, asked) == expected
    runner = llm.llm_engine.group.runner
    assert (runner.graph_steps == 0) == bool(options.get("enforce_eager"))
    llm.close()


def test_edits_that_read_the_output_see_every_token(tiny: Path, on_gpu: Any) -> None:
    seen: list[list[int]] = []

    def processor(output: list[int], logits: Any) -> Any:
        seen.append(list(output))
        logits[3] -= 1.0
        return logits

    llm = on_gpu(tiny)
    params = [
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logits_processors=[processor]),
        SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True),
    ]
    out = llm.generate([{"prompt_token_ids": [5, 6, 7]}, {"prompt_token_ids": [9, 8]}], params, use_tqdm=False)
    tokens = out[0].outputs[0].token_ids
    assert seen == [tokens[:i] for i in range(12)]
    llm.close()


def test_beams(tiny: Path, on_gpu: Any) -> None:
    params = SamplingParams(use_beam_search=True, best_of=3, n=2, temperature=0.0, max_tokens=10)
    asked = [([4, 5, 6, 7], params), ([9] * 20, SamplingParams(temperature=0.0, max_tokens=10))]
    cpu = LLM(str(tiny), skip_tokenizer_init=True, **OPTIONS)
    expected = answers(cpu, asked)
    cpu.close()
    llm = on_gpu(tiny)
    assert answers(llm, asked) == expected
    llm.close()
