"""Both sides of the process border for tests: an EngineLoop over the fake engine in a thread, and real engine processes.

``python border.py`` is a parent for the tests that kill one: it starts an engine process and prints where and which.
"""

import asyncio
import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import zmq

from octavo.config import EngineConfig
from octavo.messages import EngineRequest, StepOutput
from octavo.params import SamplingParams
from octavo.server import heart
from octavo.server.engine_loop import EngineLoop
from octavo.server.heart import Heart, Vitals
from octavo.server.ipc import engine_address
from octavo.server.remote import EngineClient
from octavo.server.supervisor import Supervisor

PATIENCE = 60.0
heart.INTERVAL = 0.1  # of engines in this process: the first beats go to nobody, and the next one is waited for


def request(name: str, prompt: list[int] | None = None, *, stream: bool = True, **params: object) -> EngineRequest:
    values = {"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **params}
    return EngineRequest(request_id=name, prompt_token_ids=prompt or [5, 6, 7], params=SamplingParams(**values), stream=stream)


def options(model: Path | str, **changes: object) -> EngineConfig:
    return EngineConfig.from_kwargs(**{
        "model": str(model), "load_format": "dummy", "skip_tokenizer_init": True, "num_gpu_blocks_override": 512,
        "swap_space": 0.0, "max_num_seqs": 64, "max_num_batched_tokens": 512, "disable_log_stats": True, **changes})


async def until(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    """Wait for a condition; a test that waits for ever fails here."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, f"not within {patience} s"
        await asyncio.sleep(0.005)


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


class Front:
    """An EngineClient that remembers all it hears."""

    def __init__(self, directory: Path, client_id: int = 0) -> None:
        self.steps: list[tuple[float, StepOutput]] = []
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.reasons: dict[str, str] = {}
        self.errors: dict[str, str | None] = {}
        self.finished: set[str] = set()
        self.refused: dict[str, Exception] = {}
        self.lost: list[str] = []
        self.client = EngineClient(
            directory, client_id, on_step=self._on_step, on_refused=self.refused.__setitem__, on_lost=self.lost.append)

    def __enter__(self) -> "Front":
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()

    def _on_step(self, out: StepOutput) -> None:
        self.steps.append((time.monotonic(), out))
        for (name, _), token in zip(out.streamed, out.token_list(), strict=True):
            self.tokens[name].append(token)
        for end in out.ended:
            self.reasons[end.request_id], self.errors[end.request_id] = end.reason, end.error
            self.tokens[end.request_id] += end.token_ids
        self.finished |= set(out.finished)

    async def ready(self) -> None:
        await until(lambda: self.client.ready)

    async def run(self, name: str, **params: object) -> list[int]:
        """One request from beginning to end."""
        self.client.add(request(name, **params))
        await until(lambda: name in self.finished)
        return self.tokens[name]


class LoopThread:
    """An EngineLoop in a thread of this process; ``with`` it. ``engine`` belongs to the thread while it runs."""

    def __init__(self, engine: object, directory: Path, *, max_waiting: int = 1000, epoch: int = 0) -> None:
        self.vitals, self.error = Vitals(epoch), None
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set(zmq.ROUTER_MANDATORY, 1)
        self._socket.set(zmq.SNDHWM, max_waiting)
        self._socket.set(zmq.LINGER, 0)
        self.address = engine_address(str(directory), epoch)
        self._socket.bind(self.address)
        Heart(self._context, str(directory), self.vitals)
        self._engine, self._thread = engine, threading.Thread(target=self._run)

    def __enter__(self) -> "LoopThread":
        self.loop = EngineLoop(self._engine, self._socket, self.vitals)
        self.vitals.info = self._engine._state.info
        self.vitals.enter("ready")
        self._thread.start()
        return self

    def _run(self) -> None:
        try:
            self.loop.run()
        except zmq.ContextTerminated:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self._socket.close()

    def __exit__(self, *_: object) -> None:
        self.vitals.changed.set()
        self._context.term()
        self._thread.join()
        if self.error is not None:
            raise self.error


async def _parent(model: str, base: str) -> None:
    supervisor = Supervisor(options(model), on_dead=lambda message, code: os._exit(code), base=Path(base))
    supervisor.start()
    front = Front(supervisor.directory)
    await front.ready()
    print(supervisor.directory, supervisor.engine_pid, flush=True)
    await asyncio.sleep(1000)


if __name__ == "__main__":
    asyncio.run(_parent(*sys.argv[1:]))
