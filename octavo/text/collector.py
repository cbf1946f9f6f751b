"""Collector: folds the engine's StepOutputs into the RequestOutputs that a caller receives.

Owns the text side of every unfinished request: detokenising, stop strings, logprobs with their texts, best_of. It does
not know the engine: it says what to abort and never does it. Invariant: a request given to ``add`` leaves exactly one
final output, whatever happens to its text; a request whose text cannot be made ends with an error and no other does.

A request with stop strings should be computed with ``EngineRequest.stream=True``, or its stop strings are found only
when it has ended. With best_of greater than n such a request also needs the logprob of every sampled token
(``StepOutput.logprobs``), because the engine does not rank what is cut here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from octavo.errors import RequestError
from octavo.log import get_logger
from octavo.messages import SequenceEnd, StepOutput, TokenLogprobs
from octavo.outputs import CompletionOutput, FinishReason, Logprob, PositionLogprobs, RequestOutput
from octavo.params import SamplingParams
from octavo.text.deltas import Delta, Step
from octavo.text.detokenizer import Detokenizer
from octavo.text.vocabulary import Tokenizer

logger = get_logger(__name__)

View = Literal["final", "snapshots", "deltas"]


@dataclass(slots=True)
class Update:
    """What one step means for the caller.

    Attributes:
        outputs: final outputs, and snapshots of changed requests that asked for them; each request at most once.
        steps: (request id, what is new) of changed requests that asked for deltas; these appear in no outputs.
        aborts: request ids that the engine may drop: every continuation was cut by a stop string.
        aborted_sequences: (request id, index) of continuations that were cut while siblings go on. Tokens that still
            come for them are ignored.
    """

    outputs: list[RequestOutput] = field(default_factory=list)
    steps: list[tuple[str, Step]] = field(default_factory=list)
    aborts: list[str] = field(default_factory=list)
    aborted_sequences: list[tuple[str, int]] = field(default_factory=list)


@dataclass(slots=True)
class _Sequence:
    index: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    detokenizer: Detokenizer | None = None
    logprobs: list[PositionLogprobs] = field(default_factory=list)
    cumulative: float | None = 0.0
    reason: FinishReason | None = None
    stop_reason: int | str | None = None
    told: bool = False  # the end has been given out as a Delta


@dataclass(slots=True)
class _Request:
    request_id: str
    prompt: str | None
    prompt_ids: Sequence[int]
    params: SamplingParams
    tokenizer: Tokenizer | None
    view: View
    sequences: list[_Sequence]
    prompt_logprobs: list[PositionLogprobs | None] | None
    open: int  # sequences without an end
    cut: list[int] = field(default_factory=list)  # those that were ended here, not by the engine
    num_cached: int = 0
    error: str | None = None
    begun: bool = False  # a Step has been given out

    @property
    def ranked(self) -> bool:
        """More sequences are computed than returned, and the choice is made here."""
        return self.params.width > self.params.n and not self.params.use_beam_search

    @property
    def late(self) -> bool:
        """What is returned is known at the end only."""
        return self.params.use_beam_search or self.params.width > self.params.n


class Collector:
    """The unfinished requests of one engine, as their callers see them. Not safe for use from several threads."""

    def __init__(self) -> None:
        self._requests: dict[str, _Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def add(self, request_id: str, prompt: str | None, prompt_ids: Sequence[int], params: SamplingParams,
            tokenizer: Tokenizer | None, view: View = "final") -> None:
        """Expect the outputs of a request.

        Args:
            tokenizer: None makes no text; params.detokenize off does the same.
            view: "final" gives one output at the end; "snapshots" also the state so far with every Update that changes
                it; "deltas" gives Steps instead of outputs. The latter two need ``EngineRequest.stream``. Beam search
                and best_of greater than n say nothing before the end: what is returned is known only then.

        Raises:
            RequestError: the id is that of an unfinished request.
        """
        if request_id in self._requests:
            raise RequestError(f"request_id {request_id!r:.200} is in use.", "request_id")
        self._requests[request_id] = _Request(
            request_id, prompt, prompt_ids, params, tokenizer if params.detokenize else None, view,
            [_Sequence(index) for index in range(params.width)],
            None if params.prompt_logprobs is None else [None], params.width)

    def update(self, step: StepOutput) -> Update:
        """Fold one step. Ids that are not expected (aborted meanwhile) are passed over."""
        update, changed = Update(), dict[str, _Request]()
        for request_id, num_cached in step.started:
            if (request := self._requests.get(request_id)) is not None:
                request.num_cached = num_cached
        for request_id, entries in step.prompt_logprobs:
            if (request := self._requests.get(request_id)) is not None and request.prompt_logprobs is not None:
                request.prompt_logprobs.extend(_position(entry, request.tokenizer) for entry in entries)
        self._fold_streamed(step, changed)
        for end in step.ended:
            if (request := self._requests.get(end.request_id)) is not None:
                changed[end.request_id] = request
                self._guard(request, end.index, end, None, None)
        done = set(step.finished)
        for request_id in step.finished:
            if (request := self._requests.get(request_id)) is not None:
                changed[request_id] = request
        for request_id, request in changed.items():
            self._settle(request, request_id in done, update)
        return update

    def abort(self, request_id: str) -> RequestOutput | None:
        """End a request at once with what it has, finish reason "abort"; None if it is not expected."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return None
        for sequence in request.sequences:
            if sequence.reason is None:
                if sequence.detokenizer is not None:
                    sequence.text += sequence.detokenizer.finish()
                sequence.reason = "abort"
        return _output(request, finished=True)

    def _fold_streamed(self, step: StepOutput, changed: dict[str, _Request]) -> None:
        if not step.streamed:
            return
        ends = {(end.request_id, end.index): end for end in step.ended}
        # A step may give a sequence several tokens; only the last of them can be the one that ended it.
        last = {key: i for i, key in enumerate(step.streamed) if key in ends} if ends else {}
        logprobs = step.logprobs or [None] * len(step.streamed)
        for i, (key, token, entry) in enumerate(zip(step.streamed, step.token_list(), logprobs, strict=True)):
            request = self._requests.get(key[0])
            if request is not None:
                changed[key[0]] = request
                end = ends.get(key)
                hidden = end is not None and last[key] == i and _hides_last(end, request.params)
                self._guard(request, key[1], end, token, entry, hidden)

    def _guard(self, request: _Request, index: int, end: SequenceEnd | None, token: int | None,
               entry: TokenLogprobs | None, hidden: bool = False) -> None:
        """Fold a token, or without one an end; whatever goes wrong stays within the request."""
        try:
            sequence = request.sequences[index]
            if sequence.reason is not None:
                return  # cut here before
            if token is not None:
                _fold_token(request, sequence, token, entry, hidden)
                if sequence.reason is not None and end is None:
                    request.cut.append(index)
            elif end is not None:
                _fold_end(request, sequence, end)
        except Exception as error:
            logger.exception("request %s: its text could not be made", request.request_id)
            _fail(request, f"{type(error).__name__}: {error}")

    def _settle(self, request: _Request, done: bool, update: Update) -> None:
        if done and request.open:
            if request.params.use_beam_search:  # the engine ends the beams that it returns, and no others
                request.sequences = [sequence for sequence in request.sequences if sequence.reason is not None]
            if not request.params.use_beam_search or len(request.sequences) < request.params.n:
                _fail(request, "the engine finished the request without a result")
        if done or not request.open:
            del self._requests[request.request_id]
            if request.view == "deltas":
                update.steps.append((request.request_id, _step(request, finished=True)))
            else:
                update.outputs.append(_output(request, finished=True))
            if not done and request.cut:
                update.aborts.append(request.request_id)
            return
        update.aborted_sequences += [(request.request_id, index) for index in request.cut]
        request.cut.clear()
        if request.view == "final" or request.late:
            return
        if request.view == "deltas":
            update.steps.append((request.request_id, _step(request, finished=False)))
        else:
            update.outputs.append(_output(request, finished=False))


def _fold_token(request: _Request, sequence: _Sequence, token: int, entry: TokenLogprobs | None,
                hidden: bool) -> None:
    params = request.params
    sequence.token_ids.append(token)
    if entry is None:
        sequence.cumulative = None
    else:
        if sequence.cumulative is not None:
            sequence.cumulative += entry.logprobs[0]
        if params.logprobs is not None:
            sequence.logprobs.append(_position(entry, request.tokenizer))
    if request.tokenizer is None:
        return
    if sequence.detokenizer is None:
        sequence.detokenizer = Detokenizer(request.tokenizer, params, request.prompt_ids)
    if hidden:
        return
    sequence.text += sequence.detokenizer.push((token,))
    if sequence.detokenizer.stop is not None:
        if request.ranked and sequence.cumulative is None:
            raise ValueError("best_of with stop strings needs the logprobs of streamed tokens")
        _end(request, sequence, "stop", sequence.detokenizer.stop)


def _fold_end(request: _Request, sequence: _Sequence, end: SequenceEnd) -> None:
    if end.error is not None:
        request.error = end.error
    if end.token_ids:  # not streamed: everything comes at once
        _fold_whole(request, sequence, end)
        if sequence.reason is not None:
            return
    elif sequence.detokenizer is not None:
        sequence.text += sequence.detokenizer.finish()
    if end.cumulative_logprob is not None:
        sequence.cumulative = end.cumulative_logprob
    elif end.token_ids:
        sequence.cumulative = None
    stop = sequence.detokenizer.stop if sequence.detokenizer is not None else None
    _end(request, sequence, "stop" if stop is not None else end.reason, end.stop_token if stop is None else stop)


def _fold_whole(request: _Request, sequence: _Sequence, end: SequenceEnd) -> None:
    params, tokenizer = request.params, request.tokenizer
    sequence.token_ids = list(end.token_ids)
    if params.logprobs is not None and end.logprobs is not None:
        sequence.logprobs = [_position(entry, tokenizer) for entry in end.logprobs]
    if tokenizer is None:
        return
    ids = sequence.token_ids[:-1] if _hides_last(end, params) else sequence.token_ids
    if not params.stop:
        sequence.text = tokenizer.decode_generated(
            ids, params.skip_special_tokens, params.spaces_between_special_tokens, request.prompt_ids)
        return
    detokenizer = Detokenizer(tokenizer, params, request.prompt_ids)
    sequence.text = detokenizer.push(ids) + detokenizer.finish()
    if detokenizer.stop is None:
        return
    kept = detokenizer.num_tokens
    if end.logprobs is not None:
        sequence.cumulative = math.fsum(entry.logprobs[0] for entry in end.logprobs[:kept])
    else:
        sequence.cumulative = end.cumulative_logprob if kept == len(sequence.token_ids) else None
    if request.ranked and sequence.cumulative is None:
        raise ValueError("best_of with stop strings needs stream=True and the logprobs of the tokens")
    del sequence.token_ids[kept:]
    del sequence.logprobs[kept:]
    _end(request, sequence, "stop", detokenizer.stop)


def _hides_last(end: SequenceEnd, params: SamplingParams) -> bool:
    """The token that ended the sequence (EOS, a stop token) is no part of the text unless asked for."""
    return end.reason == "stop" and not params.include_stop_str_in_output


def _end(request: _Request, sequence: _Sequence, reason: FinishReason, stop_reason: int | str | None) -> None:
    sequence.reason, sequence.stop_reason = reason, stop_reason
    sequence.detokenizer = None
    request.open -= 1


def _fail(request: _Request, message: str) -> None:
    """End what is open with an error; the engine has to drop it."""
    request.error = request.error or message[:200]
    for sequence in request.sequences:
        if sequence.reason is None:
            request.cut.append(sequence.index)
            _end(request, sequence, "error", None)


def _position(entry: TokenLogprobs, tokenizer: Tokenizer | None) -> PositionLogprobs:
    found: PositionLogprobs = {}
    for token, logprob, rank in zip(entry.token_ids, entry.logprobs, entry.ranks, strict=True):
        if token not in found:  # the sampled token comes first and may be among the best too
            found[token] = Logprob(logprob, rank, None if tokenizer is None else tokenizer.token_text(token))
    return found


def _returned(request: _Request) -> list[_Sequence]:
    """The n continuations that the caller gets, in order."""
    sequences = request.sequences
    if request.ranked:
        best = sorted(sequences, key=lambda s: -math.inf if s.cumulative is None else s.cumulative, reverse=True)
        # An unfinished or failed continuation never displaces one that has a result.
        sequences = sorted(best, key=lambda s: s.reason in ("abort", "error"))
    return sequences[: request.params.n]


def _step(request: _Request, finished: bool) -> Step:
    """Take what is new out of the request: nothing is given out twice, and nothing is kept for long."""
    deltas = []
    for index, sequence in enumerate(_returned(request)):
        if sequence.told or not (sequence.token_ids or sequence.text or sequence.reason):
            continue
        logprobs = sequence.logprobs if request.params.logprobs is not None else None
        deltas.append(Delta(index, sequence.text, sequence.token_ids, logprobs, sequence.reason, sequence.stop_reason))
        sequence.text, sequence.token_ids, sequence.logprobs = "", [], []
        sequence.told = sequence.reason is not None
    step = Step(deltas, finished, error=request.error)
    if not request.begun:
        request.begun, step.num_cached_tokens = True, request.num_cached
    if request.prompt_logprobs is not None and (finished or len(request.prompt_logprobs) == len(request.prompt_ids)):
        step.prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
    return step


def _output(request: _Request, finished: bool) -> RequestOutput:
    params = request.params
    shows = params.logprobs is not None or params.use_beam_search or request.ranked
    outputs = [
        CompletionOutput(
            index, s.text, list(s.token_ids), s.cumulative if shows else None,
            list(s.logprobs) if params.logprobs is not None else None, s.reason, s.stop_reason)
        for index, s in enumerate(_returned(request))
    ]
    prompt_logprobs = None if request.prompt_logprobs is None else list(request.prompt_logprobs)
    return RequestOutput(
        request.request_id, request.prompt, list(request.prompt_ids), prompt_logprobs, outputs, finished,
        request.num_cached, request.error)
