"""The limits of a GPU: no memory but what the plan says, and one sentence when there is no GPU, or none with room."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import DEVICE, LLAMA, ROOT, Asked, drain, make_checkpoint, write_tokenizer

import octavo
from octavo import LLM, SamplingParams

PACKAGE = Path(octavo.__file__).parents[1]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(make_checkpoint(tmp_path_factory.mktemp("llama"), LLAMA))


FILL = """
import sys
sys.path[:0] = [{folder!r}]
import test_limits
test_limits.fill({device!r})
"""


def fill(device: str) -> None:
    """Use the whole pool with the largest step, with torch held to what the plan says; run in a process of its own."""
    share, gpu = 0.12, device == "cuda"
    options: dict[str, Any] = {"max_num_seqs": 512, "max_num_batched_tokens": 8192, "gpu_memory_utilization": share}
    if gpu:
        torch.cuda.set_per_process_memory_fraction(share)  # beyond it an allocation fails
    else:
        small = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "vocab_size": 512, "bos_token_id": 1,
                 "eos_token_id": 2}
        options = {"max_num_seqs": 16, "max_num_batched_tokens": 64, "hf_overrides": small, "num_gpu_blocks_override": 131}
    llm = LLM(str(ROOT / "benchmarks" / "models" / "llama-3.2-1b"), device=device, dtype="bfloat16", load_format="dummy",
              skip_tokenizer_init=True, max_model_len=2048, **options)
    info, engine = llm.llm_engine.group.info, llm.llm_engine.engine
    asked = filling(info.num_blocks, info.block_size, info.max_num_seqs, info.max_num_batched_tokens, info.vocab_size)
    for number, (ids, params) in enumerate(asked):
        llm.llm_engine.add_request(str(number), None, params, prompt_token_ids=ids, stream=False)
    peak = largest = done = computed = 0
    while done < len(asked):
        for output in llm.llm_engine.step():
            assert output.finished and output.error is None, output.error
            done += 1
        stats = engine.stats
        peak, before, computed = max(peak, stats.kv_used), computed, stats.prompt_tokens + stats.generated_tokens
        largest = max(largest, computed - before)
    drain(llm)
    engine.check()
    assert engine.stats.failed_steps == 0 and engine.stats.kv_used == 0
    assert peak >= 0.95 * info.num_blocks, f"{peak} of {info.num_blocks} blocks were in use"
    assert largest >= 0.97 * info.max_num_batched_tokens, f"the largest step had {largest} tokens"
    print(f"{peak} of {info.num_blocks} blocks in use, {largest} tokens in a step")
    if gpu:
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        plan = llm.llm_engine.group.runner.memory.total
        print(f"plan {plan >> 20} MiB, most allocated {allocated >> 20}, most reserved {reserved >> 20}")
        assert reserved <= plan, f"{reserved} bytes were reserved, the plan says {plan}"
    llm.close()


def filling(num_blocks: int, block_size: int, rows: int, budget: int, vocab: int) -> Asked:
    """Requests of all kinds that end in the same step, with every block of the pool full."""
    each, left = divmod(num_blocks, rows)
    lengths = [(each + (row < left)) * block_size for row in range(rows)]  # slots of a row; the last token needs none
    begins, step, room = [], 0, budget
    for row, length in enumerate(lengths):  # in which step a row has its prompt
        while length > room:
            length, step, room = length - room, step + 1, budget - row
        room -= length
        begins.append(step)
    rng, found = torch.Generator().manual_seed(0), []
    for row, (length, begin) in enumerate(zip(lengths, begins, strict=True)):
        output = min(length, step - begin + 8)
        kinds: list[dict[str, Any]] = [
            {"temperature": 0.0}, {"temperature": 1.0, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1},
            {"temperature": 1.0, "frequency_penalty": 0.1, "logprobs": 20}, {"temperature": 0.5, "prompt_logprobs": 1}]
        kind = kinds[row % 4 if row < 64 else row % 2]  # logprobs cost the host time, and no more memory with more rows
        ids = torch.randint(3, vocab, (length - output + 1,), generator=rng).tolist()
        found.append((ids, SamplingParams(max_tokens=output, ignore_eos=True, detokenize=False, **kind)))
    return found


def test_nothing_runs_out_of_memory_after_ready() -> None:
    """The pool filled to its last blocks at the largest step, in a process whose torch may take what the plan says."""
    program = FILL.format(folder=str(Path(__file__).parent), device=DEVICE)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    print(done.stdout)


# One sentence and exit code 1


def environment(**changes: str) -> dict[str, str]:
    """Variables of a process that finds the same octavo as this one."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(PACKAGE), *sys.path]), **changes}


def refused(*words: str, **changes: str) -> str:
    """The one line with which ``octavo generate`` ends."""
    done = subprocess.run([sys.executable, "-m", "octavo", "generate", *words, "--prompt", "a", "--max-tokens", "2"],
                          capture_output=True, text=True, timeout=120, env=environment(**changes))
    assert done.returncode == 1, (done.returncode, done.stdout, done.stderr[-2000:])
    lines = [line for line in done.stderr.splitlines() if line.startswith("octavo: error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr and not done.stdout, done.stderr[-2000:]
    return lines[0]


def test_no_gpu_is_one_sentence(llama: Path) -> None:
    line = refused(str(llama), "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert "cuda" in line.lower() or "gpu" in line.lower()


def too_big() -> list[str]:
    """A model of some 200 GB."""
    model = str(ROOT / "benchmarks" / "models" / "llama-3.1-8b")
    return [model, "--device", DEVICE, "--load-format", "dummy", "--skip-tokenizer-init", "--hf-overrides",
            '{"num_hidden_layers": 500}', "--dtype", "bfloat16"]


def test_a_model_that_is_too_big_is_one_sentence() -> None:
    line = refused(*too_big())
    assert "GiB" in line


if DEVICE == "cuda":

    def test_a_gpu_that_is_full_is_one_sentence(llama: Path) -> None:
        """Somebody else has taken all but 300 MiB."""
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        taken = torch.empty(free - (300 << 20), dtype=torch.uint8, device="cuda")
        try:
            line = refused(str(llama), "--device", "cuda")
        finally:
            del taken
            torch.cuda.empty_cache()
        assert "GiB" in line or "MiB" in line or "memory" in line
