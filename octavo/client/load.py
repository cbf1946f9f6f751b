"""Traffic: when requests arrive, sending them, and a record of what came back when.

Owns arrival times and the clock of a benchmark; it does not know what prompts mean or how figures are made of records.
The client's own cost is 12 to 15 microseconds per chunk (uvloop), so one process follows some 50,000 chunks a
second. Invariant: every request leaves exactly one record, a failed one too, and what arrives together has one time.
"""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from octavo.client.chunks import COMPLETIONS, stream
from octavo.client.connection import Client, Refusal
from octavo.client.wire import ConnectionFailed
from octavo.errors import ConfigError

RAMPS = ("linear", "exponential")
BUSY_SECONDS = 1.0  # over which the client's own load is taken


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a benchmark.

    Attributes:
        prompt: text, or token ids (completions only). num_prompt_tokens: as far as known before it is sent.
        num_output_tokens: most tokens of the answer.
    """

    prompt: str | list[int]
    num_prompt_tokens: int
    num_output_tokens: int


@dataclass(frozen=True, slots=True)
class Traffic:
    """How requests arrive.

    Attributes:
        rate: requests per second; inf sends all at once. burstiness: shape of the gamma distribution of the gaps; 1 is a
            Poisson process, less comes in bursts, more is steadier. ramp: RAMPS or None; then the rate goes from
            ``start`` to ``end`` over the requests. max_concurrency: most requests under way; None sets no limit.

    Raises:
        ConfigError: a value is out of range, or rate and ramp are both given.
    """

    rate: float = float("inf")
    burstiness: float = 1.0
    max_concurrency: int | None = None
    ramp: str | None = None
    start: float | None = None
    end: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("request_rate", self.rate), ("burstiness", self.burstiness), ("ramp_up_start_rps", self.start),
                            ("ramp_up_end_rps", self.end), ("max_concurrency", self.max_concurrency)):
            if value is not None and not value > 0:
                raise ConfigError(f"{name} must be more than 0, got {value}.", name)
        if self.ramp is None and (self.start is not None or self.end is not None):
            raise ConfigError("ramp_up_start_rps and ramp_up_end_rps need ramp_up_strategy.", "ramp_up_strategy")
        if self.ramp is None:
            return
        if self.start is None or self.end is None or self.rate != float("inf"):
            raise ConfigError(f"ramp_up_strategy {self.ramp!r} needs ramp_up_start_rps and ramp_up_end_rps, and no "
                              "request_rate.", "ramp_up_strategy")
        if not math.isfinite(self.start + self.end):
            raise ConfigError("ramp_up_start_rps and ramp_up_end_rps must be finite.", "ramp_up_start_rps")

    def arrivals(self, count: int, seed: int) -> list[float]:
        """Seconds from the start at which each of ``count`` requests arrives, ascending.

        At a constant rate they are scaled to end at count / rate, so that the rate is the one asked for.
        """
        rates = self._rates(count)
        if np.isinf(rates).all():
            return [0.0] * count
        gaps = 1.0 / rates
        if np.isfinite(self.burstiness):
            gaps = np.random.default_rng(seed).gamma(self.burstiness, gaps / self.burstiness)
        times = np.cumsum(gaps)
        if self.ramp is None and times[-1] > 0:
            times *= count / self.rate / times[-1]
        return [float(at) for at in times]

    def _rates(self, count: int) -> Any:
        """Requests per second at each request, float64[count]."""
        if self.ramp is None or self.start is None or self.end is None:
            return np.full(count, self.rate)
        progress = np.arange(count) / max(count - 1, 1)
        if self.ramp == "linear":
            return self.start + (self.end - self.start) * progress
        return self.start * (self.end / self.start) ** progress


@dataclass(slots=True)
class Record:
    """What came of one request; times are seconds of the benchmark's clock.

    Attributes:
        start: sent. first: first output came, or None. gaps: seconds between later arrivals of output, one per chunk.
        end: of the answer, or of the attempt. num_prompt_tokens, num_output_tokens: from the server's usage where it
            sends one (``counted``), else what was asked for and the number of chunks. failure: None for a whole answer.
    """

    start: float
    num_prompt_tokens: int
    first: float | None = None
    gaps: list[float] = field(default_factory=list)
    end: float = 0.0
    num_output_tokens: int = 0
    counted: bool = False
    text: str = ""
    failure: ConnectionFailed | Refusal | None = None

    @property
    def error(self) -> str:
        """Why there is no whole answer; empty when there is."""
        return "" if self.failure is None else str(self.failure)

    @property
    def ttft(self) -> float:
        """Seconds to the first output; 0 when there was none."""
        return 0.0 if self.first is None else self.first - self.start

    @property
    def latency(self) -> float:
        """Seconds to the end."""
        return self.end - self.start

    @property
    def tpot(self) -> float:
        """Seconds per output token after the first; 0 when there is only one."""
        return (self.latency - self.ttft) / (self.num_output_tokens - 1) if self.num_output_tokens > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Sender:
    """Sends requests of one kind.

    Attributes:
        client: to the server. path: of the route. chat: the body is a chat's. model: name for the server.
        fields: what else every body holds (sampling parameters, ignore_eos, ...).
    """

    client: Client
    model: str
    path: str = COMPLETIONS
    chat: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    clock: Callable[[], float] = time.perf_counter

    def body(self, asked: Asked) -> dict[str, Any]:
        """The JSON body of a request."""
        what: dict[str, Any] = {"prompt": asked.prompt, "max_tokens": asked.num_output_tokens}
        if self.chat:
            what = {"messages": [{"role": "user", "content": asked.prompt}],
                    "max_completion_tokens": asked.num_output_tokens}
        return {"model": self.model, **what, "stream": True, "stream_options": {"include_usage": True}, **self.fields}

    async def send(self, asked: Asked) -> Record:
        """Send one request and follow its answer to the end; errors of the server and the wire are in the record."""
        body, pieces, last, ended = self.body(asked), [], 0.0, 0.0
        clock = self.clock
        record = Record(clock(), asked.num_prompt_tokens)
        try:
            async for chunks in stream(self.client, self.path, body):
                now = clock()
                for chunk in chunks:
                    for choice in chunk.choices:
                        if choice.counts:
                            if record.first is None:
                                record.first = now
                            else:
                                record.gaps.append(now - last)
                            last = now
                            pieces.append(choice.said)
                        if choice.finish_reason is not None:
                            ended = now
                    if chunk.usage is not None and chunk.usage.completion_tokens is not None:
                        record.counted = True
                        record.num_prompt_tokens = chunk.usage.prompt_tokens
                        record.num_output_tokens = chunk.usage.completion_tokens
            if not ended:
                raise ConnectionFailed("the answer has no finish_reason")
        except (ConnectionFailed, Refusal) as error:
            record.failure = error
        record.end = clock() if record.failure is not None else ended
        if record.first is None and record.failure is None:
            record.first = ended  # an answer without any text: its end is all that can be seen of it
        if not record.counted:
            record.num_output_tokens = len(pieces)
        record.text = "".join(pieces)
        return record


async def run_all(send: Callable[[Asked], Awaitable[Record]], asked: Sequence[Asked], arrivals: Sequence[float],
                  max_concurrency: int | None = None, clock: Callable[[], float] = time.perf_counter,
                  done: Callable[[Record], None] = lambda record: None) -> tuple[list[Record], float]:
    """Send every request at its time, or as soon as fewer than ``max_concurrency`` are under way.

    Args:
        send: takes one request to its end and raises nothing. done: is told of every record.

    Returns:
        Records in the order of ``asked``, and the seconds that all of it took.
    """
    room = asyncio.Semaphore(max_concurrency) if max_concurrency is not None else None
    begin = clock()

    async def one(request: Asked) -> Record:
        try:
            record = await send(request)
        finally:
            if room is not None:
                room.release()
        done(record)
        return record

    async with asyncio.TaskGroup() as group:
        tasks = []
        for request, at in zip(asked, arrivals, strict=True):
            wait = begin + at - clock()
            if wait > 0:
                await asyncio.sleep(wait)
            if room is not None:
                await room.acquire()
            tasks.append(group.create_task(one(request)))
    return [task.result() for task in tasks], clock() - begin


async def busiest(stop: asyncio.Event, clock: Callable[[], float] = time.perf_counter,
                  cpu: Callable[[], float] = time.thread_time) -> float:
    """The largest share of a second, 0 to 1, for which this thread computed, until ``stop`` is set."""
    found, began, spent = 0.0, clock(), cpu()
    while not stop.is_set():
        with suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), BUSY_SECONDS)
        now, used = clock(), cpu()
        if now - began >= BUSY_SECONDS / 2:  # the rest of a run may be too short to say anything
            found = max(found, (used - spent) / (now - began))
        began, spent = now, used
    return found
