"""Attention of one layer: project, prepare (norm, rotate), write the KV cache, attend, project.

Owns its two projections and the numbers of its scores; it does not know its place in a block, nor who laid out the
cache. Invariant: the keys and values of the step's own tokens are in the cache before the first query looks at it, so
prompt, chunk and decode are one code path.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from octavo import ops
from octavo.layers.linear import Linear
from octavo.layers.norm import Norm, RMSNorm
from octavo.layers.rope import Rope
from octavo.layers.weight import Slots, prefixed
from octavo.layers.workspace import Workspace
from octavo.parallel import Shards

Prepare = Callable[[Tensor, Tensor, Tensor], None]


class QKNorm:
    """RMSNorm of every head of q and of k, each with its own weight."""

    def __init__(self, head_dim: int, eps: float, offset: float, device: str = "cpu") -> None:
        self.q_norm, self.k_norm = (RMSNorm(head_dim, eps, offset, device) for _ in range(2))

    def slots(self) -> Slots:
        """``q_norm.weight`` and ``k_norm.weight`` [head_dim]."""
        return prefixed("q_norm.", self.q_norm.slots()) | prefixed("k_norm.", self.k_norm.slots())

    def __call__(self, q: Tensor, k: Tensor, positions: Tensor) -> None:
        """Norm q and k in place; positions play no part."""
        self.q_norm(q, q)
        self.k_norm(k, k)


class Attention:
    """One layer's attention.

    Args:
        hidden, num_heads, num_kv_heads, head_dim: sizes. qkv_bias, out_bias: biases of the projections.
        scale: multiplies q.k. window: last keys that a query sees, 0 for all. softcap: of the scores, 0 off.
        qk_norm: applied to q and k first. rope: applied after it. dtype: of the weights. shards: the group.
        device: where the weights live; a GPU norms, rotates and writes the cache in one launch.
    """

    def __init__(
        self, *, hidden: int, num_heads: int, num_kv_heads: int, head_dim: int, qkv_bias: bool, out_bias: bool,
        scale: float, window: int, softcap: float, qk_norm: QKNorm | None, rope: Rope | None, dtype: torch.dtype,
        shards: Shards, device: str = "cpu",
    ) -> None:
        q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
        self.qkv = Linear(hidden, {"q": q_size, "k": kv_size, "v": kv_size}, bias=qkv_bias, dtype=dtype,
                          device=device)
        self.o = Linear(q_size, {"o": hidden}, bias=out_bias, dtype=dtype, device=device)
        self.scale, self.window, self.softcap, self.shards = scale, window, softcap, shards
        self._qk_norm, self._rope = qk_norm, rope
        self._enter = self._steps if device == "cpu" else self._fused
        self._prepare: tuple[Prepare, ...] = tuple(step for step in (qk_norm, rope) if step is not None)

    def slots(self) -> Slots:
        """``q|k|v|o.weight`` and biases, and the slots of the qk norm."""
        return self.qkv.slots() | self.o.slots() | (self._qk_norm.slots() if self._qk_norm else {})

    def __call__(self, out: Tensor, x: Tensor, work: Workspace, k_cache: Tensor, v_cache: Tensor) -> None:
        """out [tokens, hidden] from x [tokens, hidden]; caches [num_blocks, block_size, kv_heads, head_dim]."""
        self.qkv(work.qkv, x)
        self._attend(out, work, k_cache, v_cache)

    def advance(self, norm: Norm, work: Workspace, k_cache: Tensor, v_cache: Tensor) -> None:
        """residual += delta, then delta = attention of the residual's norm."""
        self.qkv.normed(work.qkv, norm, work)
        self._attend(work.delta, work, k_cache, v_cache)

    def _attend(self, out: Tensor, work: Workspace, k_cache: Tensor, v_cache: Tensor) -> None:
        meta = work.meta
        self._enter(work, k_cache, v_cache)
        ops.paged_attention(
            work.heads, work.q, k_cache, v_cache, meta.block_tables, meta.rows, meta.query_start, meta.context_len,
            self.scale, self.window, self.softcap, None, 1.0, 1.0, meta.work.get(self.window), meta.partials, meta.max_query,
        )
        self.o(out, work.mixed)
        self.shards.all_reduce(out)

    def _steps(self, work: Workspace, k_cache: Tensor, v_cache: Tensor) -> None:
        """Norm, rotate, write the cache: one operator after the other."""
        for step in self._prepare:
            step(work.q, work.k, work.positions)
        ops.write_kv(work.k, work.v, k_cache, v_cache, work.meta.slots)

    def _fused(self, work: Workspace, k_cache: Tensor, v_cache: Tensor) -> None:
        """The same in one launch."""
        norm, rope = self._qk_norm, self._rope
        ops.rotate_and_cache(
            work.q, work.k, work.v, k_cache, v_cache, work.meta.slots, work.positions, rope.cos_sin if rope else None,
            rope.interleaved if rope else False, norm.q_norm.weight if norm else None, norm.k_norm.weight if norm else None,
            norm.q_norm.eps if norm else 0.0, norm.q_norm.offset if norm else 0.0,
        )
