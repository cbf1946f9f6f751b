"""The engine process's loop over the fake engine, with real sockets: who gets what, and what cannot stop it."""

import asyncio
import contextlib
import itertools
import os
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path

import pytest
import zmq
from border import Front, LoopThread, request, until
from fakes import Bench

from octavo.server import engine_loop, ipc
from octavo.server.engine_loop import EngineLoop
from octavo.server.heart import Vitals


def play(
        scenario: Callable[..., Coroutine], directory: Path, *fronts: int, bench: Bench | None = None,
        **options: object) -> Bench:
    """Run a scenario with clients of a loop; afterwards the engine must hold nothing."""
    bench = bench or Bench(rows=64, blocks=512, check=False)

    async def main() -> None:
        with LoopThread(bench.engine, directory, **options) as thread:
            made = [Front(directory, number) for number in fronts]
            try:
                for front in made:
                    await front.ready()
                await scenario(thread, *made)
            finally:
                for front in made:
                    front.client.close()
    asyncio.run(main())
    while bench.engine.has_work():
        bench.engine.step()
    bench.idle()
    return bench


def raw(thread: LoopThread, *frames: bytes, receive: int = 1000) -> zmq.Socket:
    """A connection that sends what it likes, and takes in only so many messages until it reads."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.set(zmq.RCVHWM, receive)
    socket.set(zmq.LINGER, 0)
    socket.connect(thread.address)
    for frame in frames:
        socket.send(frame)
    return socket


def test_requests_are_answered_as_in_process(tmp_path: Path) -> None:
    async def scenario(thread: LoopThread, front: Front) -> None:
        for i in range(20):
            front.client.add(request(f"r{i}", [3, 4 + i], stream=i % 2 == 0, max_tokens=5 + i))
        front.client.add(request("two", [3, 4], n=2, temperature=1.0, seed=1))
        await until(lambda: len(front.finished) == 21)
        assert set(front.reasons.values()) == {"length"} and not front.refused and not front.lost

    fronts: list[Front] = []
    async def keep(thread: LoopThread, front: Front) -> None:
        fronts.append(front)
        await scenario(thread, front)

    bench = play(keep, tmp_path, 0)
    alone = Bench(rows=64, blocks=512)
    for i in range(20):
        alone.add(f"r{i}", [3, 4 + i], stream=True, max_tokens=5 + i, ignore_eos=True)
    alone.run()
    for i in range(20):
        assert fronts[0].tokens[f"r{i}"] == alone.tokens(f"r{i}")
    assert bench.engine.stats.requests == 21


def test_a_refusal_names_the_field(tmp_path: Path) -> None:
    async def scenario(thread: LoopThread, front: Front) -> None:
        front.client.add(request("long", [3] * 300))
        front.client.add(request("vocabulary", [10**6]))
        front.client.add(request("good"))
        await until(lambda: len(front.refused) == 2 and "good" in front.finished)
        assert front.refused["long"].code == "context_length_exceeded" and front.refused["long"].param == "prompt"
        assert "1000000" in str(front.refused["vocabulary"])
        front.client.add(request("long"))  # the name is free
        await until(lambda: "long" in front.finished)

    play(scenario, tmp_path, 0)


def test_an_abort_is_applied_within_a_step(tmp_path: Path) -> None:
    async def scenario(thread: LoopThread, front: Front) -> None:
        front.client.add(request("a", max_tokens=200))
        front.client.add(request("n", n=3, max_tokens=200, temperature=1.0))
        await until(lambda: front.tokens["a"] and front.tokens["n"])
        front.client.abort("a")
        front.client.abort("n", 1)
        await until(lambda: "a" in front.finished)
        assert front.reasons["a"] == "abort"
        await until(lambda: any(end.request_id == "n" for _, out in front.steps for end in out.ended))
        assert [(end.index, end.reason) for _, out in front.steps for end in out.ended if end.request_id == "n"] == [(1, "abort")]
        front.client.abort("n")
        await until(lambda: "n" in front.finished)
        assert thread.vitals.unknown_aborts == 0

    play(scenario, tmp_path, 0)


def test_an_abort_sent_with_its_request_counts(tmp_path: Path) -> None:
    async def scenario(thread: LoopThread, front: Front) -> None:
        front.client.add(request("a", max_tokens=200))
        front.client.abort("a")
        await until(lambda: "a" in front.finished)
        assert front.reasons["a"] == "abort" and not front.tokens["a"]

    play(scenario, tmp_path, 0)


def test_garbage_is_dropped_and_counted(tmp_path: Path) -> None:
    good = ipc.encode_request(ipc.Add(request("replayed")))

    async def scenario(thread: LoopThread, front: Front) -> None:
        front.client.add(request("a", max_tokens=100))
        garbage = [b"", b"\xc1", good[:-1], good[:20], os.urandom(1000), b'{"type":"add"}', bytes(64 * 2**20),
                   good.replace(b"add", b"adx")]
        socket = raw(thread, *garbage)
        socket.send_multipart([b"\xc1", ipc.encode_request(ipc.Abort("never")), b"\xc1"])
        await until(lambda: thread.vitals.bad_frames == len(garbage) + 2 and thread.vitals.unknown_aborts == 1)
        front.client.abort("unknown")
        front.client.abort("a", 77)
        socket.send(ipc.encode_request(ipc.Abort("a")))  # of somebody else's request
        await until(lambda: thread.vitals.unknown_aborts == 4)
        await until(lambda: "a" in front.finished)
        assert front.reasons["a"] == "length" and len(front.tokens["a"]) == 100
        socket.send(good)
        socket.send(good)  # replayed: the name is taken, or free again
        await until(lambda: socket.poll(0))
        front.client.add(request("b"))
        await until(lambda: "b" in front.finished)
        assert not front.lost and not front.refused and "replayed" not in front.tokens
        socket.close()

    play(scenario, tmp_path, 0)


def test_a_request_that_meets_a_bug_is_refused_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(rows=64, blocks=512, check=False)
    add = bench.engine.add

    def broken(wanted: object) -> None:
        if wanted.request_id == "bad":
            raise KeyError("a bug")
        add(wanted)

    monkeypatch.setattr(bench.engine, "add", broken)

    async def scenario(thread: LoopThread, front: Front) -> None:
        front.client.add(request("bad"))
        front.client.add(request("good"))
        await until(lambda: front.refused and "good" in front.finished)
        assert "a bug" not in str(front.refused["bad"]) and front.refused["bad"].code == "server_error"

    play(scenario, tmp_path, 0, bench=bench)


def test_each_client_hears_of_its_own_requests(tmp_path: Path) -> None:
    async def scenario(thread: LoopThread, one: Front, two: Front) -> None:
        for i in range(30):
            front = (one, two)[i % 2]
            front.client.add(request(front.client.prefix + str(i), [3 + i], stream=i % 3 != 0, max_tokens=10 + i,
                                     logprobs=1 if i % 5 == 0 else None, prompt_logprobs=0 if i == 7 else None))
        await until(lambda: len(one.finished) == len(two.finished) == 15)
        for front in (one, two):
            assert all(name.startswith(front.client.prefix) for name in front.tokens)
            assert {len(tokens) for tokens in front.tokens.values()} <= set(range(10, 40))
            for _, out in front.steps:
                assert not out.logprobs or len(out.logprobs) == len(out.streamed)
                for (name, _), mark in zip(out.streamed, out.logprobs, strict=False):
                    assert (mark is not None) == (int(name.rpartition(".")[2]) % 5 == 0)
                    assert mark is None or mark.token_ids[0] in front.tokens[name]
        assert sum(len(tokens) for tokens in one.tokens.values()) == sum(10 + i for i in range(0, 30, 2))
        assert one.client.prefix != two.client.prefix

    play(scenario, tmp_path, 0, 1)


def test_a_client_that_goes_away_leaves_nothing(tmp_path: Path) -> None:
    bench = Bench(rows=64, blocks=4096, max_model_len=8192, check=False)

    async def scenario(thread: LoopThread, one: Front, two: Front) -> None:
        two.client.add(request("stays", max_tokens=3000))
        for i in range(5):
            one.client.add(request(f"goes{i}", max_tokens=6000, stream=i % 2 == 0))
        await until(lambda: one.steps and two.steps)
        one.client.close()
        await until(lambda: thread.vitals.stats.running == 1)
        assert "stays" not in two.finished
        two.client.abort("stays")
        await until(lambda: "stays" in two.finished)

    bench = play(scenario, tmp_path, 0, 1, bench=bench)
    assert bench.engine.stats.requests == 6


def test_a_client_that_lags_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine stands still while a client does not read, however many steps there are to come, and then goes on."""
    monkeypatch.setattr(engine_loop, "LAG_SECONDS", 60.0)
    bench = Bench(rows=64, blocks=4096, max_model_len=8192, check=False)

    async def scenario(thread: LoopThread, front: Front) -> None:
        slow = raw(thread, receive=1)
        names = [f"{'slow' * 300}{i}" for i in range(8)]
        slow.send_multipart([ipc.encode_request(ipc.Add(request(name, max_tokens=2000))) for name in names])
        front.client.add(request("good", max_tokens=3000))
        lagging = thread.loop._lagging  # for a moment also while a socket has not passed on what it has taken
        await until(lambda: any(time.monotonic() - lag.since > 0.5 for lag in [*lagging.values()]))
        front.client.add(request("refused", [3] * 9000))  # is heard all the same
        await until(lambda: "refused" in front.refused)
        computed = bench.engine.stats.generated_tokens
        await asyncio.sleep(0.05)
        assert bench.engine.stats.generated_tokens == computed < 9 * 1000
        (lag,) = thread.loop._lagging.values()
        assert len(lag.unsent) == 1  # what waits is bounded: no step is computed
        counts, finished = dict.fromkeys(names, 0), 0
        while finished < len(names):
            assert await asyncio.to_thread(slow.poll, 10_000)
            if not (data := slow.recv()):
                continue
            message = ipc.decode_output(data)
            assert isinstance(message, ipc.Stepped)
            for name, _ in message.output.streamed:
                counts[name] += 1
            for end in message.output.ended:
                counts[end.request_id] += len(end.token_ids)
            finished += len(message.output.finished)
        assert set(counts.values()) == {2000} and thread.vitals.cut_off == 0
        await until(lambda: "good" in front.finished)
        assert len(front.tokens["good"]) == 3000 and not front.lost
        slow.close()

    play(scenario, tmp_path, 0, bench=bench, max_waiting=4)


def test_a_client_that_does_not_read_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw client stops reading with thousands of large frames under way; the others wait a while, and it gets to know."""
    monkeypatch.setattr(engine_loop, "LAG_SECONDS", 0.3)
    bench = Bench(rows=64, blocks=4096, max_model_len=8192, check=False)

    async def scenario(thread: LoopThread, front: Front) -> None:
        slow = raw(thread, receive=1)
        slow.send_multipart([ipc.encode_request(ipc.Add(request(f"{'slow' * 300}{i}", max_tokens=8000))) for i in range(20)])
        front.client.add(request("good", max_tokens=500))
        await until(lambda: thread.vitals.cut_off == 1)
        slow.send(ipc.encode_request(ipc.Add(request("late"))))  # it does not know yet: nobody would fail this one
        await until(lambda: "good" in front.finished)
        assert front.reasons["good"] == "length" and not front.lost
        last = None
        while not isinstance(last, ipc.CutOff):
            assert await asyncio.to_thread(slow.poll, 10_000)
            data = slow.recv()
            last = ipc.decode_output(data) if data else last
            assert not isinstance(last, ipc.Refused)
        slow.close()
        await until(lambda: not thread.loop._cut)
        await until(lambda: thread.vitals.stats.running == 0 and thread.vitals.stats.waiting == 0)

    bench = play(scenario, tmp_path, 0, bench=bench, max_waiting=200)
    assert bench.engine.stats.requests == 21


def test_the_loop_sleeps_when_there_is_nothing_to_do(tmp_path: Path) -> None:
    async def scenario(thread: LoopThread, front: Front) -> None:
        await front.ready()
        front.client.add(request("a"))
        await until(lambda: "a" in front.finished)
        turns = []
        turn = thread.loop.turn
        thread.loop.turn = lambda: (turns.append(1), turn())
        begun = time.process_time()
        await asyncio.sleep(0.3)
        assert len(turns) <= 1 and time.process_time() - begun < 0.2

    play(scenario, tmp_path, 0)


@contextlib.contextmanager
def by_hand() -> Iterator[tuple[EngineLoop, zmq.Socket, Bench]]:
    """A loop whose turns a test takes itself, on a clock that goes a millisecond further at every look; what is sent is there."""
    bench = Bench(rows=64, blocks=512, check=False)
    context = zmq.Context()
    socket, sender = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    socket.bind("inproc://engine")
    sender.connect("inproc://engine")
    clock = itertools.count()
    try:
        yield EngineLoop(bench.engine, socket, Vitals(0), lambda: 0.001 * next(clock)), sender, bench
    finally:
        sender.close(0)
        socket.close(0)
        context.term()


def test_a_burst_does_not_stop_those_that_run() -> None:
    """Requests are taken in for a bounded time between two steps, whatever comes."""
    with by_hand() as (loop, sender, bench):
        for i in range(100):
            sender.send(ipc.encode_request(ipc.Add(request(f"r{i}"))))
        loop.turn()
        assert 10 <= bench.engine.stats.requests <= 25
        while bench.engine.stats.requests < 100:
            loop.turn()


def test_an_abort_overtakes_a_burst() -> None:
    """The engine never works for requests whose clients have left while these stood in line."""
    with by_hand() as (loop, sender, bench):
        for i in range(100):
            sender.send(ipc.encode_request(ipc.Add(request(f"r{i}", n=2, temperature=1.0))))
        for i in range(99):
            sender.send(ipc.encode_request(ipc.Abort(f"r{i}")))
        sender.send(ipc.encode_request(ipc.Abort("r99", 1)))
        loop.turn()
        assert loop._backlog and bench.engine.stats.running == bench.engine.stats.waiting == 0
        while bench.engine.has_work() or loop._backlog:
            loop.turn()
        assert bench.engine.stats.finished == {"length": 1, "abort": 199} and bench.engine.stats.generated_tokens == 8
        assert not loop._gone and loop._vitals.unknown_aborts == 0
