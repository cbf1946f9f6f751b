"""Logit edits: what a request may do to its logits before a token is chosen.

Owns bias, allowed ids, bad words, the mask of end tokens below min_tokens, logits processors and the counters behind
penalties; it does not sample and does not know temperature. Only rows that ask cost anything: they are found once, when
they start. Order: constraints, bias, allowed, bad words, min_tokens, then processors, then penalties. Invariant: an edit reads
and writes its own row of logits only, so a processor or a constraint that fails spoils its own row and no other.
"""

import heapq
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo import ops
from octavo.log import get_logger
from octavo.plan import Constraint, Int32, NewRow, RowSampling, StepPlan
from octavo.worker.masks import HostMemory, Masks, restrict, words_of
from octavo.worker.tables import Index, Tables

Processor = Callable[[list[int], Tensor], Tensor]
logger = get_logger(__name__)


class RowEdits:
    """The edits of one row, with its ids as tensors.

    Args:
        generation: the row's owner. sampling: how it samples. processors: its logits processors. device: of the logits.
        constraint: what decides which tokens may follow; allowed, bad words and min_tokens are then its part, on the host.

    Attributes:
        needs_output: an edit depends on which tokens the row has generated, not only on how many.
    """

    def __init__(
        self, generation: int, sampling: RowSampling, processors: Sequence[Processor], device: str = "cpu",
        constraint: Constraint | None = None,
    ) -> None:
        def ids(values: Sequence[int]) -> Tensor:
            return there(np.array(values, np.int64), device)

        self.generation = generation
        self.bias_ids = ids(sampling.bias_ids)
        self.bias_values = there(np.array(sampling.bias_values, np.float32), device)
        self.allowed = None if sampling.allowed is None else ids(sampling.allowed)
        self.banned = ids([w[0] for w in sampling.bad_words if len(w) == 1])
        self.bad_words = [(list(w[:-1]), w[-1]) for w in sampling.bad_words if len(w) > 1]
        self.min_tokens = sampling.min_tokens
        self.stop_ids = ids(sampling.stop_ids)
        self.processors = tuple(processors)
        self.constraint = constraint
        self.needs_output = bool(self.bad_words or self.processors or constraint)
        self._host = sampling if constraint else None

    @staticmethod
    def asked(sampling: RowSampling) -> bool:
        """Whether a row with this sampling ever needs an edit."""
        return bool(
            sampling.bias_ids
            or sampling.allowed is not None
            or sampling.bad_words
            or sampling.processors
            or sampling.constrained
            or (sampling.min_tokens and sampling.stop_ids)
        )

    def fill(self, output: Int32, words: Int32) -> bool:
        """Which tokens the constraint lets follow ``output``, less those that other wishes rule out while some are left."""
        assert self.constraint is not None and self._host is not None
        if not self.constraint(output, words):
            return False
        s = self._host
        out = [w[-1] for w in s.bad_words if len(w) == 1 or output[1 - len(w) :].tolist() == list(w[:-1])]
        if len(output) < s.min_tokens:
            out += s.stop_ids
        restrict(words, None if s.allowed is None else words_of(s.allowed, len(words)), out)
        return True

    @property
    def plain(self) -> bool:
        """A constraint is all that the row asks for."""
        return self.constraint is not None and not self.bias_ids.numel() and not self.processors

    def apply(self, logits: Tensor, output: npt.NDArray[np.int32]) -> bool:
        """Edit ``logits`` [vocab] in place; ``output`` is what the row has generated. False: a processor failed."""
        if self.bias_ids.numel():
            logits.index_add_(0, self.bias_ids, self.bias_values)
        if self.constraint is None:
            self._mask(logits, output)
        return self._process(logits, output) if self.processors else True

    def _mask(self, logits: Tensor, output: npt.NDArray[np.int32]) -> None:
        if self.allowed is not None:
            kept = logits[self.allowed]
            logits.fill_(-torch.inf)
            logits[self.allowed] = kept
        if self.banned.numel():
            logits.index_fill_(0, self.banned, -torch.inf)
        for prefix, last in self.bad_words:
            if len(output) >= len(prefix) and output[-len(prefix) :].tolist() == prefix:
                logits[last] = -torch.inf
        if len(output) < self.min_tokens:
            logits.index_fill_(0, self.stop_ids, -torch.inf)

    def _process(self, logits: Tensor, output: npt.NDArray[np.int32]) -> bool:
        ids = output.tolist()
        try:
            current = logits
            for processor in self.processors:
                current = processor(ids, current)
                if not isinstance(current, Tensor) or current.shape != logits.shape:
                    what = (
                        f"a tensor of shape {list(current.shape)}"
                        if isinstance(current, Tensor)
                        else type(current).__name__
                    )
                    raise TypeError(
                        f"a logits processor must return a tensor of shape {list(logits.shape)}, not {what}"
                    )
            if current is not logits:
                logits.copy_(current)
        except Exception:
            # the user's code: whatever it raises is this request's trouble and nobody else's
            logger.exception("A logits processor failed; its request ends with an error.")
            return False
        return True


class PenaltyPool:
    """Counters of generated tokens and marks of prompt tokens, for rows with penalties only.

    The two tables are [num_rows, vocab]. On a CPU they are virtual memory, made when the first row asks: a slot's pages are
    touched when a row first gets it, and slots are handed out lowest first. On a GPU they are there from the start.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: str = "cpu") -> None:
        self._shape, self._device = (num_rows, vocab_size), device
        self._free = list(range(num_rows))  # a heap
        self.slots = np.full(num_rows, -1, np.int32)
        self.counts: Tensor | None = None
        self.prompt_mask: Tensor | None = None
        if device != "cpu":
            self._allocate()

    def start(self, row: int, prompt: npt.NDArray[np.int32], output: npt.NDArray[np.int32]) -> None:
        """Give ``row`` a slot and fill it from the tokens that it has."""
        if self.counts is None or self.prompt_mask is None:
            self._allocate()
        assert self.counts is not None and self.prompt_mask is not None
        slot = heapq.heappop(self._free)
        self.slots[row] = slot
        counts, mask = self.counts[slot], self.prompt_mask[slot]
        mask.zero_()
        mask.index_fill_(0, there(prompt.astype(np.int64), self._device), True)
        if self._device == "cpu":
            counts.copy_(torch.from_numpy(np.bincount(output, minlength=self._shape[1])))
            return
        counts.zero_()
        if len(output):
            places = np.full(len(output), slot, np.int32)
            ops.count_tokens(self.counts, there(places, self._device), there(np.array(output), self._device))

    def _allocate(self) -> None:
        self.counts = torch.empty(self._shape, dtype=torch.int32, device=self._device)
        self.prompt_mask = torch.empty(self._shape, dtype=torch.bool, device=self._device)

    def end(self, row: int) -> None:
        """Release the slot of ``row``; a row without one is left alone."""
        if self.slots[row] >= 0:
            heapq.heappush(self._free, int(self.slots[row]))
            self.slots[row] = -1

    def advance(self, rows: Index, tokens: npt.NDArray[np.int32] | Tensor) -> None:
        """Count one more token for each of ``rows`` that has a slot. A row may come several times.

        Args:
            tokens: int32 [rows]; on a GPU they may be there already, and -1 is then not counted.
        """
        if self.counts is None:
            return
        slots = self.slots[rows]
        if self._device != "cpu":
            drawn = tokens if isinstance(tokens, Tensor) else there(tokens, self._device)
            ops.count_tokens(self.counts, there(slots, self._device), drawn)
            return
        assert not isinstance(tokens, Tensor)
        held = slots >= 0
        np.add.at(self.counts.numpy(), (slots[held], tokens[held]), 1)

    @property
    def used(self) -> int:
        """Slots in use."""
        return self._shape[0] - len(self._free)


class LogitEdits:
    """All edits of a device's rows.

    Args:
        tables: whose rows they are. vocab_size: of the logits. device: where logits are. host: makes host memory that is
            quick to copy there.
    """

    def __init__(self, tables: Tables, vocab_size: int, device: str = "cpu", host: HostMemory | None = None) -> None:
        self._tables, self._device = tables, device
        self._rows: dict[int, RowEdits] = {}
        self._asking = np.zeros(tables.num_rows, np.bool_)
        self._given: dict[int, dict[int, tuple[Sequence[Processor], Constraint | None]]] = {}
        self._masks = Masks(vocab_size, device, host)
        self.pool = PenaltyPool(tables.num_rows, vocab_size, device)

    def set_processors(
        self, row: int, generation: int, processors: Sequence[Processor], constraint: Constraint | None = None
    ) -> None:
        """Register what the host has for a row that a later plan starts with this generation."""
        if not 0 <= row < self._tables.num_rows or not (processors or constraint):
            raise RuntimeError(f"row {row} of {self._tables.num_rows} cannot have {len(processors)} processors.")
        # a registration whose row never started is forgotten here: only the owner of now may still need its own
        owner = int(self._tables.generation[row])
        kept = {g: p for g, p in self._given.get(row, {}).items() if g == owner}
        self._given[row] = {**kept, generation: (tuple(processors), constraint)}

    def apply(self, plan: StepPlan) -> None:
        """Follow a plan that the tables have just applied: rows that ended, rows that start, forced tokens."""
        for row in plan.ended.tolist():
            self._end(row)
        for new in plan.new:
            self._start(new)
        if plan.forced_rows.size:
            self.advance(plan.forced_rows.astype(np.intp), plan.forced_tokens)

    def needed(self, rows: Index) -> bool:
        """Whether any of ``rows`` needs its logits edited."""
        if not self._rows and not self.pool.used:
            return False
        return bool((self._asking[rows] | (self.pool.slots[rows] >= 0)).any())

    def needs_output(self, rows: Index) -> bool:
        """Whether an edit of ``rows`` reads the tokens that they have generated."""
        return any(self._rows[row].needs_output for row in rows[self._asking[rows]].tolist())

    def begin(self, rows: Index) -> None:
        """Let threads find out what the constrained among ``rows`` may sample; the next ``edit`` is of the same rows.

        Their tokens must be known here. Call it before or after launching what the logits are made by, then ``edit``.
        """
        asking = rows[self._asking[rows]].tolist() if self._rows else []
        edits = [(i, self._rows[row]) for i, row in enumerate(rows.tolist()) if row in self._rows] if asking else []
        self._masks.begin(
            [i for i, row_edits in edits if row_edits.constraint],
            [(row_edits.fill, self._tables.output(int(rows[i]))) for i, row_edits in edits if row_edits.constraint])

    def edit(self, rows: Index, logits: Tensor) -> Tensor:
        """Edit logits [S, vocab] of the sampling ``rows`` in place.

        Returns:
            bool [S], where the logits are: rows that had a NaN before an edit could hide it, or whose processor failed.
        """
        spoiled = torch.zeros(len(rows), dtype=torch.bool, device=self._device)
        failed = np.zeros(len(rows), np.bool_)
        self._masks.apply(logits, spoiled, failed)
        for i in np.flatnonzero(self._asking[rows]).tolist():  # row by row: a copy of all logits would not be in the memory plan
            edits = self._rows[int(rows[i])]
            if edits.plain or failed[i]:
                continue
            spoiled[i] |= logits[i].isnan().any()
            failed[i] = not edits.apply(logits[i], self._tables.output(int(rows[i])))
        if failed.any():
            spoiled |= there(failed, self._device)
        slots = self.pool.slots[rows]
        if (slots >= 0).any():
            assert self.pool.counts is not None and self.pool.prompt_mask is not None
            t = self._tables
            ops.penalties(
                logits,
                self.pool.counts,
                self.pool.prompt_mask,
                there(slots, self._device),
                there(t.repetition[rows], self._device),
                there(t.frequency[rows], self._device),
                there(t.presence[rows], self._device),
            )
        return spoiled

    def advance(self, rows: Index, tokens: npt.NDArray[np.int32] | Tensor) -> None:
        """Count tokens that were appended to ``rows``."""
        if self.pool.used:
            self.pool.advance(rows, tokens)

    def _end(self, row: int) -> None:
        if self._asking[row]:
            self._asking[row] = False
            owned = self._given.get(row, {})
            owned.pop(self._rows.pop(row).generation, None)
            if not owned:
                self._given.pop(row, None)
        self.pool.end(row)

    def _start(self, new: NewRow) -> None:
        s = new.sampling
        if RowEdits.asked(s):
            hosted = s.processors or s.constrained
            processors, constraint = self._given.get(new.row, {}).get(new.generation, ((), None)) if hosted else ((), None)
            if bool(processors) != s.processors or (constraint is not None) != s.constrained:
                raise RuntimeError(
                    f"row {new.row} starts with generation {new.generation} and processors, none registered."
                )
            self._rows[new.row] = RowEdits(new.generation, s, processors, self._device, constraint)
            self._asking[new.row] = True
        if s.repetition != 1.0 or s.frequency != 0.0 or s.presence != 0.0:
            tokens = np.asarray(new.tokens)
            self.pool.start(new.row, tokens[: new.num_prompt], tokens[new.num_prompt :])


def there(array: npt.NDArray[Any], device: str) -> Tensor:
    """An array as a tensor of a device, without waiting for the device: the driver has read the array when this returns."""
    return torch.from_numpy(array).to(device, non_blocking=True)
