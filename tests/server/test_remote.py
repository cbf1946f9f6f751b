"""EngineClient over the fake engine: phases, links that begin and end, and that it never raises into the event loop."""

import asyncio
from pathlib import Path

import pytest
import zmq
from border import Front, LoopThread, request, until
from fakes import Bench

from octavo.errors import EngineDown, RequestError
from octavo.messages import StepOutput
from octavo.server import ipc, remote
from octavo.server.heart import Heart, Vitals


def bench() -> Bench:
    return Bench(rows=64, blocks=512, check=False)


class Engine:
    """An engine process of bare sockets that says what a test wants."""

    def __init__(self, directory: Path, epoch: int = 0) -> None:
        self.context, self.vitals = zmq.Context(), Vitals(epoch)
        self.socket = self.context.socket(zmq.ROUTER)
        self.socket.bind(ipc.engine_address(str(directory), epoch))
        Heart(self.context, str(directory), self.vitals)

    async def receive(self) -> tuple[bytes, list[bytes]]:
        await until(lambda: self.socket.poll(0))
        client, *parts = self.socket.recv_multipart()
        return client, parts

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.context.closed:
            return
        self.socket.close(linger=0)
        self.vitals.changed.set()
        self.context.term()


def test_phases_are_seen_and_requests_wait_for_ready(tmp_path: Path) -> None:
    async def main() -> None:
        with Front(tmp_path) as front, Engine(tmp_path) as engine:
            assert front.client.phase == "starting" and not front.client.ready and front.client.epoch == -1
            with pytest.raises(EngineDown):
                front.client.add(request("early"))
            front.client.abort("early")
            seen = []
            for phase in ("fetching", "loading", "preparing", "ready"):
                engine.vitals.enter(phase)
                await until(lambda phase=phase: front.client.phase == phase)
                seen.append(front.client.progress)
            assert seen == sorted(seen) and seen[-1] == 1.0 and front.client.epoch == 0
            front.client.add(request("a"))
            _, parts = await engine.receive()
            assert ipc.decode_request(parts[0]).request.request_id == "a"
    asyncio.run(main())


def test_one_frame_per_turn_of_the_event_loop(tmp_path: Path) -> None:
    async def main() -> None:
        with Front(tmp_path) as front, Engine(tmp_path) as engine:
            engine.vitals.enter("ready")
            await front.ready()
            for i in range(ipc.PARTS + 5):
                front.client.add(request(f"r{i}"))
            front.client.abort("r0")
            _, first = await engine.receive()
            _, second = await engine.receive()
            assert len(first) == ipc.PARTS and len(second) == 6
            names = [ipc.decode_request(part) for part in first + second]
            assert [m.request.request_id for m in names[:-1]] == [f"r{i}" for i in range(ipc.PARTS + 5)]
            assert names[-1] == ipc.Abort("r0")
    asyncio.run(main())


def test_the_end_of_the_engine_is_noticed_and_the_next_one_found(tmp_path: Path) -> None:
    async def main() -> None:
        with Front(tmp_path) as front:
            with LoopThread(bench().engine, tmp_path):
                await front.ready()
                before = await front.run("a")
                assert front.client.info is not None and front.client.heartbeat_age() < 5.0
            await until(lambda: front.client.phase == "down")
            assert front.lost == [remote.ENDED] and not front.client.ready and front.client.info is None
            with pytest.raises(EngineDown):
                front.client.add(request("b"))
            with LoopThread(bench().engine, tmp_path, epoch=1):
                await front.ready()
                assert front.client.epoch == 1 and await front.run("a2") == before
    asyncio.run(main())


def test_an_idle_link_ends_without_a_word(tmp_path: Path) -> None:
    async def main() -> None:
        with Front(tmp_path) as front, Engine(tmp_path) as engine:
            engine.vitals.enter("ready")
            await front.ready()
            engine.close()
            await until(lambda: front.client.phase == "down")
            assert front.lost == []
    asyncio.run(main())


def test_what_an_ended_engine_had_said_does_not_bring_it_back(tmp_path: Path) -> None:
    async def main() -> None:
        with Front(tmp_path) as front, Engine(tmp_path) as engine:
            engine.vitals.enter("ready")
            await front.ready()
            stale = engine.vitals.heartbeat()
            engine.close()
            await until(lambda: front.client.phase == "down")
            context = zmq.Context()
            socket = context.socket(zmq.PUB)
            socket.bind(ipc.heartbeat_address(str(tmp_path)))
            fresh = ipc.Heartbeat(epoch=1, pid=1, phase="loading", progress=0.5, sent=stale.sent)
            while front.client.epoch < 1:
                socket.send(ipc.encode_heartbeat(stale))
                socket.send(b"garbage")
                await asyncio.sleep(0.01)
                assert front.client.phase == "down"
                if front.client.bad_frames > 2:
                    break
            while front.client.phase != "loading":
                socket.send(ipc.encode_heartbeat(fresh))
                await asyncio.sleep(0.01)
            socket.send(ipc.encode_heartbeat(stale))
            await asyncio.sleep(0.1)
            assert front.client.phase == "loading" and front.client.epoch == 1
            socket.close(0)
            context.term()
    asyncio.run(main())


@pytest.mark.parametrize(("word", "message"), [(ipc.encode_output(ipc.CutOff()), remote.CUT_OFF), (b"garbage", remote.ENDED)])
def test_a_link_that_cannot_be_trusted_is_left(tmp_path: Path, word: bytes, message: str) -> None:
    async def main() -> None:
        with Front(tmp_path) as front, Engine(tmp_path) as engine:
            engine.vitals.enter("ready")
            await front.ready()
            front.client.add(request("a"))
            first, _ = await engine.receive()
            engine.socket.send_multipart([first, ipc.ALIVE])
            engine.socket.send_multipart([first, word])
            engine.socket.send_multipart([first, ipc.encode_output(ipc.Refused("a", "too late"))])
            await until(lambda: front.lost)
            assert front.lost == [message] and not front.refused and front.client.ready
            front.client.add(request("b"))
            second, parts = await engine.receive()
            assert second != first and ipc.decode_request(parts[0]).request.request_id == "b"
    asyncio.run(main())


def test_an_engine_that_takes_in_nothing_gets_no_more_than_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "MAX_UNSENT", 300)

    async def main() -> None:
        with Front(tmp_path) as front, Engine(tmp_path) as engine:
            engine.vitals.enter("ready")
            await front.ready()
            sent = 0
            with pytest.raises(EngineDown, match="takes in nothing"):
                while sent < 10_000:
                    front.client.add(request(f"r{sent}", [7] * 300))
                    sent += 1
                    await asyncio.sleep(0)
            got = []
            while len(got) < sent:  # and none of those that were taken is lost, nor out of order
                _, parts = await engine.receive()
                got += parts
            assert [ipc.decode_request(part).request.request_id for part in got] == [f"r{i}" for i in range(sent)]
            front.client.add(request("again"))
            await engine.receive()
    asyncio.run(main())


def test_what_cannot_be_sent_is_refused_here(tmp_path: Path) -> None:
    async def main() -> None:
        with Front(tmp_path) as front, Engine(tmp_path) as engine:
            engine.vitals.enter("ready")
            await front.ready()
            with pytest.raises(RequestError, match="logits_processors"):
                front.client.add(request("a", logits_processors=[lambda ids, logits: logits]))
            assert front.lost == []
    asyncio.run(main())


def test_a_bug_in_a_callback_costs_one_step(tmp_path: Path) -> None:
    async def main() -> None:
        with Front(tmp_path) as front:
            on_step, calls = front.client._on_step, []

            def broken(out: object) -> None:
                calls.append(out)
                if len(calls) == 1:
                    raise KeyError("a bug")
                on_step(out)

            front.client._on_step = broken
            with LoopThread(bench().engine, tmp_path):
                await front.ready()
                front.client.add(request("a", max_tokens=10))
                await until(lambda: "a" in front.finished)
                assert len(front.tokens["a"]) == 9 and not front.lost
    asyncio.run(main())


def test_the_age_of_a_step_grows_between_heartbeats(tmp_path: Path) -> None:
    async def main() -> None:
        with Front(tmp_path) as front, Engine(tmp_path) as engine:
            assert front.client.step_age() == 0.0
            engine.vitals.enter("ready")
            await front.ready()
            engine.vitals.step_started = engine.vitals.heartbeat().sent - 5.0
            engine.vitals.changed.set()
            await until(lambda: front.client.step_age() > 5.0)
            one = front.client.step_age()
            await until(lambda: front.client.step_age() > one)
            assert front.client.step_age() < 60.0
            engine.vitals.step_started = 0.0
            engine.vitals.changed.set()
            await until(lambda: front.client.step_age() == 0.0)
    asyncio.run(main())


def test_a_turn_of_the_event_loop_reads_for_a_bounded_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many steps have come and however often it is woken, the loop gets to everything else between some of them."""
    monkeypatch.setattr(remote, "SECONDS_PER_TURN", 0.0)

    async def main() -> None:
        turns, heard = 0, list[int]()

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        with Front(tmp_path) as front, Engine(tmp_path) as engine:
            engine.vitals.enter("ready")
            await front.ready()
            front.client.add(request("a"))
            client, _ = await engine.receive()
            front.client._on_step = lambda out: heard.append(turns)
            for _ in range(60):
                engine.socket.send_multipart([client, ipc.encode_output(ipc.Stepped(StepOutput(finished=["a"])))])
            assert front.client._link.poll(5000)  # they are there before the first is read; the signal of it is eaten
            front.client._wake(front.client._link)
            counting = asyncio.create_task(count())
            await until(lambda: len(heard) == 60)
            counting.cancel()
            assert max(map(heard.count, heard)) <= 2 and turns >= 30

    asyncio.run(main())
