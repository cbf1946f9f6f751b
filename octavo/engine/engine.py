"""Engine: requests in, StepOutputs out. The step is the story: schedule, submit, update.

Owns the loop's state (the step under way, failures in a row) and the front door (add, abort); it does not know rows, blocks
or tensors. With overlap a step is planned and submitted before the tokens of the one before it are known: that is the one
variable ``_in_flight``.

Invariant: an accepted request is reported exactly once per continuation, whatever happens, until ``EngineDead``.
"""

import random
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from octavo.config import EngineConfig
from octavo.engine.admission import check_request
from octavo.engine.beam import Beams
from octavo.engine.cache import root_digest
from octavo.engine.grammars import Grammars
from octavo.engine.request import Request, Status
from octavo.engine.request import Sequence as Continuation
from octavo.engine.scheduler import MIXED_PROMPT_TOKENS, Scheduler
from octavo.engine.state import EngineState, StepRecord
from octavo.engine.stats import Stats, StatsLog
from octavo.engine.update import BAD_GRAMMAR, apply_result, fail_step
from octavo.errors import ConfigError, EngineDead, RequestError
from octavo.log import get_logger
from octavo.messages import EngineRequest, StepOutput
from octavo.params import LogitsProcessor
from octavo.plan import Constraint, GroupInfo, StepPlan, StepResult

MAX_FAILED_STEPS = 3
"""Failed steps in a row after which the engine gives up: the fault is not the requests'."""

_log = get_logger(__name__)


class Pending(Protocol):
    """A submitted step."""

    def result(self) -> StepResult:
        """Wait for the step; raises what it raised."""

    def done(self) -> bool:
        """True when ``result`` would not wait."""


class Group(Protocol):
    """The workers, as the engine sees them."""

    @property
    def info(self) -> GroupInfo:
        """What was measured at start."""

    @property
    def asynchronous(self) -> bool:
        """True when ``submit`` returns before the step is computed."""

    def submit(self, plan: StepPlan) -> Pending:
        """Send a plan to all workers."""

    def set_processors(self, row: int, generation: int, processors: Sequence[LogitsProcessor],
                       constraint: Constraint | None) -> None:
        """Register the logits processors and the constraint of a row that the next plan starts."""

    def host_ready(self) -> bool:
        """Whether blocks can move to host memory without waiting for it first."""

    def expect_host(self) -> None:
        """Blocks will move to host memory before long; may be said again."""

    def close(self) -> None:
        """End the workers."""


class Engine:
    """One engine over one group.

    Args:
        config: options. group: started workers. seed: root of the seeds of requests that bring none.
        clock: monotonic seconds. patient: nobody reads along, so prompts may take whole steps while others decode: more
            tokens a second, and longer pauses between the tokens of a request.
        grammars: compiles those of requests; without it such requests are refused.

    Raises:
        ConfigError: the group's numbers cannot work together.
    """

    def __init__(
        self, config: EngineConfig, group: Group, *, seed: int = 0, clock: Callable[[], float] = time.monotonic,
        patient: bool = False, grammars: Grammars | None = None) -> None:
        _check_info(group.info)
        self._config, self._group, self._clock = config, group, clock
        self._state = EngineState(config, group.info, group.host_ready, group.expect_host)
        mixed = group.info.max_num_batched_tokens if patient else MIXED_PROMPT_TOKENS
        self._scheduler = Scheduler(self._state, mixed_tokens=mixed)
        self._overlap = group.asynchronous if config.async_scheduling is None else config.async_scheduling
        self._in_flight: tuple[StepRecord, Pending] | None = None
        self._seeds = random.Random(seed)
        self._grammars = Grammars(None) if grammars is None else grammars
        self._early_aborts: dict[str, set[int]] = {}  # of continuations whose grammar is being compiled
        self._num_requests = self._failed = 0
        self._dead: str | None = None
        self._stats_log = None if config.disable_log_stats else StatsLog(_log, clock())

    @property
    def stats(self) -> Stats:
        """Counters, and gauges of this moment."""
        state, stats = self._state, self._state.stats
        stats.running, stats.compiling = state.num_running, len(self._grammars)
        stats.waiting = len(state.queue) + stats.compiling
        stats.swapped = sum(1 for sequence in state.queue if sequence.host_blocks)
        stats.kv_used, stats.kv_cached = state.pool.num_used, state.pool.num_cached
        stats.host_used, stats.host_cached = state.host_pool.num_used, state.host_pool.num_cached
        return stats

    def add(self, request: EngineRequest) -> None:
        """Accept a request.

        Raises:
            RequestError: it can never run, or its id is taken; nothing has changed. EngineDead: the engine has ended.
        """
        self._check_alive()
        if request.request_id in self._state.requests or request.request_id in self._grammars:
            raise RequestError(f"request_id {request.request_id!r:.200} is already in use.", "request_id")
        max_total = check_request(request, self._config, self._state.info)
        given = request.params.seed
        seed = self._seeds.getrandbits(64) if given is None else given
        accepted = Request(request, self._num_requests, seed, max_total, root_digest(request.cache_salt),
                           request.arrival or self._clock())
        if request.params.use_beam_search:
            accepted.beams = Beams(request.params, accepted.end_ids, accepted.stop_set, max_total - accepted.num_prompt,
                                   self._state.info.vocab_size)
        if request.grammar is None:
            self._queue(accepted)
        else:
            self._grammars.start(accepted)
        self._num_requests += 1

    def abort(self, request_id: str, index: int | None = None, *, report: bool = True) -> bool:
        """End a request, or one continuation of it, now. False: there is no such thing, or the engine has ended.

        Args:
            report: the next StepOutput says so; False forgets the request at once, so that its id may be used again.
        """
        if self._dead is not None:  # perhaps in the middle of a step: what the state says is not to be trusted
            return False
        if index is not None and request_id in self._grammars:  # the others will need the grammar
            self._early_aborts.setdefault(request_id, set()).add(index)
            return True
        compiling = self._grammars.take(request_id)
        if compiling is not None:
            self._early_aborts.pop(request_id, None)
            self._queue(compiling)
        request = self._state.requests.get(request_id)
        if request is None:
            return False
        if not report:
            self._state.end_request(request, "abort")
            out = self._state.out
            out.ended = [end for end in out.ended if end.request_id != request_id]
            out.finished = [name for name in out.finished if name != request_id]
            return True
        if index is None or request.beams is not None:
            self._state.end_request(request, "abort")
            return True
        if not request.spawned:
            self._state.spawn_waiting(request)
        for sequence in request.sequences:
            if sequence.index == index and sequence.status is not Status.ENDED:
                self._state.finish(sequence, "abort")
                return True
        return False

    def step(self) -> StepOutput:
        """Compute one step, and say what the last finished one has found (with overlap: the one before).

        Raises:
            EngineDead: the third step in a row has failed, or the engine has ended before. Any other exception is a bug or
                an interrupt, and ends the engine.
        """
        self._check_alive()
        try:
            submitted = self._submit()
            if self._overlap:
                submitted, self._in_flight = self._in_flight, submitted
            if submitted is not None:
                self._collect(*submitted)
            return self._report()
        except BaseException as error:  # nobody knows how far it came: going on could give wrong answers
            self._dead = self._dead or f"a step was broken off by {type(error).__name__}"
            raise

    def has_work(self) -> bool:
        """True while a request is unfinished, a result is awaited or an end has not been said yet."""
        return bool(self._state.requests or self._grammars) or self._in_flight is not None or self._state.has_news()

    def check(self) -> None:
        """Prove the invariants of the whole engine; AssertionError says which one is broken."""
        self._state.check()

    def close(self) -> None:
        """End the workers; the engine cannot be used afterwards."""
        self._dead = self._dead or "it was closed"
        self._grammars.close()
        self._group.close()

    def _queue(self, request: Request) -> None:
        first = Continuation(request, 0)
        request.sequences.append(first)
        self._state.requests[request.id] = request
        self._state.queue.push(first)
        self._state.stats.requests += 1

    def _queue_compiled(self) -> None:
        for request in self._grammars.ready():
            self._queue(request)
            if request.matcher is not None and request.matcher.error:
                self._state.end_request(request, "error", f"{BAD_GRAMMAR} {request.matcher.error:.200}.")
            for index in self._early_aborts.pop(request.id, ()):
                self.abort(request.id, index)

    def _submit(self) -> tuple[StepRecord, Pending] | None:
        scheduler, state = self._scheduler, self._state
        self._queue_compiled()
        state.out.planned = self._clock()
        plan = scheduler.schedule()
        record = scheduler.record
        if plan is None or record is None:
            state.pending = None
            if self._in_flight is None and not state.has_news():
                self._grammars.wait()
            return None
        try:
            for given in record.processors:
                self._group.set_processors(*given)
            pending = self._group.submit(plan)
        except Exception as error:
            fail_step(state, record, error)
            state.pending = None
            self._note_failure(error)
            return None
        state.pending = record if self._overlap else None
        state.stats.steps += 1
        return record, pending

    def _collect(self, record: StepRecord, pending: Pending) -> None:
        try:
            result = pending.result()
            if result.step != record.step or len(result.tokens) != len(record.sample_rows):
                raise RuntimeError(f"the result of step {result.step} with {len(result.tokens)} tokens arrived where step "
                                   f"{record.step} with {len(record.sample_rows)} is due.")
        except Exception as error:
            fail_step(self._state, record, error)
            if self._in_flight is not None:  # planned on top of what has not happened
                self._in_flight[0].checksum = None
            self._note_failure(error)
            return
        self._failed = 0
        if record.checksum is not None and result.checksum != record.checksum:
            raise AssertionError(
                f"step {record.step}: rows of host and device differ, {record.checksum:#x} and {result.checksum:#x}.")
        apply_result(self._state, record, result)
        self._scheduler.preemption.observe(record, result)

    def _note_failure(self, error: Exception) -> None:
        self._failed += 1
        self._state.stats.failed_steps += 1
        _log.error("a step failed (%d in a row)", self._failed, exc_info=error)
        if isinstance(error, EngineDead):  # the group says that there is nothing left to try
            self._dead = str(error).rstrip(".")
            raise error
        if self._failed >= MAX_FAILED_STEPS:
            self._dead = f"{self._failed} steps in a row have failed, the last with {type(error).__name__}"
            raise EngineDead(f"{self._dead}.") from error

    def _report(self) -> StepOutput:
        out, stats = self._state.take_output(), self._state.stats
        stats.note_step(out.num_prompt_tokens, out.num_generated_tokens)
        if self._stats_log is not None and self._stats_log.due(now := self._clock()):
            self._stats_log.write(self.stats, now)
        return out

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise EngineDead(f"the engine has ended: {self._dead}.")


def _check_info(info: GroupInfo) -> None:
    for name in ("num_blocks", "block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "vocab_size"):
        if getattr(info, name) < 1:
            raise ConfigError(f"{name} must be at least 1, got {getattr(info, name)}.", name)
    if info.max_num_batched_tokens < info.max_num_seqs:
        raise ConfigError(
            f"max_num_batched_tokens ({info.max_num_batched_tokens}) must be at least max_num_seqs ({info.max_num_seqs}).",
            "max_num_batched_tokens")
