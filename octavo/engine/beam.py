"""Beam search as in Hugging Face's generate: which candidates live on, which are finished, when it is over.

Owns the hypotheses and their scores; it does not know rows, blocks or plans: a live beam is a number (the index of its
sequence), ``advance`` says which beam continues with which token, and the engine moves the sequences. Scores are
float32 sums of raw logprobs, as there.

    score(finished) = sum of logprobs / generated_length ** length_penalty        (the end token counts)

Invariant: at most ``width`` live beams of equal length, and the ``width`` best finished hypotheses, best first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from octavo.messages import SequenceEnd
from octavo.outputs import FinishReason
from octavo.params import SamplingParams
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
    """A beam that lives on: which live beam it continues, its next token and the new sum of logprobs."""

    parent: int
    token: int
    total: float


class Beams:
    """The beam search of one request.

    Args:
        params: width, length_penalty, early_stopping. end_ids: end tokens. stop_ids: they and the stop token ids.
        longest: most tokens that a beam generates. vocab_size: bounds the candidates.

    Attributes:
        num_candidates: best tokens that every beam reports: enough that ``width`` of all candidates are no end tokens.
        num_rows: rows that its beams own. finished: hypotheses, best first.
    """

    def __init__(
        self, params: SamplingParams, end_ids: frozenset[int], stop_ids: frozenset[int], longest: int, vocab_size: int) -> None:
        self.width = params.width
        self._params, self._end_ids, self._stop_ids, self._longest = params, end_ids, stop_ids, longest
        self._num_kept = max(2, 1 + len(stop_ids)) * self.width
        self.num_candidates = min(self._num_kept, vocab_size)
        self.num_rows = 0
        self.finished: list[Hypothesis] = []
        self._reports: dict[int, RowLogprobs] = {}
        self._totals: dict[int, np.float32] = {}

    def report(self, beam: int, found: RowLogprobs) -> None:
        """Note the best next tokens of a live beam."""
        self._reports[beam] = found

    def forget_reports(self) -> None:
        """The beams have lost their rows: all will report again."""
        self._reports.clear()

    def ready(self, live: Sequence[int]) -> bool:
        """True when every live beam has reported."""
        return bool(live) and all(beam in self._reports for beam in live)

    def advance(self, live: Sequence[int], outputs: list[list[int]]) -> list[Candidate]:
        """Choose among the reported candidates; an empty list says that the search is over.

        Args:
            live: the live beams. outputs: what each has generated.
        """
        length = len(outputs[0]) + 1
        at_limit = length >= self._longest
        candidates = self._candidates(live)
        survivors: list[Candidate] = []
        scale = np.float32(float(length) ** self._params.length_penalty)
        for place, (beam, token, total) in enumerate(candidates):
            if token not in self._stop_ids and not at_limit:
                if len(survivors) < self.width:
                    survivors.append(Candidate(beam, token, float(total)))
            elif place < self.width:
                stopped = token in self._stop_ids
                self._finish(Hypothesis(
                    float(total / scale), float(total), [*outputs[beam], token], "stop" if stopped else "length",
                    token if stopped and token not in self._end_ids else None))
        self._reports.clear()
        return [] if self._over(survivors, length) else survivors

    def adopt(self, beams: Sequence[tuple[int, float]]) -> None:
        """The live beams from now on, with their sums."""
        self._totals = {beam: np.float32(total) for beam, total in beams}

    def results(self, request_id: str) -> list[SequenceEnd]:
        """The n best hypotheses, best first."""
        return [SequenceEnd(request_id, rank, h.reason, h.stop_token, h.tokens, None, h.total)
                for rank, h in enumerate(self.finished[: self._params.n])]

    def _candidates(self, live: Sequence[int]) -> list[tuple[int, int, np.float32]]:
        """(beam, token, sum), best first; ties as in a flat [beam * vocab] table, the lower index first."""
        found: list[tuple[int, int, np.float32]] = []
        for beam, name in enumerate(live):
            report, base = self._reports[name], self._totals.get(name, np.float32(0.0))
            totals = report.top_logprobs[0].astype(np.float32) + base
            found += zip([beam] * len(totals), report.top_tokens[0].tolist(), totals, strict=True)
        found.sort(key=lambda c: (-c[2], c[0], c[1]))
        return found[: self._num_kept]

    def _finish(self, hypothesis: Hypothesis) -> None:
        self.finished.append(hypothesis)
        self.finished.sort(key=lambda h: -h.score)  # stable: the earlier one stays ahead
        del self.finished[self.width :]

    def _over(self, survivors: list[Candidate], length: int) -> bool:
        params = self._params
        if not survivors:
            return True
        if len(self.finished) < self.width:
            return False
        if params.early_stopping is True:
            return True
        longest = params.early_stopping == "never" and params.length_penalty > 0.0
        reach = self._longest if longest else length
        best = np.float32(survivors[0].total) / np.float32(float(reach) ** params.length_penalty)
        return not best > np.float32(self.finished[-1].score)
