"""The engine process by itself, started with bytes: what it says and how it ends."""

import asyncio
import threading
from pathlib import Path

import pytest
from border import PATIENCE, Front, options, request, until

from octavo.config import EngineConfig
from octavo.server.child import EXIT_CONFIG, EXIT_DEVICE_LOST, EXIT_ENGINE_DEAD, Child, Notice, python
from octavo.server.ipc import encode_start


class Process:
    """A started engine process and what it said to its parent."""

    def __init__(self, config: EngineConfig, directory: Path, faults: str = "") -> None:
        self.notices: list[Notice] = []
        self.code: int | None = None
        self.ended = threading.Event()
        self.child = Child(python("octavo.server.engine_process"), encode_start(config, directory, 0, 1000, faults),
                           on_notice=self.notices.append, on_exit=self._exit)

    def _exit(self, code: int) -> None:
        self.code = code
        self.ended.set()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.child.let_go()
        assert self.ended.wait(PATIENCE)


@pytest.mark.parametrize(("change", "sentence"), [
    ({"model": "/does/not/exist.gguf"}, "no such file"),
    ({"num_gpu_blocks_override": None, "kv_cache_memory_bytes": 1}, "kv_cache_memory_bytes")])
def test_a_mistake_of_the_operator_is_one_sentence_and_code_1(tiny: Path, tmp_path: Path, change: dict, sentence: str) -> None:
    process = Process(options(tiny).replace(**change), tmp_path)
    assert process.ended.wait(PATIENCE) and process.code == EXIT_CONFIG
    assert len(process.notices) == 1 and sentence in process.notices[0].failed and "\n" not in process.notices[0].failed


def test_workers_that_do_not_start_are_no_mistake_of_the_operator(tiny: Path, tmp_path: Path) -> None:
    process = Process(options(tiny), tmp_path, "init_raise:1")
    assert process.ended.wait(PATIENCE) and process.code == EXIT_ENGINE_DEAD
    assert "Broken" in process.notices[0].failed and "log" in process.notices[0].failed


@pytest.mark.parametrize(("faults", "code"), [("step_raise:4-6", EXIT_ENGINE_DEAD), ("device_lost:4", EXIT_DEVICE_LOST)])
def test_a_dead_engine_ends_its_process_with_a_code(tiny: Path, tmp_path: Path, faults: str, code: int) -> None:
    async def main() -> None:
        with Process(options(tiny, max_num_seqs=1), tmp_path, faults) as process, Front(tmp_path) as front:
            await front.ready()
            for name in "abcd":
                front.client.add(request(name, max_tokens=50))
            await until(lambda: front.lost)
            await asyncio.to_thread(process.ended.wait, PATIENCE)
            assert process.code == code and process.notices[0] == Notice(ready=True)
            assert len(process.notices) == 2 and "the engine has ended" in process.notices[1].failed
    asyncio.run(main())


def test_a_step_that_fails_costs_its_requests_only(tiny: Path, tmp_path: Path) -> None:
    async def main() -> None:
        with Process(options(tiny), tmp_path, "step_raise:12;nan_row:16:0") as process, Front(tmp_path) as front:
            await front.ready()
            good = await front.run("good")  # steps 1 to 8
            front.client.add(request("hit", max_tokens=50))
            front.client.add(request("hit too", max_tokens=50, n=2, temperature=1.0))
            await until(lambda: {"hit", "hit too"} <= front.finished)
            assert front.reasons["hit"] == front.reasons["hit too"] == "error" and "Broken" in front.errors["hit"]
            front.client.add(request("row"))
            await until(lambda: "row" in front.finished)
            assert front.reasons["row"] == "error" and "not finite" in front.errors["row"]
            assert await front.run("good again") == good
            await until(lambda: front.client.stats.failed_steps == 1 and front.client.stats.running == 0)
            assert process.code is None and not front.lost
    asyncio.run(main())


def test_a_step_that_hangs_is_seen_from_outside(tiny: Path, tmp_path: Path) -> None:
    async def main() -> None:
        with Process(options(tiny), tmp_path, "hang:3:2.5") as process, Front(tmp_path) as front:
            await front.ready()
            front.client.add(request("a"))
            await until(lambda: front.client.step_age() > 1.5)
            assert front.client.heartbeat_age() < 1.5  # the heart beats on
            await until(lambda: "a" in front.finished)
            await until(lambda: front.client.step_age() == 0.0)
            assert front.reasons["a"] == "length" and process.code is None
    asyncio.run(main())
