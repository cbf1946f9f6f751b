"""The supervisor with real engine processes: restarts, the end of any part, and that nothing is left."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

import border
import pytest
from border import PATIENCE, Front, gone, options, request, until

from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.models.hub import resolve
from octavo.server import supervisor as supervisor_
from octavo.server.child import EXIT_CONFIG, EXIT_ENGINE_DEAD
from octavo.server.supervisor import Keeper, Supervisor
from octavo.worker.group import make_group

Scenario = Callable[[Supervisor, Front, list[tuple[str, int]]], Coroutine]


def play(scenario: Scenario, config: EngineConfig, base: Path, *, faults: str = "", **changes: object) -> None:
    """Run a scenario with a supervisor and a client; afterwards no process and no folder may be left."""
    async def main() -> None:
        dead: list[tuple[str, int]] = []
        supervisor = Supervisor(config, on_dead=lambda message, code: dead.append((message, code)), base=base, **changes)
        supervisor._faults = faults
        supervisor.start()
        try:
            with Front(supervisor.directory) as front:
                await scenario(supervisor, front, dead)
            await supervisor.stop(PATIENCE)
        finally:
            supervisor.close()
        assert gone(supervisor.engine_pid) and not supervisor.directory.exists()
    asyncio.run(main())


def test_a_killed_engine_fails_what_is_open_and_is_started_again(tiny: Path, tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor, front: Front, dead: list[tuple[str, int]]) -> None:
        await front.ready()
        before = await front.run("a")
        pid = supervisor.engine_pid
        front.client.add(request("open", max_tokens=450))
        await until(lambda: front.tokens["open"])
        os.kill(pid, signal.SIGKILL)
        begun = time.monotonic()
        await until(lambda: front.lost)
        assert time.monotonic() - begun < 2.0 and front.client.phase == "down"
        await front.ready()
        assert front.client.epoch == 1 and supervisor.engine_pid != pid and gone(pid)
        assert await front.run("a again") == before and len(front.lost) == 1 and not dead
        os.kill(supervisor.engine_pid, signal.SIGSTOP)  # a stopped one can be ended, too

    play(scenario, options(tiny), tmp_path, delays=(0.1,))


BRIEF = """
import os, sys, time
from octavo.server.child import Notice, attach
parent = attach()
parent.notify(Notice(ready=True))
time.sleep(0.01)
os._exit(3)
"""
COMMAND = [sys.executable, "-c", BRIEF]


def test_what_dies_too_often_is_given_up() -> None:
    async def main() -> None:
        dead: list[tuple[str, int]] = []
        starts: list[float] = []

        def start(epoch: int) -> bytes:
            assert epoch == len(starts)
            starts.append(time.monotonic())
            return b""

        keeper = Keeper("the process", COMMAND, start, lambda *why: dead.append(why), delays=(0.0, 0.1, 0.2))
        await until(lambda: dead)
        assert dead == [("the process has ended 4 times in 10 minutes, the last time with exit code 3.", EXIT_ENGINE_DEAD)]
        assert keeper.epoch == 3 and starts[2] - starts[1] >= 0.1 and starts[3] - starts[2] >= 0.2
        keeper.kill()
    asyncio.run(main())


def test_restarts_that_are_long_ago_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_, "WINDOW", 0.0)

    async def main() -> None:
        dead: list[tuple[str, int]] = []
        keeper = Keeper("the process", COMMAND, lambda epoch: b"", lambda *why: dead.append(why), delays=(0.0,))
        await until(lambda: keeper.epoch == 3)
        assert not dead
        keeper.kill()
    asyncio.run(main())


def test_what_was_stopped_is_not_started_again() -> None:
    async def main() -> None:
        keeper = Keeper("the process", COMMAND, lambda epoch: b"", lambda *why: None, delays=(0.05,) * 9)
        await until(lambda: keeper.epoch == 1)
        assert await keeper.wait(PATIENCE)
        keeper.stop()
        await asyncio.sleep(0.1)
        assert keeper.epoch == 1
        keeper.kill()
    asyncio.run(main())


def test_a_mistake_at_start_is_final(tiny: Path, tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor, front: Front, dead: list[tuple[str, int]]) -> None:
        await until(lambda: dead)
        assert dead[0][1] == EXIT_CONFIG and "no such file" in dead[0][0] and not front.client.ready

    play(scenario, options("/does/not/exist.gguf"), tmp_path)


def test_an_engine_that_cannot_start_is_final(tiny: Path, tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor, front: Front, dead: list[tuple[str, int]]) -> None:
        await until(lambda: front.client.epoch == 0)
        os.kill(supervisor.engine_pid, signal.SIGKILL)
        await until(lambda: dead)
        assert dead[0][1] == EXIT_ENGINE_DEAD and "before it was ready" in dead[0][0]

    play(scenario, options(tiny), tmp_path, faults="init_hang:60")


def test_an_engine_that_is_stopped_is_noticed_and_can_go_on(tiny: Path, tmp_path: Path) -> None:
    async def scenario(supervisor: Supervisor, front: Front, dead: list[tuple[str, int]]) -> None:
        await front.ready()
        front.client.add(request("a", max_tokens=400))
        await until(lambda: front.tokens["a"])
        os.kill(supervisor.engine_pid, signal.SIGSTOP)
        await until(lambda: front.client.heartbeat_age() > 2.5)
        begun = time.monotonic()
        assert front.client.ready and time.monotonic() - begun < 0.1  # and nobody here waits for it
        front.client.add(request("b"))
        os.kill(supervisor.engine_pid, signal.SIGCONT)
        await until(lambda: front.client.heartbeat_age() < 1.5)
        await until(lambda: {"a", "b"} <= front.finished)
        assert len(front.tokens["a"]) == 400 and not front.lost

    play(scenario, options(tiny), tmp_path)


def test_a_killed_parent_leaves_no_process_and_no_folder(tiny: Path, tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, border.__file__, str(tiny), str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    folder, pid = parent.stdout.readline().split()
    assert Path(folder).exists() and not gone(int(pid))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    asyncio.run(until(lambda: gone(int(pid)) and not list(tmp_path.iterdir()), 5.0))


SIBLING = """
import os, signal, sys
from octavo.server.child import Notice, attach
parent = attach()
signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
parent.notify(Notice(ready=True))
os.write(int(sys.argv[1]), parent.start)
while True:
    signal.pause()
"""


def test_siblings_are_kept_running_and_drained(tiny: Path, tmp_path: Path) -> None:
    read, write = os.pipe()

    async def main() -> None:
        dead: list[tuple[str, int]] = []
        supervisor = Supervisor(options(tiny), on_dead=lambda *why: dead.append(why), base=tmp_path, delays=(0.0,))
        try:
            supervisor.start_sibling([sys.executable, "-c", SIBLING, str(write)], b"x", pass_fds=(write,))
            (first,) = supervisor.sibling_pids()
            assert await asyncio.to_thread(os.read, read, 1) == b"x"
            os.kill(first, signal.SIGKILL)
            assert await asyncio.to_thread(os.read, read, 1) == b"x"
            (second,) = supervisor.sibling_pids()
            assert second != first and not dead
            supervisor.drain_siblings()
            await until(lambda: gone(second))
            await supervisor.stop(PATIENCE)
            await supervisor.stop(PATIENCE)
            assert not dead and not supervisor.directory.exists()
        finally:
            supervisor.close()
    asyncio.run(main())
    os.close(read)
    os.close(write)


def test_a_thousand_streams_do_not_stall_the_engine(tiny: Path, tmp_path: Path) -> None:
    config = options(tiny, max_num_seqs=256, max_num_batched_tokens=2048, num_gpu_blocks_override=4096,
                     enable_prefix_caching=False)
    names = [f"r{i}" for i in range(1000)]

    def wanted(name: str) -> object:
        return request(name, [5, 6, int(name[1:]) % 200], max_tokens=32)

    engine = Engine(config, make_group(config, resolve(config)))
    for name in names:
        engine.add(wanted(name))
    begun, tokens = time.monotonic(), 0
    while engine.has_work():
        tokens += len(engine.step().streamed)
    alone = time.monotonic() - begun
    engine.close()
    assert tokens == 32_000

    async def scenario(supervisor: Supervisor, front: Front, dead: list[tuple[str, int]]) -> None:
        await front.ready()
        begun = time.monotonic()
        for name in names:
            front.client.add(wanted(name))
        sent = time.monotonic() - begun
        await until(lambda: len(front.finished) == 1000)
        took = time.monotonic() - begun
        gaps = [after - before for (before, _), (after, _) in zip(front.steps, front.steps[1:], strict=False)]
        print(f"alone {alone:.3f} s, through the border {took:.3f} s, sending {sent:.3f} s, longest gap {max(gaps):.3f} s")
        assert all(len(front.tokens[name]) == 32 for name in names)
        assert took < 3.0 * alone + 2.0 and max(gaps) < 1.0 + alone / 4  # on a machine that is busy, both are slow

    play(scenario, config, tmp_path)
