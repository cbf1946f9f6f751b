"""What may not enter, and what it is told."""

import pytest
from fakes import VOCAB, Bench

from octavo.errors import RequestError

BAD = [
    ({"prompt": []}, "prompt", None, "at least one token"),
    ({"prompt": [VOCAB]}, "prompt", None, f"0 to {VOCAB - 1}, got {VOCAB}"),
    ({"prompt": [-1]}, "prompt", None, "got -1"),
    ({"prompt": [True]}, "prompt", None, "got True"),
    ({"prompt": [1.0]}, "prompt", None, "got 1.0"),
    ({"prompt": [5] * 128}, "prompt", "context_length_exceeded", "prompt has 128 tokens.*max_model_len is 128"),
    ({"prompt": [5] * 100, "max_tokens": 29}, "max_tokens", "context_length_exceeded", "100.*29.*129"),
    ({"prompt": [5] * 120, "max_tokens": None, "min_tokens": 9}, "min_tokens", "context_length_exceeded", "120.*9"),
    ({"stop_token_ids": [VOCAB]}, "stop_token_ids", None, f"got {VOCAB}"),
    ({"logit_bias": {VOCAB + 3: 1.0}}, "logit_bias", None, f"got {VOCAB + 3}"),
    ({"allowed_token_ids": [3, VOCAB]}, "allowed_token_ids", None, f"got {VOCAB}"),
    ({"logprobs": 21}, "logprobs", None, "at most 20, got 21"),
    ({"prompt_logprobs": 21}, "prompt_logprobs", None, "at most 20, got 21"),
    ({"priority": 1}, "priority", None, "fcfs policy, got 1"),
    ({"n": 17, "use_beam_search": True}, "n", None, "16.*got 17"),
    ({"n": 2, "best_of": 17, "use_beam_search": True}, "best_of", None, "16.*got 17"),
]


@pytest.mark.parametrize(("change", "param", "code", "message"), BAD)
def test_refused_by_name_and_value_and_nothing_changes(change, param, code, message):
    bench = Bench(max_model_len=128, blocks=200)
    change = {"prompt": [5, 6], "max_tokens": 4, **change}
    with pytest.raises(RequestError, match=message) as caught:
        bench.add("a", change.pop("prompt"), **change)
    assert caught.value.param == param and caught.value.code == code
    assert not bench.engine.has_work()
    bench.add("a", [5, 6], max_tokens=4)
    bench.run()
    assert bench.tokens("a") == bench.expected("a")


def test_the_pool_bounds_what_the_model_would_allow():
    bench = Bench(blocks=8, block_size=8, max_model_len=256)
    with pytest.raises(RequestError, match="the KV pool holds 64 tokens") as caught:
        bench.add("a", [5] * 40, max_tokens=25)
    assert caught.value.code == "context_length_exceeded"
    bench.add("a", [5] * 40, max_tokens=24, ignore_eos=True)
    bench.run()
    assert len(bench.tokens("a")) == 24


@pytest.mark.parametrize("overlap", [False, True])
def test_no_max_tokens_means_all_that_fits(overlap):
    for blocks, fits in ((8, 64), (100, 96)):
        bench = Bench(blocks=blocks, block_size=8, max_model_len=96, overlap=overlap)
        bench.add("a", [5] * 10, max_tokens=None, ignore_eos=True)
        bench.run()
        assert len(bench.tokens("a")) == fits - 10
        assert bench.ends["a", 0].reason == "length"


def test_beams_are_counted_together():
    bench = Bench(blocks=8, block_size=8)
    with pytest.raises(RequestError, match="the KV pool holds 40 tokens"):  # two shared blocks, three for each beam
        bench.add("a", [5] * 17, n=2, use_beam_search=True, max_tokens=24)
    bench.add("a", [5] * 17, n=2, use_beam_search=True, max_tokens=23, eos=())
    bench.run()
    assert len(bench.ends) == 2 and bench.ends["a", 0].reason == "length"


def test_without_chunks_a_prompt_must_fit_a_step():
    bench = Bench(budget=32, enable_chunked_prefill=False)
    with pytest.raises(RequestError, match=r"33 tokens.*max_num_batched_tokens is 32"):
        bench.add("a", [5] * 33, max_tokens=1)
    bench.add("a", [5] * 32, max_tokens=1)
    bench.run()


def test_an_id_is_taken_until_its_request_ends():
    bench = Bench()
    bench.add("a", [5, 6], max_tokens=2)
    with pytest.raises(RequestError, match="'a' is already in use") as caught:
        bench.add("a", [7], max_tokens=2)
    assert caught.value.param == "request_id"
    bench.run()
    bench.engine.add(bench.requests["a"])
    assert bench.engine.has_work()


def test_n_beyond_the_rows_queues():
    bench = Bench(rows=2)
    bench.add("a", [5, 6, 7] * 5, n=7, temperature=1.0, seed=3, max_tokens=9)
    bench.run()
    bench.assert_reference()
    assert sorted(index for _, index in bench.ends) == list(range(7))
