"""Service: prompts in, streams of Steps out; between the routes, which know HTTP, and the engine, which knows ids.

Owns the open requests of one API process: their text (Collector), deadlines, slow readers, and that what nobody reads any
more is aborted. It does not know JSON, routes or processes: the engine behind it is an EngineLink. Invariant: a stream
that was opened ends exactly once, with a finished Step for each of its prompts or with one ApiError, and leaving it
ends whatever of it still runs.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from octavo.config import EngineConfig
from octavo.engine.admission import check_request
from octavo.errors import CapacityError, RequestError
from octavo.log import get_logger
from octavo.messages import EngineRequest, StepOutput
from octavo.params import SamplingParams
from octavo.plan import GroupInfo
from octavo.server.admission import Admission, Ticket
from octavo.server.config import ServerConfig
from octavo.server.errors import INTERNAL, ApiError
from octavo.server.stream import Opened, Stream
from octavo.server.timing import ORIGIN, Observer, Origin, Timing
from octavo.text.chat import ChatTemplate
from octavo.text.collector import Collector
from octavo.text.deltas import Step
from octavo.text.intake import Intake, Prompt
from octavo.text.vocabulary import Tokenizer

T = TypeVar("T")
logger = get_logger(__name__)

OFF_LOOP_CHARS = 2_000
"""Texts from this length on are rendered and tokenised in a thread: a millisecond on the event loop delays every stream."""
IDLE_SECONDS = 0.02
"""Between two looks at whether a server that ends has ended its requests."""


class EngineLink(Protocol):
    """The engine process, as the service sees it.

    Attributes:
        prefix: what the ids of this process's requests begin with.
    """

    prefix: str

    @property
    def info(self) -> GroupInfo | None:
        """What was measured at start; None while the engine is not ready."""

    def add(self, request: EngineRequest) -> None:
        """Send a request; EngineDown while there is no engine to take it."""

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request or a continuation of it."""


@dataclass(slots=True)
class Ask:
    """One prompt to be continued.

    Attributes:
        params: max_tokens None is all that fits. explicit_max: the client named max_tokens, so that what does not fit
            is refused; a default is made smaller instead.
        priority, cache_salt: see EngineRequest.
    """

    prompt: Prompt
    params: SamplingParams
    explicit_max: bool = True
    priority: int = 0
    cache_salt: str = ""


class Service:
    """One per API process.

    Args:
        config, server: options. link: the engine. observer: takes the measurements.

    Attributes:
        tokenizer, intake, template: of the model, once ``equip`` has been called. The template is None for a model
            without one.
    """

    def __init__(self, config: EngineConfig, server: ServerConfig, link: EngineLink, observer: Observer) -> None:
        self.config, self.server, self.link, self.observer = config, server, link, observer
        share = server.api_server_count  # each API process has its part of what may wait, rounded up
        self.admission = Admission(-(-server.max_queued_requests // share), -(-server.max_queued_tokens // share),
                                   -(-server.max_held_bytes // share))
        self.tokenizer: Tokenizer | None = None
        self.template: ChatTemplate | None = None
        self._intake: Intake | None = None
        self._collector = Collector()
        self._streams: dict[str, tuple[Stream, int]] = {}
        self._numbers = itertools.count()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="octavo-text")
        self._lookups = ThreadPoolExecutor(1, thread_name_prefix="octavo-lookup")
        self._num_jobs = 0
        self.num_dropped = 0

    def equip(self, intake: Intake, template: ChatTemplate | None) -> None:
        """Give the service the model's text side."""
        self._intake, self.tokenizer, self.template = intake, intake.tokenizer, template

    @property
    def intake(self) -> Intake:
        """Prompts and parameters of the model; ApiError 503 before it is there."""
        if self._intake is None:
            raise ApiError(503, "The model is being loaded.", headers={"Retry-After": "1"})
        return self._intake

    @property
    def info(self) -> GroupInfo:
        """The engine's numbers; ApiError 503 while there is no engine."""
        info = self.link.info
        if info is None:
            raise ApiError(503, "The engine is not ready.", headers={"Retry-After": "1"})
        return info

    @property
    def num_open(self) -> int:
        """Streams that are open."""
        return len(self.admission.tickets)

    async def off_loop(self, size: int, work: Callable[..., T], *args: Any, lookup: bool = False) -> T:
        """Run text work: in a thread when it is long, so that no stream waits for it.

        Args:
            lookup: nothing is generated from it; it has a thread of its own, and requests that generate do not wait for it.

        Raises:
            CapacityError: as much text waits for a thread as may.
        """
        if size < OFF_LOOP_CHARS:
            return work(*args)
        if self._num_jobs >= self.server.max_queued_requests:
            raise self.admission.refusal(f"{self._num_jobs} texts wait to be read")
        self._num_jobs += 1
        job = asyncio.get_running_loop().run_in_executor(self._lookups if lookup else self._threads, work, *args)
        job.add_done_callback(self._job_done)
        return await job

    async def open(self, ticket: Ticket, asks: Sequence[Ask], *, timeout: float | None = None,
                   cut: Callable[[], None] | None = None) -> Stream:
        """Start to answer prompts. Either all of them start or none.

        Args:
            ticket: of the admission; the stream leaves it. timeout: seconds that the request may take from its arrival on.
            cut: breaks the client's connection; called when the client does not read.

        Raises:
            RequestError: a prompt or a parameter is refused. CapacityError: too much waits. ApiError: no engine.
        """
        size = sum(map(_weight, asks))
        requests, opened = await self.off_loop(size, self._prepare, list(asks), ticket.since, ORIGIN.get())
        ticket.wait(sum(len(request.prompt_token_ids) for request in requests))
        stream = Stream(self.drop, ticket, opened, cut, len(opened))
        try:
            for number, (request, one) in enumerate(zip(requests, opened, strict=True)):
                self.link.add(request)
                self._collector.add(one.request_id, one.prompt, one.prompt_token_ids, one.params, self.tokenizer, "deltas")
                self._streams[one.request_id] = (stream, number)
                self.observer.opened(one.timing, one.prompt, one.prompt_token_ids)
        except BaseException:
            stream.close()
            raise
        self._set_deadlines(stream, timeout)
        return stream

    def on_step(self, out: StepOutput) -> None:
        """Take in what a step of the engine says."""
        update = self._collector.update(out)
        for request_id in update.aborts:
            self.link.abort(request_id)
        for request_id, index in update.aborted_sequences:
            self.link.abort(request_id, index)
        now = time.monotonic()
        for request_id, num_cached in out.started:
            if (entry := self._streams.get(request_id)) is not None:
                stream, number = entry
                timing = stream.opened[number].timing
                timing.begun, timing.cached_tokens = out.planned or now, num_cached
                stream.begun = True
                stream.ticket.begin()
        for request_id, step in update.steps:
            if (entry := self._streams.get(request_id)) is not None:
                try:
                    self._deliver(*entry, step, now)
                except Exception:  # what goes wrong with one request must not cost the others their news
                    logger.exception("request %s: its news could not be handed on", request_id)
                    entry[0].fail(ApiError(500, INTERNAL))

    def on_refused(self, request_id: str, error: RequestError) -> None:
        """The engine does not take a request; a "server_error" is a bug of ours and no mistake of the client's."""
        if (entry := self._streams.get(request_id)) is not None:
            entry[0].fail(ApiError(500, str(error)) if error.code == "server_error" else error)

    def on_lost(self, message: str) -> None:
        """The engine has ended: so has every stream."""
        for stream in {stream for stream, _ in self._streams.values()}:
            stream.fail(ApiError(500, message))

    def drop(self, opened: Opened, reason: str) -> None:
        """Forget a request that has not ended, and have the engine forget it."""
        opened.done = True
        if self._streams.pop(opened.request_id, None) is not None:
            self._collector.abort(opened.request_id)
            self.link.abort(opened.request_id)
            timing = opened.timing
            while len(timing.reasons) < opened.params.n:
                timing.reasons.append(reason)
                self.observer.finished(timing, reason)
            self.observer.closed(timing)

    def abort_all(self, message: str) -> None:
        """End every stream with an error, at the end of a shutdown."""
        for stream in {stream for stream, _ in self._streams.values()}:
            stream.fail(ApiError(503, message))

    async def wait_idle(self) -> None:
        """Wait until no request is inside, in whatever state; for the end of the server, so it looks now and then."""
        while self.admission.tickets:
            await asyncio.sleep(IDLE_SECONDS)

    def close(self) -> None:
        """Give the threads back."""
        for threads in (self._threads, self._lookups):
            threads.shutdown(wait=False, cancel_futures=True)

    def _job_done(self, job: "asyncio.Future[Any]") -> None:
        self._num_jobs -= 1

    def _prepare(self, asks: list[Ask], arrival: float,
                 origin: Origin | None) -> tuple[list[EngineRequest], list[Opened]]:
        intake, info = self.intake, self.info
        requests, opened = [], []
        for ask in asks:
            name = f"{self.link.prefix}{next(self._numbers)}"
            ready = intake.prepare(name, ask.prompt, ask.params, stream=True, priority=ask.priority,
                                   cache_salt=ask.cache_salt, arrival=arrival)
            request = ready.request
            if not ask.explicit_max and ask.params.max_tokens is not None:  # a default never refuses
                fits = min(info.max_model_len, info.num_blocks * info.block_size) - len(request.prompt_token_ids)
                request.params = ask.params.clone(max_tokens=max(1, ask.params.min_tokens, min(ask.params.max_tokens, fits)))
            check_request(request, self.config, info)
            requests.append(request)
            timing = Timing(name, arrival, request.params, len(request.prompt_token_ids), origin)
            opened.append(Opened(name, ready.prompt, request.prompt_token_ids, request.params, timing))
        return requests, opened

    def _set_deadlines(self, stream: Stream, timeout: float | None) -> None:
        loop, server = asyncio.get_running_loop(), self.server
        passed = time.monotonic() - stream.ticket.since
        limits = [limit for limit in (timeout, server.request_timeout) if limit is not None]
        if limits:
            total = min(limits)
            stream.arm(loop.call_later(total - passed, self._expire, stream, total))
        if server.queue_timeout is not None:
            stream.arm(loop.call_later(server.queue_timeout - passed, self._expire_queued, stream, server.queue_timeout))

    def _expire(self, stream: Stream, seconds: float) -> None:
        if stream.begun:
            stream.fail(ApiError(504, f"The request was not done within {seconds:g} s.", param="timeout",
                                 headers={"x-should-retry": "false"}))
        else:
            self._expire_queued(stream, seconds)

    def _expire_queued(self, stream: Stream, seconds: float) -> None:
        if not stream.begun:
            stream.fail(CapacityError(f"The request did not start within {seconds:g} s.", self.admission.retry_after()))

    def _deliver(self, stream: Stream, number: int, step: Step, now: float) -> None:
        opened = stream.opened[number]
        timing = opened.timing
        count = sum(len(delta.token_ids) for delta in step.deltas)
        if count:
            self.observer.token(timing, now, count)
            timing.first = now if timing.first is None else timing.first
            timing.last = now
        for delta in step.deltas:
            timing.counts[delta.index] += len(delta.token_ids)
            if delta.finish_reason is not None:
                timing.reasons.append(delta.finish_reason)
                self.observer.finished(timing, delta.finish_reason)
        if step.finished:
            opened.done = True
            stream.open -= 1
            del self._streams[opened.request_id]
            self.observer.closed(timing)
        stream.push(number, step, now)
        stands = not stream.writing and now - stream.since > self.server.send_timeout
        if stands or stream.size > self.server.max_stream_buffer:
            logger.warning("a reader stood still and was dropped")
            self.num_dropped += 1
            stream.fail(ApiError(500, "The client did not read its answer."))
            if stream.cut is not None:
                stream.cut()


def _weight(ask: Ask) -> int:
    """How long the text work of an Ask takes, in characters; compiling a grammar counts as long."""
    if ask.params.structured_outputs is not None:
        return OFF_LOOP_CHARS
    return len(ask.prompt["prompt_token_ids"] if isinstance(ask.prompt, Mapping) else ask.prompt)
