"""Staging: a plan as one array of 32-bit words, which is all that a GPU is sent for a step.

Owns the packing; csrc/cuda/step.cu describes the layout and unpacks it (``ops.begin_step``). It does not know tensors. Invariant:
what is sent grows with what a step computes and changes, never with what runs: a decode step sends eight words a row, and five
for every block that is appended. A row has at most one last token in an array, so the order of its changes does not matter.
"""

from collections.abc import Iterator, Sequence

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
    parts: list[Changes] = []
    runs: list[Int32] = []
    blocks: list[Int32] = []
    filled = 0
    for run, piece in _pieces(plan):
        if filled + len(piece) > BLOCK_ROOM:
            parts.append((np.concatenate(runs), np.concatenate(blocks), NONE))
            runs, blocks, filled = [], [], 0
        run[:, 3] += filled
        runs.append(run)
        blocks.append(piece)
        filled += len(piece)
    last = {new.row: int(new.tokens[-1]) for new in plan.new}
    last.update(zip(plan.forced_rows.tolist(), plan.forced_tokens.tolist(), strict=True))  # of several tokens the last one
    lasts = np.array(list(last.items()), np.int32) if last else NONE
    parts.append((np.concatenate(runs) if runs else NO_RUNS, np.concatenate(blocks) if blocks else NONE, lasts))
    return parts


def _pieces(plan: StepPlan) -> Iterator[tuple[Int32, Int32]]:
    """Runs [A, 4] and their blocks, at most BLOCK_ROOM of them at a time; offsets count from the first of the piece."""
    for new in plan.new:
        for start in range(0, len(new.blocks), BLOCK_ROOM):
            piece = np.asarray(new.blocks[start : start + BLOCK_ROOM], np.int32)
            yield np.array([[new.row, start, len(piece), 0]], np.int32), piece
    for start in range(0, len(plan.append_rows), BLOCK_ROOM):
        part = slice(start, start + BLOCK_ROOM)
        piece = np.asarray(plan.append_blocks[part], np.int32)
        single = np.empty((len(piece), 4), np.int32)
        single[:, 0], single[:, 1], single[:, 2] = plan.append_rows[part], plan.append_index[part], 1
        single[:, 3] = np.arange(len(piece))
        yield single, piece


def token_ids(plan: StepPlan, tables: Tables, starts: npt.NDArray[np.int64]) -> Int32:
    """int32 [T]: the ids of the plan's tokens, -1 where a row computes its last token and nothing else.

    Args:
        starts: int64 [R + 1], where each row's tokens begin.
    """
    rows = plan.rows
    ids = np.full(int(starts[-1]), -1, np.int32)
    chunks = np.flatnonzero((plan.counts > 1) | (plan.starts + 1 != tables.length[rows]))
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
