"""2,000 random requests on a tiny model with a KV pool of an eighth of what they need: all end, nothing leaks."""

import random
from pathlib import Path

import psutil
import pytest

from octavo import EngineArgs, LLMEngine, SamplingParams


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ahead", [False, True])
def test_two_thousand_requests(tiny: Path, ahead: bool) -> None:
    rng = random.Random(11 + ahead)
    # 24 rows of up to ~90 tokens need some 8 blocks each; the pool holds 24 blocks in all
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=str(tiny),
            skip_tokenizer_init=True,
            max_num_seqs=24,
            num_gpu_blocks_override=24,
            max_model_len=160,
            async_scheduling=ahead,
            disable_log_stats=True,
            swap_space=0.01,
        )
    )
    shared = [rng.randrange(3, 211) for _ in range(40)]
    done: dict[str, list[str | None]] = {}
    aborted, sent, memory = set(), 0, []
    while sent < 2000 or engine.has_unfinished_requests():
        while sent < 2000 and engine.get_num_unfinished_requests() < 40:
            prompt = shared[: rng.randint(0, 40)] + [rng.randrange(3, 211) for _ in range(rng.randint(1, 40))]
            params = SamplingParams(
                temperature=rng.choice([0.0, 1.0]), n=rng.choice([1, 1, 1, 2, 3]), max_tokens=rng.randint(1, 48), seed=sent
            )
            engine.add_request(str(sent), None, params, prompt_token_ids=prompt, stream=bool(sent % 2))
            sent += 1
        for output in engine.step():
            if output.finished:
                assert output.request_id not in done
                done[output.request_id] = [c.finish_reason for c in output.outputs]
        if rng.random() < 0.02:
            victim = str(rng.randrange(sent))
            if victim not in done:
                engine.abort_request(victim)
                aborted.add(victim)
        if sent % 100 == 0:
            memory.append(psutil.Process().memory_info().rss)
    assert set(done) | aborted == {str(i) for i in range(2000)}
    assert all(reason in ("stop", "length") for name, reasons in done.items() for reason in reasons if name not in aborted)
    stats = engine.engine.stats
    engine.step()  # with overlap, the last step's result is still to be collected
    assert stats.preempted_recompute + stats.preempted_swap > 20
    engine.engine.check()
    assert stats.kv_used == 0 and stats.host_used == 0
    assert memory[-1] < memory[len(memory) // 2] + 8 * 2**20
    engine.close()
