"""Paged attention: one signature for a prompt, a chunk of one and a single token.

Owns the operator's signature and AttentionMeta, which the worker makes once a step and every layer reads. It does not
know requests or plans. Invariant: a query's result depends on its own q, its keys and its position alone; keys are
walked in partitions of 256 tokens from the start of the context and merged left to right, so that a token computed
alone, in a chunk or in a whole prompt gives the same bits (with the kernels; the reference promises rounding only).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from octavo.ops.library import choose

paged_attention: Callable[..., None] = choose("paged_attention")
"""paged_attention(out, q, k_cache, v_cache, block_tables, rows, query_start, context_len, scale, window, softcap,
alibi_slopes, k_scale=1, v_scale=1, work=None, partials=None, max_query=0): causal attention of the new tokens of every sequence.

Query i of sequence s, of n = query_start[s + 1] - query_start[s], stands at position p = context_len[s] - n + i and
sees the keys j <= p, with p - j < window where window > 0. Its scores are scale * q.k, then
softcap * tanh(score / softcap) where softcap > 0, then + alibi_slopes[head] * (j - p). Query head h reads KV head
h // (heads // kv_heads).

Args:
    out: float32 [tokens, heads, head_dim], contiguous, written. q: float32 of that shape, the stride of dim 0 is free.
    k_cache, v_cache: [num_blocks, block_size, kv_heads, head_dim]; they hold the new tokens already.
    block_tables: int32 [num_rows, max_blocks]. rows: int32 [sequences], the row of the tables of each.
    query_start: int32 [sequences + 1]. context_len: int32 [sequences], all keys, the new ones included.
    scale: of q.k. window: 0 sees all. softcap: 0 is off. alibi_slopes: float32 [heads] or None.
    k_scale, v_scale: what a cache of 8-bit floats is multiplied by. work, partials, max_query: as in AttentionMeta; a CPU
        does not read them. On a GPU out, q and a cache that is not 8-bit have one type, float32, bfloat16 or float16.
"""


@dataclass(frozen=True, slots=True)
class AttentionMeta:
    """What attention has to know about the tokens of one step; the same for every layer.

    Attributes:
        block_tables: int32 [num_rows, max_blocks], the blocks of every row of the worker's tables.
        rows: int32 [sequences], the row of each sequence of the step.
        query_start: int32 [sequences + 1], where each sequence's new tokens begin; the last is the number of tokens.
        context_len: int32 [sequences], keys of each sequence, the new ones included.
        slots: int64 [tokens], where each new token's key and value are written; -1 for none.
        max_query: the longest run of new tokens. max_context: the longest context.
        work: on a GPU, the work list of ``attention_plan`` for every window that a layer has.
        partials: on a GPU, room for the results of partitions, float32.
    """

    block_tables: Tensor
    rows: Tensor
    query_start: Tensor
    context_len: Tensor
    slots: Tensor
    max_query: int
    max_context: int
    work: Mapping[int, Tensor] = field(default_factory=dict)
    partials: Tensor | None = None


def work_ints(num_seqs: int, num_tokens: int) -> int:
    """int32 words of a work list for steps of so many sequences and tokens."""
    decode = 64 + 1024 * 16 + 4096 + 4 * num_seqs  # decode_work_ints of attention_decode.cu: header, ranges, counters, sequences
    prefill = 4 + 4 * (2 * num_tokens + num_seqs)  # prefill_work_ints of attention_prefill.cu: a header, tiles
    return decode + prefill


def partial_floats(num: int, heads: int, kv_heads: int, head_dim: int) -> int:
    """float32 values of the room for ``num`` partial results.

    The same arithmetic as partial_floats of attention_decode.cuh, for the most rows that a thread block takes: every row has
    head_dim sums, rounded up to a tile, then the maximum and the sum of the softmax.
    """
    tile = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    rows = heads // kv_heads * 8  # the kernel takes up to 8 new tokens of a sequence
    row_groups = 1 if rows <= 8 or tile == 256 else 2
    return num * 8 * row_groups * (tile + 2)
