"""Batch: the tensors of one step, made from a plan and the tables.

Owns the arithmetic from rows and counts to ids, positions, KV slots and attention metadata; it does not know models or
sampling. A step whose counts are all 1 takes a path without any expansion. Invariant: tokens lie row after row in plan
order, a row's tokens ascending, and every slot of a step is named once.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo.ops.attention import AttentionMeta
from octavo.plan import StepPlan
from octavo.worker.tables import Tables

Int64 = npt.NDArray[np.int64]


@dataclass(slots=True)
class Batch:
    """One step's input.

    Attributes:
        ids, positions: int64 [T]. meta: what attention needs, slots included.
        starts: int64 [R + 1]; tokens of the plan's i-th row are starts[i] to starts[i + 1].
        logits: int64 [L], ascending tokens whose logits are needed, or None where every token's are.
        logits_of: int64 [S], entry of ``logits`` that the i-th sampling row reads, or None where it is just i.
    """

    ids: Tensor
    positions: Tensor
    meta: AttentionMeta
    starts: Int64
    logits: Tensor | None
    logits_of: Tensor | None


def build(plan: StepPlan, tables: Tables) -> Batch:
    """The tensors of a plan that ``tables`` has applied and checked. At least one row computes."""
    rows = plan.rows.astype(np.int64)
    computed = tables.computed[rows]
    max_query = int(plan.counts.max())
    if max_query == 1:
        starts = np.arange(len(rows) + 1)
        of_token, positions = rows, computed.astype(np.int64)
    else:
        starts = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(plan.counts, out=starts[1:])
        of_token = np.repeat(rows, plan.counts)
        positions = np.arange(starts[-1]) + np.repeat(computed - starts[:-1], plan.counts)
    context = computed + plan.counts
    block, offset = np.divmod(positions, tables.block_size)
    slots = tables.blocks[of_token, block] * np.int64(tables.block_size) + offset
    meta = AttentionMeta(
        block_tables=tables.block_tables,
        rows=torch.from_numpy(rows.astype(np.int32)),
        query_start=torch.from_numpy(starts.astype(np.int32)),
        context_len=torch.from_numpy(context),
        slots=torch.from_numpy(slots),
        max_query=max_query,
        max_context=int(context.max()),
    )
    ids = tables.tokens[of_token, positions].astype(np.int64)
    logits, logits_of = _logits(plan, starts)
    return Batch(torch.from_numpy(ids), torch.from_numpy(positions), meta, starts, logits, logits_of)


def _logits(plan: StepPlan, starts: Int64) -> tuple[Tensor | None, Tensor | None]:
    """Which tokens need logits, each once although siblings share them, and which sampling row reads which."""
    wanted = plan.sample_from
    if (wanted[1:] > wanted[:-1]).all():
        distinct, logits_of = wanted, None
    else:
        distinct, inverse = np.unique(wanted, return_inverse=True)
        logits_of = torch.from_numpy(inverse.astype(np.int64))
    if len(distinct) == starts[-1]:
        return None, logits_of
    return torch.from_numpy(starts[distinct + 1] - 1), logits_of
