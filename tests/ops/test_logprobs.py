"""Log-probabilities, ranks and the best k: against float64, with ties, broken rows and views, in any batch."""

import math

import pytest
import torch

from octavo.ops import reference

NAN, INF = float("nan"), float("inf")


def logprobs_of(impl, logits, tokens, k):
    rows = logits.shape[0]
    logprob, top = torch.full((rows,), 77.0), torch.full((rows, k), 77.0)
    rank, ids = torch.full((rows,), 77, dtype=torch.int32), torch.full((rows, k), 77, dtype=torch.int32)
    impl.token_logprobs(logprob, rank, ids, top, logits, torch.tensor(tokens, dtype=torch.int32))
    return logprob, rank, ids, top


@pytest.mark.parametrize(("vocab", "k"), [(1, 0), (1, 1), (2, 2), (63, 5), (64, 64), (65, 3), (1000, 0), (1000, 20),
                                          (1000, 1000)])
def test_token_logprobs(impl, vocab, k):
    logits = torch.randn(4, vocab, generator=torch.Generator().manual_seed(vocab)) * 4
    logits[1] = logits[1].round()  # ties
    logits[2] = 3.0
    logits[3, : vocab // 2] = -INF
    tokens = [vocab - 1, vocab // 2, vocab // 3, vocab // 2]
    logprob, rank, ids, top = logprobs_of(impl, logits, tokens, k)
    for s, token in enumerate(tokens):
        values = logits[s].double().tolist()
        best = max(values)
        total = math.log(math.fsum(math.exp(x - best) for x in values))
        order = sorted(range(vocab), key=lambda i: (-values[i], i))
        assert logprob[s].item() == pytest.approx(values[token] - best - total, rel=1e-6, abs=1e-6)
        assert rank[s].item() == order.index(token) + 1
        assert ids[s].tolist() == order[:k]
        assert top[s].tolist() == pytest.approx([values[i] - best - total for i in order[:k]], rel=1e-6, abs=1e-6)


def test_logprobs_of_broken_rows_and_of_no_token(impl):
    logits = torch.zeros(4, 70)
    logits[0, 3] = NAN
    logits[1] = -INF
    logits[2, 5], logits[2, 9], logits[2, 0] = INF, INF, -INF
    logprob, rank, ids, top = logprobs_of(impl, logits, [0, 0, 9, -1], 3)
    assert logprob.isnan().tolist() == [True, True, False, True] and rank.tolist() == [0, 0, 2, 0]
    assert ids[0].tolist() == ids[1].tolist() == [-1] * 3 and top[:2].isnan().all()
    assert logprob[2].item() == pytest.approx(math.log(0.5))
    assert ids[2].tolist() == [5, 9, 1] and top[2].tolist() == pytest.approx([math.log(0.5), math.log(0.5), -INF])
    assert ids[3].tolist() == [0, 1, 2] and top[3].tolist() == pytest.approx([-math.log(70)] * 3)


def test_logprobs_of_a_large_vocabulary(kernels):
    logits = (torch.randn(8, 49152, generator=torch.Generator().manual_seed(0)) * 3)[:, :49000]
    tokens = [0, 48999, 100, 7, 31000, 9, 1, 2]
    for k in (0, 1, 20, 2000):
        wanted_all, found_all = (logprobs_of(impl, logits, tokens, k) for impl in (reference, kernels))
        for wanted, found in zip(wanted_all, found_all, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=2e-6)


def test_logprobs_are_the_same_bits_in_any_batch(kernels, on_threads):
    logits = torch.randn(60, 3001, generator=torch.Generator().manual_seed(0)) * 3
    tokens = list(range(60))
    together = logprobs_of(kernels, logits, tokens, 5)
    for row in (0, 31, 59):
        for alone, one in zip(logprobs_of(kernels, logits[row : row + 1], [row], 5), together, strict=True):
            assert torch.equal(alone[0], one[row])
    for count in (1, 3):
        again = on_threads(count, lambda: logprobs_of(kernels, logits, tokens, 5))
        assert all(torch.equal(a, b) for a, b in zip(again, together, strict=True))


def test_a_token_outside_the_vocabulary_is_an_error(impl):
    for token in (7, -2):
        with pytest.raises(RuntimeError, match=r"token_logprobs: .*outside -1 .. 6"):
            logprobs_of(impl, torch.zeros(1, 7), [token], 0)


def test_contract_errors_of_token_logprobs(kernels):
    with pytest.raises(RuntimeError, match=r"token_logprobs: top_ids has 8 columns"):
        logprobs_of(kernels, torch.zeros(1, 7), [0], 8)
    with pytest.raises(RuntimeError, match=r"token_logprobs: logits .*float32"):
        logprobs_of(kernels, torch.zeros(1, 7).double(), [0], 1)
