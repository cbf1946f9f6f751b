"""Traffic: arrival processes in numbers, concurrency under a clock that tests move, and records of answers."""

import asyncio
import heapq
import selectors
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stand_in import StandIn, chunked, error

from octavo.client.chunks import Chunk, decode
from octavo.client.connection import Address, Client
from octavo.client.load import Asked, Record, Sender, Traffic, busiest, run_all
from octavo.errors import ConfigError


class Jumping(selectors.SelectSelector):
    """Where a loop would wait for a timer, its clock jumps there."""

    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout:
            self.now += timeout
        return super().select(0)


class FakeLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes at once."""

    def __init__(self) -> None:
        self.clockwork = Jumping()
        super().__init__(self.clockwork)

    def time(self) -> float:
        return self.clockwork.now


def fake_run(work: Callable[[Callable[[], float]], Any]) -> Any:
    """Run a coroutine made with the fake loop's clock."""
    loop = FakeLoop()
    try:
        return loop.run_until_complete(work(loop.time))
    finally:
        loop.close()


def gaps(traffic: Traffic, count: int = 20000, seed: int = 7) -> Any:
    return np.diff([0.0, *traffic.arrivals(count, seed)])


def test_all_at_once() -> None:
    assert Traffic().arrivals(3, 0) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_mean_and_the_variance_of_their_distribution(burstiness: float) -> None:
    """Gamma with mean 1 / rate has variance 1 / (burstiness * rate^2); burstiness 1 is a Poisson process."""
    found = gaps(Traffic(rate=5.0, burstiness=burstiness))
    assert found.mean() == pytest.approx(0.2, rel=1e-9), "scaled to the rate that was asked for"
    assert found.var() == pytest.approx(0.04 / burstiness, rel=0.1)
    if burstiness == 1.0:  # exponential: P(gap > mean) = 1/e
        assert (found > 0.2).mean() == pytest.approx(np.exp(-1), abs=0.015)


def test_even_gaps() -> None:
    assert Traffic(rate=4.0, burstiness=float("inf")).arrivals(3, 0) == pytest.approx([0.25, 0.5, 0.75])


def test_the_same_seed_gives_the_same_times() -> None:
    assert Traffic(rate=3.0).arrivals(9, 1) == Traffic(rate=3.0).arrivals(9, 1) != Traffic(rate=3.0).arrivals(9, 2)


@pytest.mark.parametrize(("ramp", "rates"), [("linear", [1, 2, 3, 4, 5]), ("exponential", [1, 5**0.25, 5**0.5, 5**0.75, 5])])
def test_ramps(ramp: str, rates: list[float]) -> None:
    traffic = Traffic(burstiness=float("inf"), ramp=ramp, start=1.0, end=5.0)
    assert 1 / gaps(traffic, 5) == pytest.approx(rates)
    random = gaps(Traffic(ramp=ramp, start=1.0, end=50.0), 4000)
    assert random[:500].mean() > 5 * random[-500:].mean()


@pytest.mark.parametrize(("options", "name"), [
    ({"rate": 0.0}, "request_rate"), ({"rate": float("nan")}, "request_rate"), ({"burstiness": -1.0}, "burstiness"),
    ({"max_concurrency": 0}, "max_concurrency"), ({"ramp": "linear"}, "ramp_up_strategy"), ({"start": 1.0}, "ramp_up_strategy"),
    ({"ramp": "linear", "start": 1.0, "end": 2.0, "rate": 3.0}, "ramp_up_strategy"),
    ({"ramp": "linear", "start": 1.0, "end": 0.0}, "ramp_up_end_rps"),
    ({"ramp": "linear", "start": 1.0, "end": float("inf")}, "ramp_up_start_rps"),
])
def test_bad_traffic_is_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        Traffic(**options)


@given(arrivals=st.lists(st.floats(0, 20), min_size=1, max_size=30), seconds=st.lists(st.floats(0.1, 9), min_size=1, max_size=5),
       limit=st.none() | st.integers(1, 5))
def test_requests_start_at_their_time_or_when_there_is_room(
    arrivals: list[float], seconds: list[float], limit: int | None
) -> None:
    """Against a simulation: each starts at its arrival, or, with all places taken, when the first of them is free."""
    arrivals.sort()
    lasts = [seconds[i % len(seconds)] for i in range(len(arrivals))]
    asked = [Asked("", i, 1) for i in range(len(arrivals))]

    async def work(clock: Callable[[], float]) -> tuple[list[Record], float]:
        async def send(request: Asked) -> Record:
            record = Record(clock(), request.num_prompt_tokens)
            await asyncio.sleep(lasts[request.num_prompt_tokens])
            record.end = clock()
            return record

        return await run_all(send, asked, arrivals, limit, clock)

    records, duration = fake_run(work)
    busy: list[float] = []
    expected, before = [], 0.0
    for at, last in zip(arrivals, lasts, strict=True):
        start = max(at, before)
        if limit is not None and len(busy) == limit:
            start = max(start, heapq.heappop(busy))
        heapq.heappush(busy, start + last)
        before = start
        expected.append(start)
        if limit is None:
            busy.clear()
    assert [record.num_prompt_tokens for record in records] == list(range(len(arrivals)))
    assert [record.start for record in records] == pytest.approx(expected, abs=1e-6)
    assert duration == pytest.approx(max(record.end for record in records), abs=1e-6)


def test_a_sender_s_bodies() -> None:
    client = Client(Address.parse("http://h"))
    plain = Sender(client, "m", fields={"temperature": 0.0, "ignore_eos": True}).body(Asked([1, 2], 2, 9))
    assert plain == {"model": "m", "prompt": [1, 2], "max_tokens": 9, "stream": True,
                     "stream_options": {"include_usage": True}, "temperature": 0.0, "ignore_eos": True}
    chat = Sender(client, "m", "/x", True).body(Asked("hi", 2, 9))
    assert chat["messages"] == [{"role": "user", "content": "hi"}] and chat["max_completion_tokens"] == 9
    assert "prompt" not in chat and "max_tokens" not in chat


def send(server: StandIn, asked: Asked, **options: Any) -> Record:
    """One request; the clock ticks once at each look at it."""
    async def main() -> Record:
        client = Client(Address.parse(server.url), timeout=options.pop("timeout", None))
        ticks = iter(range(10000))
        try:
            return await Sender(client, "m", clock=lambda: float(next(ticks)), **options).send(asked)
        finally:
            await client.close()

    return asyncio.run(main())


def events(*parts: str) -> bytes:
    return chunked([f"data: {part}\n\n".encode() for part in parts])


@pytest.mark.parametrize("chat", [False, True])
def test_a_record(server: StandIn, chat: bool) -> None:
    path = "/v1/chat/completions" if chat else "/v1/completions"
    record = send(server, Asked("a b", 2, 4), path=path, chat=chat)
    assert (record.text, record.error, record.counted) == ("w0 w1 w2 w3 ", "", True)
    assert (record.num_prompt_tokens, record.num_output_tokens, len(record.gaps)) == (10 if chat else 3, 4, 3)
    assert record.first is not None and record.start < record.first <= record.end
    assert record.first + sum(record.gaps) == record.end, "the last output ends the answer"


def test_without_usage_chunks_are_counted(server: StandIn) -> None:
    server.usage = False
    record = send(server, Asked("a", 5, 4))
    assert (record.counted, record.num_output_tokens, record.num_prompt_tokens) == (False, 4, 5)


def test_what_opens_or_ends_a_message_is_no_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sent at tick 0; the role at 1, a word at 2, two more that arrive together at 3, the end at 4, usage at 5."""
    arrivals = [['{"delta": {"role": "assistant", "content": ""}}'], ['{"delta": {"content": "a"}}'],
                ['{"delta": {"content": "b"}}', '{"delta": {"content": "c"}}'], ['{"delta": {}, "finish_reason": "stop"}']]

    async def stream(*asked: Any) -> AsyncIterator[list[Chunk]]:
        for choices in arrivals:
            yield [decode(f'{{"choices": [{choice}]}}'.encode()) for choice in choices]
        yield [decode(b'{"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 7}}')]

    monkeypatch.setattr("octavo.client.load.stream", stream)
    ticks = iter(range(100))
    sender = Sender(Client(Address.parse("http://h")), "m", chat=True, clock=lambda: float(next(ticks)))
    record = asyncio.run(sender.send(Asked("a", 1, 2)))
    assert (record.start, record.first, record.gaps, record.end) == (0.0, 2.0, [1.0, 0.0], 4.0)
    assert (record.text, record.num_prompt_tokens, record.num_output_tokens, record.error) == ("abc", 3, 7, "")
    assert (record.ttft, record.latency, record.tpot) == (2.0, 4.0, 2.0 / 6)


def test_an_answer_without_text_has_its_end(server: StandIn) -> None:
    server.override = lambda seen: events('{"choices": [{"text": "", "finish_reason": "stop"}]}', "[DONE]")
    record = send(server, Asked("a", 1, 2))
    assert not record.error and record.first == record.end and record.num_output_tokens == 0


@pytest.mark.parametrize(("behave", "message"), [
    (lambda s: setattr(s, "drop_after", 400), "closed the connection in the middle"),
    (lambda s: setattr(s, "drop_after", 0), "before it answered"),
    (lambda s: setattr(s, "override", lambda seen: error(503, "full", more="Retry-After: 1\r\n")), "answered 503: full"),
    (lambda s: setattr(s, "override", lambda seen: events("nope", "[DONE]")), "no chunk"),
    (lambda s: setattr(s, "override", lambda seen: events('{"choices": [{"text": "a"}]}', "[DONE]")), "no finish_reason"),
    (lambda s: setattr(s, "override", lambda seen: events('{"error": {"message": "boom"}}')), "with an error: boom"),
])
def test_a_failure_is_recorded(server: StandIn, behave: Callable[[StandIn], None], message: str) -> None:
    behave(server)
    record = send(server, Asked("a", 1, 20))
    assert message in record.error and record.end > record.start


def test_how_busy_a_loop_is() -> None:
    """The busiest second counts, not the mean; the clocks are given."""
    async def work(clock: Callable[[], float]) -> float:
        used = iter([0.0, 0.1, 1.0, 1.2, 1.2, 1.2, 1.2])
        stop = asyncio.Event()
        task = asyncio.create_task(busiest(stop, clock, lambda: next(used)))
        await asyncio.sleep(3.1)
        stop.set()
        return await task

    assert fake_run(work) == pytest.approx(0.9)


def test_every_chunk_is_cheap(server: StandIn) -> None:
    """Far above the measured 12 us, for a machine may be slow: what is caught is work that grows with the answer."""
    parts = ['{"choices": [{"index": 0, "text": "word ", "logprobs": null, "finish_reason": null}]}'] * 20000
    last = '{"choices": [{"text": "", "finish_reason": "length"}], "usage": {"prompt_tokens": 1, "completion_tokens": 20000}}'
    answer = events(*parts, last, "[DONE]")
    server.override = lambda seen: answer

    async def main() -> tuple[Record, float]:
        client = Client(Address.parse(server.url))
        import time

        before = time.thread_time()
        record = await Sender(client, "m").send(Asked("a", 1, 20000))
        spent = time.thread_time() - before
        await client.close()
        return record, spent

    record, spent = asyncio.run(main())
    assert not record.error and len(record.gaps) == 19999
    assert spent / 20000 < 100e-6
