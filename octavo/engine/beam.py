"""Beam search as in Hugging Face's generate: which candidates live on, which are finished, when it is over.

Owns the hypotheses and their scores; it does not know rows, blocks or plans: ``advance`` says which beam continues with which
token, the engine moves the sequences. Scores are float32 sums of raw logprobs, as there.

    score(finished) = sum of logprobs / generated_length ** length_penalty        (the end token counts)

Invariant: at most ``width`` live beams of equal length, and the ``width`` best finished hypotheses, best first.
"""

from dataclasses import dataclass

import numpy as np

from octavo.engine.request import Request, Sequence
from octavo.messages import SequenceEnd
from octavo.outputs import FinishReason
from octavo.plan import RowLogprobs


@dataclass(slots=True)
class Hypothesis:
    """A finished beam: its score, the sum of its logprobs, its generated ids and what ended it."""

    score: float
    total: float
    tokens: list[int]
    reason: FinishReason
    stop_token: int | None


@dataclass(slots=True)
class Candidate:
    """A beam that lives on: the sequence it continues, its next token and the new sum of logprobs."""

    parent: Sequence
    token: int
    total: float


class Beams:
    """The beam search of one request.

    Args:
        request: width, length_penalty, early_stopping, end and stop ids come from it. vocab_size: bounds the candidates.

    Attributes:
        num_candidates: best tokens that every beam reports: enough that ``width`` of all candidates are no end tokens.
        num_rows: rows that its beams own. finished: hypotheses, best first.
    """

    def __init__(self, request: Request, vocab_size: int) -> None:
        self._request = request
        self.width = request.width
        self.num_candidates = min(max(2, 1 + len(request.stop_ids)) * self.width, vocab_size)
        self.num_rows = 0
        self.finished: list[Hypothesis] = []
        self._reports: dict[int, RowLogprobs] = {}
        self._totals: dict[int, np.float32] = {}

    def report(self, sequence: Sequence, found: RowLogprobs) -> None:
        """Note the best next tokens of a live beam."""
        self._reports[id(sequence)] = found

    def forget_reports(self) -> None:
        """The beams have lost their rows: all will report again."""
        self._reports.clear()

    def ready(self, live: list[Sequence]) -> bool:
        """True when every live beam has reported."""
        return bool(live) and all(id(sequence) in self._reports for sequence in live)

    def advance(self, live: list[Sequence], outputs: list[list[int]]) -> list[Candidate]:
        """Choose among the reported candidates; an empty list says that the search is over.

        Args:
            live: the live beams. outputs: what each has generated.
        """
        request, params = self._request, self._request.params
        length = len(outputs[0]) + 1
        at_limit = request.num_prompt + length >= request.max_total
        candidates = self._candidates(live)
        survivors: list[Candidate] = []
        scale = np.float32(float(length) ** params.length_penalty)
        for place, (beam, token, total) in enumerate(candidates):
            if token not in request.stop_set and not at_limit:
                if len(survivors) < self.width:
                    survivors.append(Candidate(live[beam], token, float(total)))
            elif place < self.width:
                stopped = token in request.stop_set
                self._finish(Hypothesis(
                    float(total / scale), float(total), [*outputs[beam], token], "stop" if stopped else "length",
                    token if stopped and token not in request.end_ids else None))
        self._reports.clear()
        return [] if self._over(survivors, length) else survivors

    def adopt(self, beams: list[tuple[Sequence, float]]) -> None:
        """The live beams from now on, with their sums."""
        self._totals = {id(sequence): np.float32(total) for sequence, total in beams}

    def leftovers(self, request: Request, reason: FinishReason, error: str | None) -> list[SequenceEnd]:
        """Ends of a search that was cut off: what is owed, without hypotheses."""
        done = request.params.n - request.unfinished
        return [SequenceEnd(request.id, i, reason, error=error) for i in range(done, request.params.n)]

    def results(self) -> list[SequenceEnd]:
        """The n best hypotheses, best first."""
        best = self.finished[: self._request.params.n]
        return [SequenceEnd(self._request.id, rank, h.reason, h.stop_token, h.tokens, None, h.total)
                for rank, h in enumerate(best)]

    def _candidates(self, live: list[Sequence]) -> list[tuple[int, int, np.float32]]:
        """(beam, token, sum), best first; ties as in a flat [beam * vocab] table, the lower index first."""
        found: list[tuple[int, int, np.float32]] = []
        for beam, sequence in enumerate(live):
            report = self._reports[id(sequence)]
            base = self._totals.get(id(sequence), np.float32(0.0))
            totals = report.top_logprobs[0].astype(np.float32) + base
            found += zip([beam] * len(totals), report.top_tokens[0].tolist(), totals, strict=True)
        found.sort(key=lambda c: (-c[2], c[0], c[1]))
        return found[: max(2, 1 + len(self._request.stop_ids)) * self.width]

    def _finish(self, hypothesis: Hypothesis) -> None:
        if self._request.params.early_stopping is True and len(self.finished) == self.width:
            return
        self.finished.append(hypothesis)
        self.finished.sort(key=lambda h: -h.score)  # stable: the earlier one stays ahead
        del self.finished[self.width :]

    def _over(self, survivors: list[Candidate], length: int) -> bool:
        params = self._request.params
        if not survivors:
            return True
        if len(self.finished) < self.width:
            return False
        if params.early_stopping is True:
            return True
        longest = params.early_stopping == "never" and params.length_penalty > 0.0
        reach = self._request.max_total - self._request.num_prompt if longest else length
        best = np.float32(survivors[0].total) / np.float32(float(reach) ** params.length_penalty)
        return not best > np.float32(self.finished[-1].score)
