"""Request and Sequence: what the engine remembers of a request, and one of its continuations.

Owns identity, order in time and the state of a sequence while it has no row (its tokens, its host blocks); while it has
one, the RowTable owns them. It does not know blocks, plans or policies.

Invariant: a sequence is in one of three states. WAITING: in the queue, without a row; with host blocks it is
*swapped*. RUNNING: owns ``row``. ENDED: reported, holds nothing.
"""

import enum

import numpy as np

from octavo.engine.beam import Beams
from octavo.messages import EngineRequest, TokenLogprobs
from octavo.plan import Int32, RowSampling
from octavo.text.matcher import Matcher


class Status(enum.IntEnum):
    """Where a sequence is."""

    WAITING = 0
    RUNNING = 1
    ENDED = 2


class Request:
    """One request.

    Args:
        source: as the front sent it, validated. number: counts requests as they come. seed: of its random generator.
        max_total: tokens, prompt included, at which a sequence ends. root: first digest of its prefix chain.
        arrival: monotonic seconds.

    Attributes:
        sequences: those that exist. unfinished: continuations still to be reported. spawned: all n exist.
        prompt_scored: prompt logprobs up to this position have been sent (the first position has none).
        started: its first sequence has had a row.
        matcher: with a grammar, the beginning of it, which every continuation copies.
    """

    __slots__ = (
        "arrival", "beams", "end_ids", "id", "matcher", "max_total", "num_prompt", "number", "params", "priority", "prompt",
        "prompt_scored", "root", "seed", "sequences", "source", "spawned", "started", "stop_ids", "stop_set", "stream",
        "unfinished", "width")

    def __init__(
        self, source: EngineRequest, number: int, seed: int, max_total: int, root: bytes, arrival: float) -> None:
        params = source.params
        self.id, self.number, self.seed, self.root = source.request_id, number, seed, root
        self.source, self.params, self.arrival, self.priority = source, params, arrival, source.priority
        self.prompt: Int32 = np.asarray(source.prompt_token_ids, np.int32)
        self.num_prompt, self.max_total, self.width = len(self.prompt), max_total, params.width
        # A grammar lets an end token through only where ignore_eos has left nothing else: then it is over in any case.
        ignored = params.ignore_eos and source.grammar is None
        self.end_ids = frozenset() if ignored else frozenset(source.eos_token_ids)
        self.stop_ids = tuple(sorted(self.end_ids | set(params.stop_token_ids)))
        self.stop_set = frozenset(self.stop_ids)
        self.stream = source.stream and not params.use_beam_search
        self.sequences: list[Sequence] = []
        self.unfinished = params.n if params.use_beam_search else self.width
        self.spawned = self.width == 1
        self.prompt_scored = 1
        self.started = False
        self.beams: Beams | None = None
        self.matcher: Matcher | None = None

    @property
    def scorer(self) -> "Sequence | None":
        """Who computes the prompt logprobs that are owed: the first continuation that lives; None when none are owed.

        It computes the whole prompt itself, without the prefix cache. Until all are there no sibling that waits is started
        from blocks of others: each may become the scorer, when those before it are aborted, and must not have skipped any.
        """
        if self.params.prompt_logprobs is None or self.prompt_scored >= self.num_prompt:
            return None
        return next((s for s in self.sequences if s.status is not Status.ENDED), None)

    @property
    def host_bound(self) -> bool:
        """True when every token waits for the host."""
        return self.beams is not None or bool(self.params.logits_processors)

    @property
    def sums_logprobs(self) -> bool:
        """True when the sum of logprobs is reported."""
        p = self.params
        return p.use_beam_search or p.logprobs is not None or self.width > p.n

    def sampling(self, index: int) -> RowSampling:
        """How the row of continuation ``index`` samples."""
        p = self.params
        if self.beams is not None:
            return RowSampling(beam=True, seed=self.seed, index=index, logprobs=self.beams.num_candidates,
                               prompt_logprobs=self._prompt_logprobs(index))
        return RowSampling(
            temperature=p.temperature, top_k=max(p.top_k, 0), top_p=p.top_p, min_p=p.min_p, presence=p.presence_penalty,
            frequency=p.frequency_penalty, repetition=p.repetition_penalty, seed=self.seed, index=index,
            logprobs=p.logprobs if p.logprobs is not None else (0 if self.sums_logprobs else -1),
            prompt_logprobs=self._prompt_logprobs(index),
            bias_ids=tuple(p.logit_bias), bias_values=tuple(map(float, p.logit_bias.values())),
            allowed=None if p.allowed_token_ids is None else tuple(p.allowed_token_ids), bad_words=self._bad_words(),
            min_tokens=p.min_tokens, stop_ids=self.stop_ids if p.min_tokens else (), processors=bool(p.logits_processors),
            constrained=self.matcher is not None)

    def _bad_words(self) -> tuple[tuple[int, ...], ...]:
        if self.matcher is None or not self.params.ignore_eos:
            return self.source.bad_word_ids
        return (*self.source.bad_word_ids, *((token,) for token in self.end_ids))

    def _prompt_logprobs(self, index: int) -> int:
        asked, scorer = self.params.prompt_logprobs, self.scorer
        return asked if asked is not None and scorer is not None and scorer.index == index else -1


class Sequence:
    """One continuation of a request.

    Attributes:
        row: while RUNNING, else -1. announced: the workers know of the row.
        tokens: known tokens while it has no row. digests: of the full blocks of its tokens, as far as needed.
        host_blocks, computed: while swapped, its blocks in host memory and how many tokens' KV they hold.
        logprobs: of its generated tokens where asked for. cumulative: their sum where wanted.
        streamed: (request id, index), what names it in a StepOutput. matcher: its place in the request's grammar.
    """

    __slots__ = (
        "announced", "computed", "cumulative", "digests", "host_blocks", "index", "logprobs", "matcher", "request", "row",
        "status", "streamed", "tokens")

    def __init__(self, request: Request, index: int, tokens: Int32 | None = None, digests: list[bytes] | None = None) -> None:
        self.request, self.index = request, index
        self.status = Status.WAITING
        self.row = -1
        self.announced = False
        self.tokens: Int32 | None = request.prompt if tokens is None else tokens
        self.digests: list[bytes] = [] if digests is None else digests
        self.host_blocks: list[int] = []
        self.computed = 0
        self.logprobs: list[TokenLogprobs] | None = [] if request.params.logprobs is not None and not request.stream else None
        self.cumulative = 0.0
        self.streamed = (request.id, index)
        self.matcher: Matcher | None = None

    def __repr__(self) -> str:
        return f"Sequence({self.request.id!r}, {self.index}, {self.status.name}, row={self.row})"
