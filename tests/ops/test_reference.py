"""The reference operators that other tests measure kernels with, against float64 written a second way.

Norms, rope, activations and sampling have their own files, where reference and kernels meet the same oracles.
"""

import inspect
import itertools
import math

import pytest
import torch

from octavo.ops import library, reference


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def test_every_operator_is_defined_and_writes_where_it_says():
    for name in library.NAMES:
        function = getattr(reference, name)
        wanted = torch.Tensor if name == "pack_linear" else None
        assert inspect.signature(function).return_annotation == wanted, name


# Attention


def attend(q, keys, values, position, scale, window, softcap, slope, group):
    """One query [heads, head_dim] over keys and values [context, kv_heads, head_dim], by loops."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for h in range(q.shape[0]):
        seen = [j for j in range(position + 1) if window == 0 or position - j < window]
        scores = []
        for j in seen:
            score = scale * float(q[h].double() @ keys[j, h // group].double())
            if softcap > 0:
                score = softcap * math.tanh(score / softcap)
            scores.append(score + (slope[h].item() * (j - position) if slope is not None else 0.0))
        weights = torch.tensor(scores, dtype=torch.float64).softmax(0)
        out[h] = sum(w * values[j, h // group].double() for w, j in zip(weights, seen, strict=True))
    return out


@pytest.mark.parametrize(("window", "softcap", "alibi"),
                         [(0, 0.0, False), (5, 0.0, True), (300, 20.0, False), (1, 0.0, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 2), (3, 3), (5, 1)])
def test_paged_attention(window, softcap, alibi, dtype, heads, kv_heads):
    generator = torch.Generator().manual_seed(heads)
    head_dim, block_size, context, new = 8, 16, [3, 530, 257, 1], [3, 2, 1, 1]
    caches = [torch.randn(100, block_size, kv_heads, head_dim, generator=generator).to(dtype) for _ in range(2)]
    tables = torch.randperm(100, generator=generator)[:80].view(2, 40).repeat(2, 1).int()
    tables[2], tables[3] = tables[0].flip(0), tables[1].flip(0)
    rows, starts = ints([3, 1, 0, 2]), ints([0, *itertools.accumulate(new)])
    wide = torch.randn(7, 2 * heads * head_dim, generator=generator)
    q = wide[:, : heads * head_dim].view(7, heads, head_dim)
    slopes = torch.rand(heads, generator=generator) if alibi else None
    out = torch.full((7, heads, head_dim), float("nan"))
    reference.paged_attention(out, q, *caches, tables, rows, starts, ints(context), 0.4, window, softcap, slopes)
    token = 0
    for s in range(4):
        slots = [int(tables[rows[s], j // block_size]) * block_size + j % block_size for j in range(context[s])]
        keys, values = (c.view(-1, kv_heads, head_dim)[slots].float() for c in caches)
        for i in range(new[s]):
            position = context[s] - new[s] + i
            wanted = attend(q[token], keys, values, position, 0.4, window, softcap, slopes, heads // kv_heads)
            torch.testing.assert_close(out[token].double(), wanted, rtol=1e-5, atol=1e-5)
            token += 1


def test_a_sequence_without_new_tokens_is_passed_over():
    cache = torch.randn(4, 16, 1, 8)
    out = torch.full((1, 1, 8), float("nan"))
    reference.paged_attention(out, torch.randn(1, 1, 8), cache, cache, ints([[0, 1], [2, 3]]), ints([0, 1]),
                              ints([0, 0, 1]), ints([0, 1]), 1.0, 0, 0.0, None)
    torch.testing.assert_close(out[0, 0], cache[2, 0, 0])


# KV cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_write_and_gather_kv(dtype):
    k_cache, v_cache = (torch.zeros(3, 4, 2, 5, dtype=dtype) for _ in range(2))
    qkv = torch.randn(4, 30)
    key, value = qkv[:, 10:20].view(4, 2, 5), qkv[:, 20:].view(4, 2, 5)
    slots = torch.tensor([11, -1, 0, 5])
    reference.write_kv(key, value, k_cache, v_cache, slots)
    for t, slot in ((0, 11), (2, 0), (3, 5)):
        assert torch.equal(k_cache[slot // 4, slot % 4], key[t].to(dtype))
        assert torch.equal(v_cache[slot // 4, slot % 4], value[t].to(dtype))
    assert k_cache.flatten(0, 1)[[1, 2, 3, 4, 6, 7, 8, 9, 10]].abs().sum() == 0
    back, forth = torch.full((4, 2, 5), float("nan")), torch.full((4, 2, 5), float("nan"))
    reference.gather_kv(back, forth, k_cache, v_cache, slots)
    kept = [0, 2, 3]
    assert torch.equal(back[kept], key[kept].to(dtype).float())
    assert torch.equal(forth[kept], value[kept].to(dtype).float())
    assert back[1].abs().sum() == 0 and forth[1].abs().sum() == 0


def test_copy_and_swap_blocks():
    kv = torch.randn(2, 2, 6, 4, 1, 3)
    before = kv.clone()
    reference.copy_blocks(kv, ints([[0, 3], [0, 5], [1, 2]]))
    for source, target in ((0, 3), (0, 5), (1, 2), (0, 0), (1, 1), (4, 4)):
        assert torch.equal(kv[:, :, target], before[:, :, source])
    with pytest.raises(RuntimeError, match="also a source"):
        reference.copy_blocks(kv, ints([[0, 1], [1, 2]]))
    host = torch.zeros(2, 2, 3, 4, 1, 3)
    reference.swap_blocks(kv, host, ints([[5, 0], [4, 2]]))
    assert torch.equal(host[:, :, 0], kv[:, :, 5]) and torch.equal(host[:, :, 2], kv[:, :, 4])
    assert host[:, :, 1].abs().sum() == 0
    reference.copy_blocks(kv, torch.empty(0, 2, dtype=torch.int32))
    reference.swap_blocks(kv, host, torch.empty(0, 2, dtype=torch.int32))


# Linear layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (31, 7), (32, 16), (33, 100), (130, 64)])
def test_linear_and_embedding_over_packed_weights(dtype, n, k):
    weight = torch.randn(n, k).to(dtype)
    packed = reference.pack_linear(weight)
    assert packed.shape == (-(-n // 32), k, 32) and packed.dtype == dtype and packed.is_contiguous()
    for i in range(packed.shape[0] * 32):
        wanted = weight[i] if i < n else torch.zeros(k, dtype=dtype)
        assert torch.equal(packed[i // 32, :, i % 32], wanted)
    for tokens in (0, 1, 3, 20):
        x, bias = torch.randn(tokens, 2 * k)[:, :k], torch.randn(n)
        exact = x.double() @ weight.double().T
        wide = torch.full((tokens, n + 5), float("nan"))
        out = wide[:, :n]
        reference.linear(out, x, packed, None, n)
        torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
        reference.linear(out, x, packed, bias, n)
        torch.testing.assert_close(out.double(), exact + bias.double(), rtol=1e-5, atol=1e-5)
        assert wide[:, n:].isnan().all()
    out = torch.full((3, k), float("nan"))
    reference.embedding(out, torch.tensor([0, n - 1, n // 2]), packed, n)
    assert torch.equal(out, weight[[0, n - 1, n // 2]].float())
    for token in (-1, n):
        with pytest.raises(RuntimeError, match=f"outside 0 .. {n - 1}"):
            reference.embedding(out, torch.tensor([0, token, 0]), packed, n)
