"""2,000 random requests on a pool an eighth of what they need at once: all end, nothing leaks, tokens are right."""

import random

import pytest
from fakes import Bench


@pytest.mark.parametrize("overlap", [False, True])
def test_two_thousand_requests(overlap):
    rng = random.Random(7)
    rows, longest = 32, 96
    bench = Bench(blocks=rows * longest // 8 // 8, host_blocks=40, rows=rows, budget=128, max_model_len=longest, overlap=overlap,
                  check=False)
    families = [[rng.randrange(6, 48) for _ in range(40)] for _ in range(8)]
    added = 0
    while added < 2000 or bench.engine.has_work():
        while added < 2000 and len(bench.state.requests) < 2 * rows:
            shared = rng.choice(families)[: rng.randrange(0, 40)]
            tail = [rng.randrange(6, 48) for _ in range(rng.randrange(1, 12))]
            beam = rng.random() < 0.02
            bench.add(f"r{added}", shared + tail, max_tokens=rng.randrange(1, longest - len(shared) - len(tail) - 40 + 1),
                      n=2 if beam else rng.choice([1, 1, 1, 1, 3]), use_beam_search=beam, stream=rng.random() < 0.3, seed=added,
                      temperature=0.0 if beam else rng.choice([0.0, 1.0]), logprobs=None if beam else rng.choice([None, None, 2]))
            added += 1
        bench.step()
        if bench.state.requests and rng.random() < 0.01:
            bench.engine.abort(rng.choice(list(bench.state.requests)))
        if bench.group.step % 50 == 0:
            bench.engine.check()
    bench.idle()
    bench.assert_reference()
    assert len(bench.finished) == 2000 and bench.engine.stats.finished["error"] == 0
    assert bench.engine.stats.preempted_recompute + bench.engine.stats.preempted_swap > 100
    assert not bench.group.registered and len(bench.state.queue._heap) == 0
