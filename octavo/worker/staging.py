"""Staging: a plan as one array of 32-bit words, which is all that a GPU is sent for a step.

Owns the packing; csrc/cuda/step.cu describes the layout and unpacks it (``ops.begin_step``). It does not know tensors. Invariant:
what is sent grows with what a step computes and changes, never with what runs: a decode step sends eight words a row, and five
for every block that is appended. A row has at most one last token in an array, so the order of its changes does not matter.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from octavo.plan import Int32, NewRow, StepPlan
from octavo.worker.tables import Tables

HEADER = 16
PARAMETERS = 8  # words of a row's sampling parameters
BLOCK_ROOM = 1 << 16  # appended blocks that one array holds; more travel ahead in arrays of their own
NONE = np.empty(0, np.int32)
NO_ROWS = np.empty((0, 9), np.int32)
NO_RUNS = np.empty((0, 4), np.int32)

Changes = tuple[Int32, Int32, Int32]
"""Runs [A, 4], their blocks [W] and last tokens [L, 2] of one array."""


def capacity(num_rows: int, num_tokens: int) -> int:
    """Words that an array needs at most."""
    return HEADER + 4 * num_rows + 1 + num_tokens + 4 * (num_rows + BLOCK_ROOM) + BLOCK_ROOM + (2 + 9 + 3) * num_rows


def parameters(rows: Sequence[NewRow]) -> Int32:
    """int32 [rows, 9]: the row, then the bits of its temperature, top_k, top_p, min_p, seed (low, high), index, and 0."""
    if not rows:
        return NO_ROWS
    words = np.zeros((len(rows), 1 + PARAMETERS), np.int32)
    floats = words.view(np.float32)
    for line, real, new in zip(words, floats, rows, strict=True):
        s = new.sampling
        line[0], line[2], line[7] = new.row, s.top_k, s.index
        real[1], real[3], real[4] = s.temperature, s.top_p, s.min_p
        line[5:7] = np.array([s.seed & 0xFFFFFFFF, s.seed >> 32], np.uint32).view(np.int32)
    return words


def changes(plan: StepPlan) -> list[Changes]:
    """What a plan changes in block tables and last tokens, in as many parts as fit an array each."""
    last = {new.row: int(new.tokens[-1]) for new in plan.new}
    last.update(zip(plan.forced_rows.tolist(), plan.forced_tokens.tolist(), strict=True))  # of several tokens the last one
    lasts = np.array(list(last.items()), np.int32) if last else NONE
    runs, blocks = _runs(plan)
    if len(blocks) <= BLOCK_ROOM:
        return [(runs, blocks, lasts)]
    parts: list[Changes] = []
    begin, end = runs[:, 3], runs[:, 3] + runs[:, 2]
    for start in range(0, len(blocks), BLOCK_ROOM):  # a run that goes on in the next array is cut in two
        first, stop = np.maximum(begin, start), np.minimum(end, start + BLOCK_ROOM)
        cut = np.stack((runs[:, 0], runs[:, 1] + first - begin, stop - first, first - start), 1)
        parts.append((cut[first < stop], blocks[start : start + BLOCK_ROOM], NONE))
    parts[-1] = (*parts[-1][:2], lasts)
    return parts


def _runs(plan: StepPlan) -> tuple[Int32, Int32]:
    """Runs [A, 4] of a plan (a row, the place of the first block, how many there are, where they begin), and all the blocks."""
    num = len(plan.new)
    if not num and not plan.append_rows.size:
        return NO_RUNS, NONE
    runs = np.empty((num + len(plan.append_rows), 4), np.int32)
    runs[:num, 0], runs[:num, 1], runs[:num, 2] = [new.row for new in plan.new], 0, [len(new.blocks) for new in plan.new]
    runs[num:, 0], runs[num:, 1], runs[num:, 2] = plan.append_rows, plan.append_index, 1
    np.cumsum(runs[:, 2], out=runs[:, 3])
    runs[:, 3] -= runs[:, 2]
    return runs, np.concatenate([*(new.blocks for new in plan.new), plan.append_blocks], dtype=np.int32)


def token_ids(plan: StepPlan, tables: Tables, starts: npt.NDArray[np.int64]) -> Int32:
    """int32 [T]: the ids of the plan's tokens, -1 where a row computes its last token and nothing else.

    Args:
        starts: int64 [R + 1], where each row's tokens begin.
    """
    rows = plan.rows
    ids = np.full(int(starts[-1]), -1, np.int32)
    chunks = ((plan.counts > 1) | (plan.starts + 1 != tables.length.take(rows))).nonzero()[0]
    for i in chunks.tolist():
        row, start, count = int(rows[i]), int(plan.starts[i]), int(plan.counts[i])
        ids[starts[i] : starts[i + 1]] = tables.tokens[row, start : start + count]
    return ids


def pack(
    out: Int32, *, slot: int, rows: Int32 = NONE, starts: Int32 = NONE, counts: Int32 = NONE, ids: Int32 = NONE,
    changed: Changes = (NONE, NONE, NONE), new: Int32 = NO_ROWS, samples: Int32 = NONE, sources: Int32 = NONE,
    places: Int32 = NONE,
) -> int:
    """Write an array to the beginning of ``out`` and return its length in words.

    Args:
        slot: line of the results that the sampled tokens go to. rows, starts, counts: int32 [N], what each sequence computes.
        ids: int32 [T]. changed: of ``changes``. new: of ``parameters``. samples: int32 [S], row of each sample, -1 for one
            that the host continues. sources: the token whose hidden state it reads. places: index of the new token.
    """
    runs, blocks, last = changed
    first = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts, out=first[1:])
    out[:HEADER] = 0
    out[:8] = len(rows), len(ids), len(samples), runs.size // 4, blocks.size, last.size // 2, len(new), slot
    end = HEADER
    for part in (rows, starts, counts, first, ids, runs, blocks, last, new, samples, sources, places):
        size = part.size
        if size:
            out[end : end + size] = part.reshape(-1)
            end += size
    return end
