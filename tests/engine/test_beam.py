"""Beam search equals Hugging Face's generate, and does not care what else the engine does meanwhile."""

import numpy as np
import pytest
from fakes import VOCAB, Bench

PENALTIES = [(1.0, False), (1.0, True), (0.0, False), (2.0, False), (2.0, "never"), (-1.0, False), (0.0, "never"), (1.0, "never")]


@pytest.fixture(scope="module")
def network():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(5)
    config = transformers.GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0,
                                     eos_token_id=1, pad_token_id=0, initializer_range=0.5)
    return transformers.GPT2LMHeadModel(config).eval()


def logprobs(network):
    import torch

    def model(tokens: list[int]) -> np.ndarray:
        with torch.inference_mode():
            logits = network(torch.tensor([tokens])).logits[0, -1].float()
            return torch.log_softmax(logits, -1).numpy()

    return model


def theirs(network, prompt, eos, width, n, most, penalty, early):
    import torch

    with torch.inference_mode():
        found = network.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), num_beams=width,
            num_return_sequences=n, max_new_tokens=most, length_penalty=penalty, early_stopping=early, do_sample=False,
            eos_token_id=list(eos) or None, pad_token_id=0, return_dict_in_generate=True, output_scores=True)
    answers = []
    for ids, score in zip(found.sequences.tolist(), found.sequences_scores.tolist(), strict=True):
        ids = ids[len(prompt) :]
        cut = next((i + 1 for i, t in enumerate(ids) if t in eos), len(ids))
        answers.append((ids[:cut], score))
    return answers


@pytest.mark.parametrize(("penalty", "early"), PENALTIES)
@pytest.mark.parametrize(("width", "n", "eos"), [(2, 1, (1,)), (3, 3, (1,)), (4, 2, (1, 7)), (4, 4, ()), (2, 2, (1, 7, 9))])
def test_equals_generate(network, penalty, early, width, n, eos):
    bench = Bench(block_size=8, max_model_len=64)
    bench.group.model = logprobs(network)
    for name, prompt, most in (("a", [5, 9, 11, 20, 33], 14), ("b", [40, 3], 9), ("c", list(range(10, 19)), 1)):
        bench.add(name, prompt, eos=eos, n=n, best_of=width, use_beam_search=True, max_tokens=most,
                  length_penalty=penalty, early_stopping=early)
    bench.run()
    for name, request in bench.requests.items():
        p = request.params
        wanted = theirs(network, request.prompt_token_ids, eos, width, n, p.max_tokens, penalty, early)
        for rank, (ids, score) in enumerate(wanted):
            end = bench.ends[name, rank]
            assert end.token_ids == ids, (name, rank)
            assert end.cumulative_logprob / len(ids) ** penalty == pytest.approx(score, abs=2e-4)
            assert end.reason == ("stop" if ids[-1] in eos else "length")


def answers(bench):
    return {key: (end.token_ids, end.reason, end.cumulative_logprob) for key, end in bench.ends.items()}


def load(bench, count=6):
    for i in range(count):
        bench.add(f"b{i}", [(7 * i + j * j) % 40 + 4 for j in range(5 + 6 * i)], n=2, best_of=3, use_beam_search=True,
                  max_tokens=24, eos=(1, 2) if i % 2 else ())
        bench.add(f"s{i}", [(3 * i + j * j) % 40 + 4 for j in range(9 + i)], max_tokens=20, seed=i, temperature=1.0)
    bench.run()
    bench.assert_reference()
    return answers(bench)


@pytest.mark.parametrize("options", [
    {"overlap": True}, {"enable_prefix_caching": False}, {"blocks": 34}, {"blocks": 34, "overlap": True},
    {"blocks": 34, "enable_prefix_caching": False, "overlap": True}, {"rows": 3}, {"rows": 4, "blocks": 34},
    {"long_prefill_token_threshold": 7}, {"blocks": 34, "host_blocks": 50, "preemption_mode": "swap"}])
def test_beams_do_not_depend_on_the_engine(options):
    wanted = load(Bench(max_model_len=128, rows=24))
    bench = Bench(max_model_len=128, **options)
    assert load(bench) == wanted
    if "blocks" in options and "rows" not in options:
        stats = bench.engine.stats
        assert stats.preempted_recompute > 0


def test_beams_share_the_blocks_of_the_prompt():
    bench = Bench(block_size=8, enable_prefix_caching=False)
    bench.add("a", list(range(4, 4 + 33)), n=4, use_beam_search=True, max_tokens=7, eos=())
    most = 0
    while bench.engine.has_work():
        bench.step()
        most = max(most, bench.state.pool.num_used)
    assert most <= 4 + 4  # four full blocks of prompt, and one of each beam: 33 + 7 tokens are five blocks
    assert bench.group.plans["copies"] > 0


def test_a_search_that_is_aborted_says_so_once():
    bench = Bench()
    bench.add("a", [5, 6, 7], n=3, use_beam_search=True, max_tokens=20, eos=())
    for _ in range(4):
        bench.step()
    assert bench.engine.abort("a")
    bench.run()
    assert {key: end.reason for key, end in bench.ends.items()} == {("a", i): "abort" for i in range(3)}


@pytest.mark.parametrize("seed", range(12))
def test_equals_generate_on_several_seeds(network, seed):
    """Many end tokens, so that the pool of finished beams fills early and is fought for."""
    rng = np.random.default_rng(seed)
    eos = tuple(sorted(rng.choice(VOCAB, 6, replace=False).tolist()))
    penalty, early = PENALTIES[seed % len(PENALTIES)]
    prompt = rng.integers(0, VOCAB, 5).tolist()
    bench = Bench(block_size=8, max_model_len=64)
    bench.group.model = logprobs(network)
    bench.add("a", prompt, eos=eos, n=3, use_beam_search=True, max_tokens=10, length_penalty=penalty, early_stopping=early)
    bench.run()
    for rank, (ids, score) in enumerate(theirs(network, prompt, eos, 3, 3, 10, penalty, early)):
        end = bench.ends["a", rank]
        assert end.token_ids == ids
        assert end.cumulative_logprob / len(ids) ** penalty == pytest.approx(score, abs=2e-4)
