"""Sampling on a GPU for steps in which somebody asks for more than a token: edits, penalties, logprobs, beams.

Owns the order of those rows' last metres (see Sampler, whose order it is); steps in which nobody asks never come here. Nothing
waits for the device but the edits that must see a row's own last token. Invariant: a row's token and logprobs depend on its own
logits alone; these may differ by rounding from those of a graph, whose product is of a padded number of rows.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from octavo import ops
from octavo.plan import Int32, RowLogprobs, StepPlan
from octavo.worker.device import DeviceRows
from octavo.worker.gpu import Gpu
from octavo.worker.logit_edits import LogitEdits, there
from octavo.worker.sampler import PROMPT_TILE, Scores, prompt_spans
from octavo.worker.tables import Index, Tables

Finish = Callable[[Int32], list[RowLogprobs]]
"""Called with the step's tokens once the device has computed them: the logprobs as the host wants them."""


class CudaSampler:
    """Samples rows that ask, on the current stream.

    Args:
        tables, edits, rows: of the same device, gpu. processed: logprobs describe the distribution after edits and temperature.
    """

    def __init__(
        self, tables: Tables, edits: LogitEdits, rows: DeviceRows, gpu: Gpu, *, processed: bool
    ) -> None:
        self._tables, self._edits, self._rows, self._processed, self._gpu = tables, edits, rows, processed, gpu

    def asks(self, rows: Index) -> bool:
        """Whether one of ``rows`` wants more than a token."""
        t = self._tables
        return bool((t.logprobs[rows] >= 0).any() or t.beam[rows].any()) or self._edits.needed(rows)

    def sample(self, plan: StepPlan, logits: Tensor) -> Finish:
        """Sample ``plan.sample_rows`` from logits float32 [S, vocab], which are overwritten; tokens go to rows and host."""
        t, rows, num = self._tables, plan.sample_rows.astype(np.intp), len(plan.sample_rows)
        wanted = np.where(t.beam[rows], np.maximum(t.logprobs[rows], 0), t.logprobs[rows])
        asking = np.flatnonzero(wanted >= 0)
        places = there(asking, self._gpu.name)
        scored: Tensor | None = None
        spoiled: Tensor | None = None
        if self._edits.needed(rows):
            if asking.size and not self._processed:
                scored = logits[places]
            spoiled = self._edits.edit(rows, logits)
        self._rows.draw(num, logits)
        tokens = self._rows.tokens[:num]
        if spoiled is not None:
            tokens.masked_fill_(spoiled, -1)
        finish = self._score(plan, rows, asking, wanted, logits, scored, tokens, places) if asking.size else _nothing
        free = np.flatnonzero(~t.beam[rows])
        if free.size == num:
            self._edits.advance(rows, tokens)
        elif free.size:
            self._edits.advance(rows[free], tokens[there(free, self._gpu.name)])
        self._rows.end(num)
        return finish

    def score_prompts(
        self, plan: StepPlan, starts: Index, hidden: Tensor, head: Callable[[Tensor], Tensor]
    ) -> Callable[[], list[RowLogprobs]] | None:
        """Logprobs of prompt tokens, as Sampler.score_prompts; None when nobody asks. Call the result when the step is done."""
        spans = prompt_spans(plan, self._tables, starts)
        if spans is None:
            return None
        places, tokens = there(spans.places, self._gpu.name), there(spans.tokens, self._gpu.name)
        scores = DeviceScores(len(tokens), min(spans.k, self._rows.vocab_size), self._gpu)
        for start in range(0, len(tokens), PROMPT_TILE):
            part = slice(start, min(start + PROMPT_TILE, len(tokens)))
            scores.fill(part, head(hidden[places[part]]), tokens[part])
        scores.fetch()
        return lambda: spans.split(scores.host())

    def _score(
        self, plan: StepPlan, rows: Index, asking: Index, wanted: Int32, logits: Tensor, scored: Tensor | None, tokens: Tensor,
        places: Tensor,
    ) -> Finish:
        t = self._tables
        if scored is None:
            scored = logits if len(asking) == len(rows) else logits[places]
            if self._processed:  # in place: the tokens are drawn by now, and nobody reads these logits again
                heat = t.temperature[rows[asking]]
                scored.div_(there(np.where(heat > 0, heat, np.float32(1.0)), self._gpu.name).unsqueeze(1))
        own = tokens[places].masked_fill_(there(t.beam[rows[asking]], self._gpu.name), -1)
        scores = DeviceScores(len(asking), min(int(wanted[asking].max()), logits.shape[1]), self._gpu)
        scores.fill(slice(0, len(asking)), scored, own)
        scores.fetch()
        sampled, positions, beams = rows[asking], plan.sample_pos[asking], t.beam[rows[asking]]

        def finish(drawn: Int32) -> list[RowLogprobs]:
            host = scores.host()
            found = []
            for j, i in enumerate(asking.tolist()):
                if drawn[i] < 0:  # such a row ends with an error
                    continue
                token = np.full(1, -1 if beams[j] else drawn[i], np.int32)
                found.append(host.row(int(sampled[j]), int(positions[j]), slice(j, j + 1), int(wanted[i]), token))
            return found

        return finish


class DeviceScores:
    """Output of token_logprobs for ``num`` positions on the device, and its way to the host."""

    def __init__(self, num: int, k: int, gpu: Gpu) -> None:
        self._gpu = gpu
        self._device: tuple[Tensor, Tensor, Tensor, Tensor] = (
            torch.empty(num, device=gpu.name), torch.empty(num, dtype=torch.int32, device=gpu.name),
            torch.empty((num, k), dtype=torch.int32, device=gpu.name), torch.empty((num, k), device=gpu.name),
        )
        self._host: tuple[Tensor, ...] = ()

    def fill(self, part: slice, logits: Tensor, tokens: Tensor) -> None:
        """Score positions ``part`` of logits [part, vocab]."""
        logprobs, ranks, ids, top = self._device
        ops.token_logprobs(logprobs[part], ranks[part], ids[part], top[part], logits, tokens)

    def fetch(self) -> None:
        """Start the copy to pinned memory; ``host`` may be called when the stream has come so far."""
        self._host = tuple(self._gpu.pinned(t.shape, t.dtype).copy_(t, non_blocking=True) for t in self._device)

    def host(self) -> Scores:
        """What was fetched, as arrays."""
        logprobs, ranks, ids, top = (tensor.numpy() for tensor in self._host)
        return Scores(logprobs, ranks, ids, top)


def _nothing(tokens: Int32) -> list[RowLogprobs]:
    return []
