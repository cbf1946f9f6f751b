"""Attention of one layer against a dense softmax, and the order in which it touches the cache."""

import math

import pytest
import torch
import torch.nn.functional as F

from octavo.layers.attention import Attention, QKNorm
from octavo.layers.rope import Rope
from octavo.layers.workspace import Fresh, Workspace
from octavo.ops.attention import AttentionMeta
from octavo.parallel import Shards

HIDDEN, HEADS, KV_HEADS, DIM, TOKENS = 20, 6, 2, 4, 9


def make(*, bias: bool = False, window: int = 0, qk_norm: bool = False, rope: Rope | None = None) -> Attention:
    norm = QKNorm(DIM, 1e-5, 0.0) if qk_norm else None
    attention = Attention(
        hidden=HIDDEN, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, qkv_bias=bias, out_bias=bias, scale=0.7,
        window=window, softcap=0.0, qk_norm=norm, rope=rope, dtype=torch.float32, shards=Shards())
    for name, slot in attention.slots().items():
        slot.store(torch.randn(slot.shape, generator=torch.Generator().manual_seed(sum(map(ord, name)))) * 0.5)
    return attention


def forward(attention: Attention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and KV cache of one sequence in blocks 3, 1, 2 of four tokens."""
    tokens = len(x)
    tables, at = torch.tensor([[3, 1, 2]], dtype=torch.int32), torch.arange(tokens)
    meta = AttentionMeta(
        tables, torch.zeros(1, dtype=torch.int32), torch.tensor([0, tokens], dtype=torch.int32),
        torch.tensor([tokens], dtype=torch.int32), tables[0, at // 4].long() * 4 + at % 4, tokens, tokens)
    work = Workspace(
        torch.zeros(tokens, HIDDEN), torch.empty(tokens, HIDDEN), at, meta, Fresh(), torch.float32, num_heads=HEADS,
        num_kv_heads=KV_HEADS, head_dim=DIM, up_size=8, intermediate=4)
    cache, out = torch.full((2, 4, 4, KV_HEADS, DIM), math.nan), torch.empty(tokens, HIDDEN)
    attention(out, x, work, cache[0], cache[1])
    return out, cache


def dense(attention: Attention, x: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1).transpose(0, 1) for t in (k, v))
    distance = torch.arange(len(x))[:, None] - torch.arange(len(x))
    seen = (distance >= 0) & ((distance < attention.window) if attention.window else True)
    mixed = F.scaled_dot_product_attention(q.transpose(0, 1), k, v, attn_mask=seen, scale=0.7)
    out = torch.empty(len(x), HIDDEN)
    attention.o(out, mixed.transpose(0, 1).flatten(1).contiguous())
    return out


def project(attention: Attention, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    out = torch.empty(len(x), (HEADS + 2 * KV_HEADS) * DIM)
    attention.qkv(out, x)
    return tuple(part.clone() for part in out.view(len(x), -1, DIM).split((HEADS, KV_HEADS, KV_HEADS), 1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("window", [0, 1, 4])
def test_as_a_dense_softmax(bias: bool, window: int) -> None:
    attention, x = make(bias=bias, window=window), torch.randn(TOKENS, HIDDEN)
    wanted = dense(attention, x, *project(attention, x))
    torch.testing.assert_close(forward(attention, x)[0], wanted, rtol=1e-4, atol=1e-5)


def test_norm_comes_before_rotation_and_the_cache_holds_the_result() -> None:
    rope = Rope(torch.tensor([1.0, 0.1]), 1.0, 16, interleaved=False)
    attention, x = make(qk_norm=True, rope=rope), torch.randn(TOKENS, HIDDEN)
    q, k, v = project(attention, x)
    norm = attention._qk_norm
    assert norm is not None
    q, k = F.rms_norm(q, (DIM,), norm.q_norm.weight, 1e-5), F.rms_norm(k, (DIM,), norm.k_norm.weight, 1e-5)
    rope(q, k, torch.arange(TOKENS))
    out, cache = forward(attention, x)
    torch.testing.assert_close(out, dense(attention, x, q, k, v), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cache[0, 3], k[:4])
    torch.testing.assert_close(cache[1, 1], v[4:8])
    assert cache[:, 0].isnan().all()


def test_slots() -> None:
    assert set(make(bias=True, qk_norm=True).slots()) == {
        *(f"{part}.{kind}" for part in "qkvo" for kind in ("weight", "bias")), "q_norm.weight", "k_norm.weight"}
    assert set(make().slots()) == {f"{part}.weight" for part in "qkvo"}
