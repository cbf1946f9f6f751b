"""Assembly: what a step has gathered becomes a StepPlan for the workers and a StepRecord for the host.

Owns the form of a plan (arrays, dtypes, who comes first); it decides nothing. Invariant: rows that decode come first
and sample in the same order, so that a step without prompts shares its arrays between plan and record and builds
nothing twice.
"""

import numpy as np

from octavo.engine.request import Request, Sequence
from octavo.engine.rows import FREE, Index, RowTable
from octavo.engine.state import EngineState, StepRecord
from octavo.engine.tier import Saves
from octavo.plan import Int32, NewRow, StepPlan, checksum

NO_ROWS = np.empty(0, np.intp)
NO_INTS = np.empty(0, np.int32)
NO_PAIRS = np.empty((0, 2), np.int32)


class Draft:
    """The parts of a plan that are gathered one row at a time.

    Args:
        budget: tokens that may still be computed. mixed: others decode in this step.

    Attributes:
        rows, starts, counts: chunks of prompts. sample_rows, sample_from, sample_pos: those of them that sample.
        scored: of the rows, those whose request wants prompt logprobs.
        copies, swap_in: pairs of blocks. append_rows, append_index, append_blocks: new entries of block tables.
    """

    __slots__ = (
        "append_blocks", "append_index", "append_rows", "budget", "copies", "counts", "mixed", "rows", "sample_from",
        "sample_pos", "sample_rows", "scored", "starts", "swap_in")

    def __init__(self, budget: int, mixed: bool) -> None:
        self.budget, self.mixed = budget, mixed
        self.rows: list[int] = []
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.sample_rows: list[int] = []
        self.sample_from: list[int] = []
        self.sample_pos: list[int] = []
        self.scored: dict[int, Request] = {}
        self.copies: list[tuple[int, int]] = []
        self.swap_in: list[tuple[int, int]] = []
        self.append_rows = self.append_index = self.append_blocks = NO_INTS

    def compute(self, row: int, start: int, count: int) -> None:
        """Row computes tokens [start, start + count)."""
        self.rows.append(row)
        self.starts.append(start)
        self.counts.append(count)
        self.budget -= count

    def sample(self, row: int, source: int, position: int) -> None:
        """Row samples token ``position`` from the last logits of entry ``source`` of the plan's rows."""
        self.sample_rows.append(row)
        self.sample_from.append(source)
        self.sample_pos.append(position)

    def append(self, rows: Int32, index: Int32, blocks: Int32) -> None:
        """Block tables of ``rows`` get ``blocks`` at ``index``."""
        if self.append_rows.size:
            rows = np.concatenate((self.append_rows, rows))
            index, blocks = np.concatenate((self.append_index, index)), np.concatenate((self.append_blocks, blocks))
        self.append_rows, self.append_index, self.append_blocks = rows, index, blocks


class Assembly:
    """Numbers and builds plans.

    Args:
        state: of the engine. epoch: of the group.
    """

    def __init__(self, state: EngineState, epoch: int) -> None:
        self._state, self._epoch, self._step = state, epoch, 0
        self._counter = np.arange(state.table.num_rows, dtype=np.int32)
        self._ones = np.ones(state.table.num_rows, np.int32)

    def build(
        self, rows: Index, rows32: Int32, starts: Int32, samples: Int32, draft: Draft) -> tuple[StepPlan, StepRecord]:
        """The plan of a step; what the state had set aside for it (ended rows, forced tokens, swaps) goes along.

        Args:
            rows, rows32: rows that decode, in both widths. starts: the token each computes. samples: the one it
            samples.
        """
        state, table, num = self._state, self._state.table, len(rows)
        generations = table.generation.take(rows)
        sample_rows, sample_rows32, sample_generations, ends = rows, rows32, generations, samples
        counts, sample_from = self._ones[:num], self._counter[:num]
        if draft.rows:
            begins, lengths = _ints(draft.starts), _ints(draft.counts)
            sample_rows = np.concatenate((rows, np.array(draft.sample_rows, np.intp)))
            sample_from = np.concatenate((sample_from, _ints(draft.sample_from)))
            samples = np.concatenate((samples, _ints(draft.sample_pos)))
            rows, starts = np.concatenate((rows, np.array(draft.rows, np.intp))), np.concatenate((starts, begins))
            counts, ends = np.concatenate((counts, lengths)), np.concatenate((ends, begins + lengths))
            rows32, sample_rows32 = rows.astype(np.int32), sample_rows.astype(np.int32)
            generations, sample_generations = table.generation.take(rows), table.generation.take(sample_rows)
        record = StepRecord(
            self._step, rows, generations, ends, sample_rows, sample_generations, num, sum(draft.counts),
            scored=draft.scored)
        new: list[NewRow] = []
        if state.fresh:
            begun = dict(zip(draft.rows, draft.starts, strict=True))
            new = [self._new_row(sequence, record, starts, begun.get(sequence.row)) for sequence in state.fresh]
            state.fresh = []
        swap_out, forced_rows, forced_tokens = NO_PAIRS, NO_INTS, NO_INTS
        if state.swap_out or draft.swap_in or state.tier.saves.host:
            swap_out, record.swapped = _pairs(state.swap_out), state.swapping
            if state.tier.saves.host:
                record.saved = state.tier.take_saves()
                swap_out = _with_saves(state.swap_out, record.saved)
            record.swapped_bytes = state.info.block_bytes * (len(swap_out) + len(draft.swap_in))
            state.swap_out, state.swapping = [], []
        if state.forced:
            forced_rows = _ints([sequence.row for sequence, _ in state.forced])
            forced_tokens = _ints([token for _, token in state.forced])
            state.forced = []
        plan = StepPlan(
            epoch=self._epoch, step=self._step, rows=rows32, starts=starts, counts=counts, sample_rows=sample_rows32,
            sample_from=sample_from, sample_pos=samples, sample_generations=sample_generations, new=new,
            ended=_ints(state.ended), append_rows=draft.append_rows, append_index=draft.append_index,
            append_blocks=draft.append_blocks, forced_rows=forced_rows, forced_tokens=forced_tokens,
            copies=_pairs(draft.copies), swap_out=swap_out, swap_in=_pairs(draft.swap_in))
        state.ended = []
        if state.config.debug_checksums:
            record.checksum = _checksum(table)
        self._step += 1
        return plan, record

    def _new_row(self, sequence: Sequence, record: StepRecord, starts: Int32, start: int | None) -> NewRow:
        table, row, request = self._state.table, sequence.row, sequence.request
        sequence.announced = True
        generation = int(table.generation[row])
        if request.matcher is not None and sequence.matcher is None:
            sequence.matcher = request.matcher.copy()
        if request.params.logits_processors or sequence.matcher is not None:
            record.processors.append((row, generation, tuple(request.params.logits_processors), sequence.matcher))
        if start is None:  # a fork, which computes nothing yet, or as a beam its last token
            at = np.flatnonzero(record.rows == row)
            start = int(starts[at[0]]) if at.size else int(table.computed[row])
        return NewRow(row, generation, table.known_tokens(row), request.num_prompt, start, table.table(row),
                      request.sampling(sequence.index))


def _ints(values: list[int]) -> Int32:
    return np.array(values, np.int32) if values else NO_INTS


def _pairs(values: list[tuple[int, int]]) -> Int32:
    return np.array(values, np.int32) if values else NO_PAIRS


def _with_saves(pairs: list[tuple[int, int]], saves: Saves) -> Int32:
    """``pairs``, then those of ``saves``: column by column, because decoding makes them in almost every step."""
    num = len(pairs)
    found = np.empty((num + len(saves.host), 2), np.int32)
    if num:
        found[:num] = pairs
    found[num:, 0], found[num:, 1] = saves.blocks, saves.host
    return found


def _checksum(table: RowTable) -> int:
    live = np.flatnonzero(table.state != FREE)
    return checksum(live.astype(np.int32), table.length[live], [table.table(row) for row in live.tolist()])
