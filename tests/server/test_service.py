"""octavo.server.service: streams that end exactly once, whatever happens to the engine, the clock, the client or a neighbour."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from fake_service import FakeEngine, make_service, texts, tokenizer

from octavo.errors import CapacityError, EngineDown, RequestError
from octavo.messages import EngineRequest, SequenceEnd, StepOutput
from octavo.params import SamplingParams
from octavo.server.errors import INTERNAL, ApiError
from octavo.server.service import OFF_LOOP_CHARS, Ask, Service
from octavo.server.stream import Stream
from octavo.text.deltas import Step

Test = Callable[[Service, "Hand"], Awaitable[None]]


class Hand(FakeEngine):
    """An engine that does by hand what a test says, and remembers what it was told."""

    def __init__(self) -> None:
        super().__init__(tokenizer(), texts("unused"))
        self.aborts: list[tuple[str, int | None]] = []
        self.down = False

    def add(self, request: EngineRequest) -> None:
        if self.down:
            raise EngineDown("no engine")
        self.requests.append(request)

    def abort(self, request_id: str, index: int | None = None) -> None:
        self.aborts.append((request_id, index))

    @property
    def names(self) -> list[str]:
        return [request.request_id for request in self.requests]

    def start(self, *names: str) -> None:
        assert self.service is not None
        self.service.on_step(StepOutput(started=[(name, 0) for name in names]))

    def say(self, *names: str, end: bool = False, index: int = 0) -> None:
        """One step in which each says a token, and perhaps ends."""
        assert self.service is not None
        self.service.on_step(StepOutput(
            streamed=[(name, index) for name in names], tokens=np.full(len(names), 40, np.int32),
            ended=[SequenceEnd(name, index, "length") for name in names] if end else [], finished=list(names) if end else []))


class Notes:
    """An observer that counts, and fails for the requests that a test names."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.reasons: list[str] = []
        self.bad: set[str] = set()

    def opened(self, timing: Any, prompt: Any, ids: Any) -> None:
        self.counts["opened"] += 1

    def token(self, timing: Any, now: float, count: int) -> None:
        self.counts["token"] += count
        if timing.request_id in self.bad:
            raise ZeroDivisionError("a bug")

    def finished(self, timing: Any, reason: str) -> None:
        self.reasons.append(reason)

    def closed(self, timing: Any) -> None:
        self.counts["closed"] += 1


def run(test: Test, server: dict[str, Any] | None = None, width: int = 1) -> Notes:
    """A test on a fresh service, after which nothing may be left of any request. ``width``: continuations of each."""
    notes = Notes()

    async def main() -> None:
        service, _ = make_service(texts("unused"), server=server)
        hand = Hand()
        hand.service, service.link, service.observer = service, hand, notes
        async with asyncio.timeout(10.0):
            await test(service, hand)
            await service.wait_idle()
        door = service.admission
        assert not service._streams and len(service._collector) == 0 and service._num_jobs == 0
        assert (door.waiting, door.tokens, door.bytes, len(door.tickets)) == (0, 0, 0, 0)
        service.close()

    asyncio.run(main())
    assert notes.counts["opened"] * width == notes.counts["closed"] * width == len(notes.reasons)
    return notes


def ask(prompt: Any = "a", explicit: bool = True, **params: Any) -> Ask:
    return Ask(prompt, SamplingParams(**{"max_tokens": 4, "temperature": 0.0, **params}), explicit)


async def opened(service: Service, *asks: Ask, **options: Any) -> Stream:
    return await service.open(service.admission.enter(), asks or (ask(),), **options)


async def read(stream: Stream) -> list[tuple[int, Step]]:
    """All of it; the error with which it ends is raised."""
    async with stream:
        return [piece async for news in stream for piece in news]


def test_what_an_engine_says_arrives_and_ends() -> None:
    async def test(service: Service, hand: Hand) -> None:
        stream = await opened(service)
        assert service.num_open == 1 and service.admission.waiting == 1
        hand.start(*hand.names)
        assert service.admission.waiting == 0 and stream.begun
        hand.say(*hand.names)
        hand.say(*hand.names, end=True)
        news = await read(stream)
        assert [token for _, step in news for delta in step.deltas for token in delta.token_ids] == [40, 40]
        assert hand.aborts == [] and service.admission._ends

    assert run(test).reasons == ["length"]


def test_news_that_wait_are_read_at_once() -> None:
    async def test(service: Service, hand: Hand) -> None:
        stream = await opened(service)
        for _ in range(3):
            hand.say(*hand.names)
        async with stream:
            assert len(await anext(stream)) == 3
            reading = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            assert not reading.done()
            hand.say(*hand.names, end=True)
            assert len(await reading) == 1
            with pytest.raises(StopAsyncIteration):
                await anext(stream)

    run(test)


def test_leaving_aborts_what_still_runs() -> None:
    async def test(service: Service, hand: Hand) -> None:
        stream = await opened(service, ask(), ask("b"), ask("c"))
        hand.start(*hand.names)
        hand.say(hand.names[1], end=True)
        async with stream:
            await anext(stream)
        assert hand.aborts == [(hand.names[0], None), (hand.names[2], None)]
        hand.say(*hand.names)  # what is still on its way is for nobody
        stream.close()
        assert len(hand.aborts) == 2
        assert not service.admission._ends  # it was not served

    assert sorted(run(test).reasons) == ["abort", "abort", "length"]


def test_a_cancelled_reader_leaves() -> None:
    async def test(service: Service, hand: Hand) -> None:
        reading = asyncio.ensure_future(read(await opened(service)))
        await asyncio.sleep(0)
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        assert hand.aborts == [(hand.names[0], None)]

    run(test)


def test_of_a_list_all_start_or_none() -> None:
    async def test(service: Service, hand: Hand) -> None:
        with service.admission.enter() as ticket, pytest.raises(RequestError, match=r"vocab|token"):
            await service.open(ticket, [ask(), ask({"prompt_token_ids": [10**6]})])
        assert hand.requests == []
        add, hand.add = hand.add, lambda request: add(request) if not hand.requests else fail()  # type: ignore[method-assign]

        def fail() -> None:
            raise EngineDown("the engine takes in nothing.")

        with service.admission.enter() as ticket, pytest.raises(EngineDown):
            await service.open(ticket, [ask(), ask("b")])
        assert len(hand.requests) == 1 and hand.aborts == [(hand.names[0], None)]

    assert run(test).reasons == ["abort"]


def test_without_an_engine_or_a_model_nobody_is_let_in() -> None:
    async def test(service: Service, hand: Hand) -> None:
        hand.down = True
        with service.admission.enter() as ticket, pytest.raises(EngineDown):
            await service.open(ticket, [ask()])
        service._intake = None
        with service.admission.enter() as ticket, pytest.raises(ApiError) as info:
            await service.open(ticket, [ask()])
        assert info.value.status == 503 and "Retry-After" in info.value.headers

    run(test)


@pytest.mark.parametrize(("options", "timeout"), [
    ({}, 0.03), ({"request_timeout": 0.03}, None), ({"request_timeout": 0.03}, 60.0), ({"request_timeout": 60.0}, 0.03)])
@pytest.mark.parametrize("begun", [False, True])
def test_time_is_up(options: dict[str, Any], timeout: float | None, begun: bool) -> None:
    """Before it began the client may come again: 503; afterwards that would not help: 504."""

    async def test(service: Service, hand: Hand) -> None:
        stream = await opened(service, ask(), ask("b"), timeout=timeout)
        if begun:
            hand.start(hand.names[1])
            hand.say(hand.names[1])
        news: list[Any] = []
        with pytest.raises(ApiError if begun else CapacityError) as info:
            async with stream:
                async for piece in stream:
                    news += piece
        if begun:
            assert isinstance(info.value, ApiError) and info.value.status == 504
            assert info.value.headers["x-should-retry"] == "false" and len(news) == 1
        else:
            assert isinstance(info.value, CapacityError) and info.value.retry_after >= 1.0
        assert [name for name, _ in hand.aborts] == hand.names

    assert run(test, options).reasons == ["error", "error"]


@pytest.mark.parametrize("begun", [False, True])
def test_waiting_has_a_limit_of_its_own(begun: bool) -> None:
    async def test(service: Service, hand: Hand) -> None:
        stream = await opened(service, timeout=60.0)
        if not begun:
            with pytest.raises(CapacityError, match="did not start"):
                await read(stream)
            return
        hand.start(*hand.names)
        assert stream.ticket._admission.waiting == 0
        await asyncio.sleep(0.06)
        hand.say(*hand.names, end=True)
        assert len(await read(stream)) == 1

    run(test, {"queue_timeout": 0.03})


def test_time_counts_from_the_arrival_and_ends_with_the_request() -> None:
    async def test(service: Service, hand: Hand) -> None:
        ticket = service.admission.enter()
        ticket.since -= 30.0  # its body took so long
        with pytest.raises(CapacityError):
            await read(await service.open(ticket, [ask()], timeout=20.0))
        stream = await opened(service, timeout=0.02)
        hand.say(hand.names[1], end=True)
        assert len(await read(stream)) == 1
        await asyncio.sleep(0.04)  # nothing comes after the end
        assert stream._timers == [] and hand.aborts == [(hand.names[0], None)]

    run(test)


def test_a_reader_who_lets_too_much_wait_is_dropped() -> None:
    async def test(service: Service, hand: Hand) -> None:
        cuts: list[int] = []
        stream = await opened(service, ask(), cut=lambda: cuts.append(1))
        neighbour = await opened(service, ask("b"))
        async with neighbour:
            for _ in range(100):
                hand.say(*hand.names)
                await anext(neighbour)
                if cuts:
                    break
            assert 5 < len(stream._news) < 25 and service.num_dropped == 1 and hand.aborts == [(hand.names[0], None)]
            with pytest.raises(ApiError, match="did not read"):
                await read(stream)
            hand.say(hand.names[1], end=True)
            await anext(neighbour)

    run(test, {"max_stream_buffer": 2000})


def test_a_reader_who_stands_still_is_dropped() -> None:
    async def test(service: Service, hand: Hand) -> None:
        cuts: list[int] = []
        stream = await opened(service, ask(), cut=lambda: cuts.append(1))
        hand.say(*hand.names)
        stream.since -= 4.9
        hand.say(*hand.names)
        assert not cuts
        stream.since -= 0.2
        hand.say(*hand.names)
        assert cuts == [1]
        with pytest.raises(ApiError, match="did not read"):
            await read(stream)

    run(test, {"send_timeout": 5.0})


def test_a_reader_who_keeps_up_is_not_dropped() -> None:
    async def test(service: Service, hand: Hand) -> None:
        stream = await opened(service, ask(max_tokens=200))
        async with stream:
            for _ in range(100):
                hand.say(*hand.names)
                stream.since -= 4.0
                assert len(await anext(stream)) == 1
            hand.say(*hand.names, end=True)
            await anext(stream)

    run(test, {"max_stream_buffer": 200})


def test_the_engine_ends() -> None:
    async def test(service: Service, hand: Hand) -> None:
        first, second = await opened(service, ask(), ask("b")), await opened(service, ask("c"))
        hand.start(hand.names[0])
        hand.say(hand.names[0])
        service.on_lost("The engine has ended.")
        for stream in (first, second):
            with pytest.raises(ApiError, match="The engine has ended") as info:
                await read(stream)
            assert info.value.status == 500

    run(test)


def test_the_server_ends() -> None:
    async def test(service: Service, hand: Hand) -> None:
        stream = await opened(service)
        service.abort_all("The server is shutting down.")
        with pytest.raises(ApiError) as info:
            await read(stream)
        assert info.value.status == 503 and hand.aborts == [(hand.names[0], None)]

    run(test)


@pytest.mark.parametrize(("code", "kind"), [(None, RequestError), ("server_error", ApiError)])
def test_what_the_engine_refuses_is_the_clients_mistake_unless_it_is_ours(code: str | None, kind: type[Exception]) -> None:
    async def test(service: Service, hand: Hand) -> None:
        stream = await opened(service)
        service.on_refused("nobody", RequestError("x"))
        service.on_refused(hand.names[0], RequestError("it cannot be", "prompt", code))
        with pytest.raises(kind, match="it cannot be") as info:
            await read(stream)
        assert kind is RequestError or info.value.status == 500  # type: ignore[attr-defined]

    run(test)


def test_an_exception_about_one_request_costs_no_other_its_news() -> None:
    async def test(service: Service, hand: Hand) -> None:
        streams = [await opened(service, ask(text)) for text in "abc"]
        assert isinstance(service.observer, Notes)
        service.observer.bad = {hand.names[1]}
        hand.say(*hand.names)
        hand.say(hand.names[0], hand.names[2], end=True)
        with pytest.raises(ApiError) as info:
            await read(streams[1])
        assert info.value.status == 500 and info.value.message == INTERNAL
        for stream in (streams[0], streams[2]):
            assert len(await read(stream)) == 2
        assert hand.aborts == [(hand.names[1], None)]

    run(test)


def test_a_default_is_made_to_fit_and_a_wish_is_refused() -> None:
    async def test(service: Service, hand: Hand) -> None:
        prompt = {"prompt_token_ids": [5] * 4090}
        stream = await opened(service, ask(prompt, explicit=False, max_tokens=16))
        assert hand.requests[0].params.max_tokens == 6
        stream.close()
        with service.admission.enter() as ticket, pytest.raises(RequestError) as info:
            await service.open(ticket, [ask(prompt, max_tokens=16)])
        assert info.value.code == "context_length_exceeded"

    run(test)


def test_long_texts_are_read_in_threads_and_not_too_many() -> None:
    async def test(service: Service, hand: Hand) -> None:
        assert await service.off_loop(OFF_LOOP_CHARS - 1, lambda: 1) == 1
        loop, gate = asyncio.get_running_loop(), asyncio.Event()

        def slow() -> str:
            asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(10.0)
            return "done"

        jobs = [asyncio.ensure_future(service.off_loop(OFF_LOOP_CHARS, slow)) for _ in range(4)]
        await asyncio.sleep(0)
        with pytest.raises(CapacityError, match="4 texts"):
            await service.off_loop(OFF_LOOP_CHARS, slow)
        jobs[3].cancel()
        began = time.monotonic()
        gate.set()
        assert await asyncio.gather(*jobs[:3]) == ["done"] * 3
        assert time.monotonic() - began < 5.0

    run(test, {"max_queued_requests": 4})


def test_lookups_do_not_keep_those_who_generate() -> None:
    async def test(service: Service, hand: Hand) -> None:
        loop, gate = asyncio.get_running_loop(), asyncio.Event()

        def slow() -> None:
            asyncio.run_coroutine_threadsafe(gate.wait(), loop).result(10.0)

        lookups = [asyncio.ensure_future(service.off_loop(OFF_LOOP_CHARS, slow, lookup=True)) for _ in range(8)]
        stream = await opened(service, ask("a " * OFF_LOOP_CHARS, max_tokens=1))
        hand.say(*hand.names, end=True)
        assert len(await read(stream)) == 1
        gate.set()
        await asyncio.gather(*lookups)

    run(test)


def test_continuations_that_a_stop_string_cuts_are_aborted_alone() -> None:
    async def test(service: Service, hand: Hand) -> None:
        tok = tokenizer()
        (token,) = tok.encode("Z", add_special_tokens=False)
        stream = await opened(service, ask(n=2, temperature=1.0, stop=("Z",)))
        name = hand.names[0]
        service.on_step(StepOutput(streamed=[(name, 0)], tokens=np.array([token], np.int32)))
        assert hand.aborts == [(name, 0)]
        service.on_step(StepOutput(streamed=[(name, 1)], tokens=np.array([token], np.int32)))
        assert hand.aborts[1:] == [(name, None)]
        assert [step.deltas[0].finish_reason for _, step in await read(stream)] == ["stop", "stop"]

    assert run(test, width=2).reasons == ["stop", "stop"]
