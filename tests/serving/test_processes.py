"""Faults of one process among several, and of the terminal: the others go on."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from crowd import Crowd, alone, until
from served import ROOT, ROWS, Served, gone, memory, wait_for
from web import Reply, call, completion, encode, receive

from octavo.server.engine_loop import LAG_SECONDS

TOKENS = 400
"""Of an answer that takes seconds here: sixteen of them fit into the pool."""


class Spread:
    """Streams over connections of two API processes; made inside the event loop."""

    def __init__(self, served: Served, other: int) -> None:
        self.bodies = Crowd.bodies_of(ROWS, max_tokens=TOKENS)
        self._served, self._other, self._numbers = served, other, dict[int, int]()
        self.replies = [Reply() for _ in self.bodies]
        self.task = asyncio.gather(*map(self._one, range(ROWS)))

    async def _one(self, number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._served.port, limit=2**20)
        self._numbers[writer.get_extra_info("sockname")[1]] = number
        writer.write(encode("/v1/completions", self.bodies[number]))
        await receive(reader, self.replies[number])
        writer.close()

    async def under_way(self) -> tuple[list[int], list[int]]:
        """Numbers of the streams of the first process and of the other one, once all have said something."""
        await until(lambda: all(reply.times for reply in self.replies), 30.0, "tokens in all streams")
        ports = {one.raddr.port for one in psutil.Process(self._other).net_connections("tcp") if one.raddr}
        theirs = [number for port, number in self._numbers.items() if port in ports]
        return [number for number in range(ROWS) if number not in theirs], theirs


async def shared(served: Served, other: int) -> tuple[Spread, list[int], list[int]]:
    """Streams of which each process has some: the kernel gives a connection to whoever asks first."""
    for _ in range(20):
        spread = Spread(served, other)
        ours, theirs = await spread.under_way()
        if ours and theirs:
            return spread, ours, theirs
        await spread.task
    raise AssertionError("one process gets all connections")


def test_f04_a_killed_api_process_takes_its_own_connections_with_it_and_no_other(model: Path) -> None:
    """There are no children for text or grammars: what can be killed beside the engine are the API processes."""
    with Served(model, "--api-server-count", "2", faults="slow_step:0.002") as served:
        (other,) = served.siblings()

        async def run() -> None:
            expected = [reply.token_ids for reply in await Crowd(served, ROWS, max_tokens=TOKENS).replies()]
            spread, ours, theirs = await shared(served, other)
            os.kill(other, signal.SIGKILL)
            await spread.task
            assert not any(spread.replies[number].whole for number in theirs)  # a plain end means failure
            assert [spread.replies[number].token_ids for number in ours] == [expected[number] for number in ours]
            assert all(spread.replies[number].ended_well for number in ours)
            replies = await asyncio.gather(*(call(served.port, body=completion()) for _ in range(16)))
            assert all(reply.status == 200 for reply in replies)  # nobody waits for the new one

        asyncio.run(run())
        wait_for(lambda: served.siblings() not in ([], [other]), 10.0, "another process")
        served.settle()


def test_f06_a_stopped_process_does_not_stop_the_others(model: Path) -> None:
    """Its own streams end with an error when it goes on, because the engine has not waited for ever."""
    with Served(model, "--api-server-count", "2", faults="slow_step:0.002") as served:
        (other,) = served.siblings()

        async def run() -> None:
            spread, ours, theirs = await shared(served, other)
            os.kill(other, signal.SIGSTOP)
            try:
                await until(lambda: all(spread.replies[number].ended_well for number in ours), 60.0, "the other's answers")
                gaps = [later - now for number in ours for now, later in
                        zip(spread.replies[number].times, spread.replies[number].times[1:], strict=False)]
                assert max(gaps) < LAG_SECONDS + 2.0
                began = time.monotonic()
                assert (await call(served.port, body=completion())).status == 200
                assert time.monotonic() - began < LAG_SECONDS + 2.0
            finally:
                os.kill(other, signal.SIGCONT)
            await asyncio.wait_for(spread.task, 20.0)
            for number in theirs:
                reply = spread.replies[number]
                assert reply.ended_well or reply.stream_error is not None, reply.body[-300:]

        asyncio.run(run())
        served.settle()


def test_f06_an_api_process_that_stands_still_for_a_while_loses_nothing(model: Path) -> None:
    """Thousands of steps could be computed meanwhile; the engine waits instead, so that its memory has a bound."""
    with Served(model) as served:
        async def run() -> None:
            crowd = Crowd(served, 8, max_tokens=1900)
            await crowd.under_way(1)
            before = memory(served.engine_pid)
            os.kill(served.pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(0.7 * LAG_SECONDS)
                assert memory(served.engine_pid) - before < 16 << 20
                used = psutil.Process(served.engine_pid).cpu_times().user
                await asyncio.sleep(0.2)
                assert psutil.Process(served.engine_pid).cpu_times().user - used < 0.1  # it waits, and not busily
            finally:
                os.kill(served.pid, signal.SIGCONT)
            replies = await crowd.replies()
            assert all(reply.ended_well for reply in replies)
            assert [reply.token_ids for reply in replies[::7]] == await alone(served, crowd.bodies[::7])

        asyncio.run(run())
        served.settle()


def test_f06_there_are_no_ranks_to_be_stopped_yet(model: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "octavo", "serve", str(model), "-tp", "2", "--port", "0"], cwd=ROOT, timeout=60,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("octavo: error: ") and done.stderr.count("tensor_parallel_size") == 1, "it is said once"


def test_f10_a_step_without_memory_costs_its_own_requests_only(model: Path) -> None:
    """Memory is measured at the start, so there should be none of these; one is not tried again, and not the end either."""
    with Served(model, faults="no_memory:80") as served:
        async def run() -> None:
            crowd = Crowd(served, ROWS + 8, lambda number: number % 2 == 0, max_tokens=120)
            replies = await crowd.replies()
            good = [number for number, reply in enumerate(replies) if reply.ended_well]
            assert 8 <= len(good) < ROWS + 8
            assert [replies[number].token_ids for number in good] == await alone(served, [crowd.bodies[n] for n in good])
            for reply in (reply for reply in replies if not reply.ended_well):
                error: Any = reply.stream_error if reply.status == 200 else reply.json["error"]
                assert error["type"] == "server_error" and "memory" not in error["message"]

        asyncio.run(run())
        served.settle(errors=True)


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_is_closed_ends_the_server_as_a_signal_to_end_does(
        model: Path, ignored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless it was started with nohup: then it goes on."""
    if ignored:
        monkeypatch.setattr("served.LAUNCHER", ROOT / "tests" / "serving" / "nohup.py")
    with Served(model, faults="slow_step:0.01") as served:
        pids = [served.pid, *served.children()]

        async def run() -> None:
            crowd = Crowd(served, 4, max_tokens=100)
            await crowd.under_way(4)
            served.process.send_signal(signal.SIGHUP)
            assert all(reply.ended_well for reply in await crowd.replies())

        asyncio.run(run())
        if ignored:
            served.settle()
        else:
            assert served.process.wait(10.0) == 0
            assert all(map(gone, pids)) and not list(served.folder.glob("octavo-server-*"))
