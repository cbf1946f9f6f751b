"""Sampler: logits in, tokens out and back into the rows, with logprobs for whoever asked.

Owns the order of a row's last metres (edits, penalties, sampling, write-back, logprobs) and the tiles of prompt
logprobs; it does not know the model. Greedy batches without edits run the argmax and nothing else. Invariant: nothing
is written to the rows before everything that can fail has succeeded; a row whose logits are not finite ends alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from octavo import ops
from octavo.plan import Float32, Int32, RowLogprobs, StepPlan
from octavo.worker.batch import Batch
from octavo.worker.logit_edits import LogitEdits
from octavo.worker.tables import Index, Tables

PROMPT_TILE = 128  # positions whose logits are in memory at once while a prompt is scored


@dataclass(slots=True)
class Sampled:
    """What the rows of one step drew: StepResult's tokens, bad and logprobs."""

    tokens: Int32
    bad: Int32
    logprobs: list[RowLogprobs]


@dataclass(slots=True)
class Scores:
    """Output of token_logprobs for n positions, as numpy arrays."""

    logprobs: Float32
    ranks: Int32
    top_ids: Int32
    top_logprobs: Float32

    def row(self, row: int, start: int, part: slice, k: int, tokens: Int32) -> RowLogprobs:
        """Entries ``part`` with their best ``k``, as logprobs of a row's ``tokens`` from index ``start`` on."""
        return RowLogprobs(
            row=row,
            start=start,
            tokens=tokens,
            logprobs=self.logprobs[part].copy(),
            ranks=self.ranks[part].copy(),
            top_tokens=self.top_ids[part, :k].copy(),
            top_logprobs=self.top_logprobs[part, :k].copy(),
        )


@dataclass(slots=True)
class PromptSpans:
    """Prompt positions of one step whose next token is scored.

    Attributes:
        rows, firsts, counts: per row that asked, its slot, the index of its first scored token, and how many there are.
        ks: per such row, how many alternatives it wants. k: the most of them.
        places: int64, the computed tokens whose logits are read. tokens: int32, what is scored.
    """

    rows: list[int]
    firsts: list[int]
    counts: list[int]
    ks: list[int]
    places: Index
    tokens: Int32
    k: int

    def split(self, scores: Scores) -> list[RowLogprobs]:
        """The scores row by row."""
        ends = np.cumsum(self.counts).tolist()
        return [
            scores.row(row, first, slice(end - n, end), k, self.tokens[end - n : end].copy())
            for row, first, n, k, end in zip(self.rows, self.firsts, self.counts, self.ks, ends, strict=True)
        ]


def prompt_spans(plan: StepPlan, tables: Tables, starts: npt.NDArray[np.int64]) -> PromptSpans | None:
    """Where rows of the plan asked for prompt logprobs; None when none did. starts: int64 [R + 1], of each row's tokens."""
    ks = tables.prompt_logprobs.take(plan.rows)
    if (ks < 0).all():
        return None
    spans = PromptSpans([], [], [], [], np.empty(0, np.intp), np.empty(0, np.int32), int(ks.max()))
    places, tokens = [], []
    for i in np.flatnonzero(ks >= 0).tolist():
        row, start = int(plan.rows[i]), int(plan.starts[i])
        count = min(start + int(plan.counts[i]), int(tables.num_prompt[row]) - 1) - start
        if count > 0:
            spans.rows.append(row)
            spans.firsts.append(start + 1)
            spans.counts.append(count)
            spans.ks.append(int(ks[i]))
            places.append(np.arange(starts[i], starts[i] + count))
            tokens.append(tables.tokens[row, start + 1 : start + 1 + count])
    if not places:
        return None
    spans.places, spans.tokens = np.concatenate(places), np.concatenate(tokens)
    return spans


class Sampler:
    """Samples for the rows of ``tables``.

    Args:
        tables: the device's rows. edits: what they do to their logits. processed: logprobs describe the distribution
            after edits and temperature instead of the model's own.
    """

    def __init__(self, tables: Tables, edits: LogitEdits, *, processed: bool) -> None:
        self._tables, self._edits, self._processed = tables, edits, processed
        self._zeros = torch.zeros(tables.num_rows, dtype=torch.float32)
        self._ones = torch.ones(tables.num_rows, dtype=torch.float32)
        self._no_ints = torch.zeros(tables.num_rows, dtype=torch.int32)
        self._no_seeds = torch.zeros(tables.num_rows, dtype=torch.int64)

    def sample(self, plan: StepPlan, logits: Tensor) -> Sampled:
        """Sample ``plan.sample_rows`` from logits float32 [S, vocab], which are overwritten, and append to the rows.

        A beam row gets token -1 and stays as it is. So does, in the result, a row whose logits are not finite or whose
        processor failed; in the tables it gets token 0, so that a step planned before the host could know still fits.
        """
        t, rows = self._tables, plan.sample_rows.astype(np.intp)
        wanted = np.where(t.beam[rows], np.maximum(t.logprobs[rows], 0), t.logprobs[rows])
        asking = np.flatnonzero(wanted >= 0)
        scored: Tensor | None = None
        spoiled: Tensor | None = None
        if self._edits.needed(rows):
            if asking.size and not self._processed:
                scored = logits[torch.from_numpy(asking)]
            spoiled = self._edits.edit(rows, logits)
        drawn = self._draw(plan, rows, logits)
        if spoiled is not None:
            drawn[spoiled.numpy()] = -1
        bad = np.flatnonzero(drawn < 0).astype(np.int32)
        beam = t.beam[rows]
        tokens = np.where(beam, np.int32(-1), drawn)
        found: list[RowLogprobs] = []
        if asking.size:
            if bad.size:
                kept = drawn[asking] >= 0
                asking, scored = asking[kept], None if scored is None else scored[torch.from_numpy(kept)]
            found = self._score(plan, rows, tokens, asking, wanted, logits, scored)
        if beam.any():
            rows, drawn = rows[~beam], drawn[~beam]
        appended = np.maximum(drawn, 0)
        self._edits.advance(rows, appended)
        t.write(rows, appended)
        return Sampled(tokens, bad, found)

    def score_prompts(
        self, plan: StepPlan, batch: Batch, hidden: Tensor, head: Callable[[Tensor], Tensor]
    ) -> list[RowLogprobs]:
        """Logprobs of the prompt tokens that follow the computed positions of rows that asked.

        ``start`` of an entry is the index of its first scored token: the position before it was computed in this step.
        They describe the model's own distribution in either mode. ``hidden`` is [T, hidden], ``head`` makes its logits.
        """
        spans = prompt_spans(plan, self._tables, batch.starts)
        if spans is None:
            return []
        scores = _score_tiles(torch.from_numpy(spans.places), spans.tokens, spans.k, hidden, head)
        return spans.split(scores)

    def _draw(self, plan: StepPlan, rows: Index, logits: Tensor) -> Int32:
        """Tokens int32 [S]; -1 for a row with a NaN or without a finite logit."""
        t, num = self._tables, len(rows)
        drawn = np.empty(num, np.int32)
        temperature = t.temperature[rows]
        if temperature.any():
            ops.sample(
                torch.from_numpy(drawn),
                logits,
                torch.from_numpy(temperature),
                torch.from_numpy(t.top_k[rows]),
                torch.from_numpy(t.top_p[rows]),
                torch.from_numpy(t.min_p[rows]),
                torch.from_numpy(t.seed[rows]),
                torch.from_numpy(t.index[rows]),
                torch.from_numpy(plan.sample_pos.copy()),
            )
        else:
            zeros, ints = self._zeros[:num], self._no_ints[:num]
            ops.sample(
                torch.from_numpy(drawn), logits, zeros, ints, self._ones[:num], zeros, self._no_seeds[:num], ints, ints
            )
        return drawn

    def _score(
        self,
        plan: StepPlan,
        rows: Index,
        tokens: Int32,
        asking: Index,
        wanted: Int32,
        logits: Tensor,
        scored: Tensor | None,
    ) -> list[RowLogprobs]:
        """Logprobs of the rows ``asking`` (indices into ``rows``); ``scored``: their logits, if edits came between."""
        if not asking.size:
            return []
        if scored is None:
            scored = logits if len(asking) == len(rows) else logits[torch.from_numpy(asking)]
            if self._processed:
                heat = self._tables.temperature[rows[asking]]
                scored = scored / torch.from_numpy(np.where(heat > 0, heat, np.float32(1.0))).unsqueeze(1)
        own = tokens[asking]
        scores = _score_rows(scored, own, int(wanted[asking].max()))
        return [
            scores.row(int(rows[i]), int(plan.sample_pos[i]), slice(j, j + 1), int(wanted[i]), own[j : j + 1])
            for j, i in enumerate(asking.tolist())
        ]


def _blank(num: int, k: int) -> Scores:
    return Scores(
        np.empty(num, np.float32), np.empty(num, np.int32), np.empty((num, k), np.int32), np.empty((num, k), np.float32)
    )


def _score_rows(logits: Tensor, tokens: Int32, k: int) -> Scores:
    """Logprobs of one token per row of logits [n, vocab] and of its best k."""
    scores = _blank(len(tokens), min(k, logits.shape[1]))
    _score_into(scores, slice(0, len(tokens)), logits, tokens)
    return scores


def _score_tiles(places: Tensor, tokens: Int32, k: int, hidden: Tensor, head: Callable[[Tensor], Tensor]) -> Scores:
    """Logprobs of tokens[i] at hidden[places[i]], PROMPT_TILE positions at a time."""
    scores: Scores | None = None
    for start in range(0, len(tokens), PROMPT_TILE):
        part = slice(start, min(start + PROMPT_TILE, len(tokens)))
        logits = head(hidden[places[part]])
        scores = scores or _blank(len(tokens), min(k, logits.shape[1]))
        _score_into(scores, part, logits, tokens)
    assert scores is not None
    return scores


def _score_into(scores: Scores, part: slice, logits: Tensor, tokens: npt.NDArray[np.int32]) -> None:
    ops.token_logprobs(
        torch.from_numpy(scores.logprobs[part]),
        torch.from_numpy(scores.ranks[part]),
        torch.from_numpy(scores.top_ids[part]),
        torch.from_numpy(scores.top_logprobs[part]),
        logits,
        torch.from_numpy(tokens[part]),
    )
