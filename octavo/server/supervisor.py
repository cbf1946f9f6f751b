"""Supervisor: starts the engine process and the other API processes, starts again what dies, and ends them all.

Owns the private folder, the processes and the decision when to give up; it does not know requests or sockets. It lives in the
first API process, in the thread of its event loop.

Invariant: at any time at most one engine process runs, each under an epoch of its own; what was started here ends with this
process, in whatever way that ends, and ``on_dead`` is called at most once.
"""

import asyncio
import logging
import signal
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

from octavo.config import EngineConfig
from octavo.log import get_logger
from octavo.server.child import EXIT_CONFIG, EXIT_ENGINE_DEAD, Child, Notice, python
from octavo.server.ipc import encode_start
from octavo.server.rundir import RunDirectory

DELAYS = (1.0, 2.0, 4.0)
"""Seconds before the first, second, third restart within WINDOW; after that many the server gives up."""

WINDOW = 600.0
MAX_WAITING = 64
"""Messages that may wait for an API process before the engine waits for it: enough for what it does between two looks."""

LET_GO_SECONDS = 2.0
"""How long a process may take to end by itself once it was let go."""

_log = get_logger(__name__)


class Keeper:
    """Keeps one process running.

    Args:
        name: for the log and for messages. command: what runs; see ``Child``. start: its start message, for an epoch.
        on_dead: called once, with a sentence and an exit code, when it has failed before it was ever ready or too often.
        delays: before each restart.

    Attributes:
        epoch: counts the processes from 0. child: the present one.
        restarts: ends after which it was started again, by cause: a signal's name, or exit_CODE.
    """

    def __init__(self, name: str, command: Sequence[str], start: Callable[[int], bytes], on_dead: Callable[[str, int], None],
                 *, pass_fds: Sequence[int] = (), delays: Sequence[float] = DELAYS) -> None:
        self._name, self._command, self._start_message, self._on_dead = name, command, start, on_dead
        self._pass_fds, self._delays = pass_fds, delays
        self._loop = asyncio.get_running_loop()
        self._restarts: deque[float] = deque()
        self._was_ready = self._stopping = False
        self._failed: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._ended = asyncio.Event()
        self.epoch = -1
        self.restarts: Counter[str] = Counter()
        self._start()

    def stop(self, number: int | None = None) -> None:
        """Start it no more. Ask it to end: with a signal, or by letting it go."""
        self._stopping = True
        if self._timer is not None:
            self._timer.cancel()
        if number is None:
            self.child.let_go()
        else:
            self.child.send_signal(number)

    async def wait(self, timeout: float) -> bool:
        """Wait for its end; whether it has come."""
        try:
            await asyncio.wait_for(self._ended.wait(), timeout)
        except TimeoutError:
            return False
        return True

    def kill(self) -> None:
        """End it without asking, and wait for it: the kernel does not take long."""
        self._stopping = True
        self.child.send_signal(signal.SIGKILL)
        self.child.join(LET_GO_SECONDS)

    def _start(self) -> None:
        self.epoch += 1
        self._failed, self._timer = None, None
        self._ended.clear()
        self.child = Child(self._command, self._start_message(self.epoch), pass_fds=self._pass_fds,
                           on_notice=lambda notice: self._later(self._note, notice),
                           on_exit=lambda code: self._later(self._exited, code))

    def _later(self, call: Callable[..., None], *args: object) -> None:
        """From the child's thread into the event loop."""
        try:
            self._loop.call_soon_threadsafe(call, *args)
        except RuntimeError:
            return  # the loop is closed: nobody is there any more whom it concerns

    def _note(self, notice: Notice) -> None:
        self._was_ready |= notice.ready
        self._failed = notice.failed or self._failed

    def _exited(self, code: int) -> None:
        self._ended.set()
        if self._stopping:
            return
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        is_told = bool(code == EXIT_CONFIG and self._failed and not self._was_ready)  # a mistake of the user's
        level = logging.DEBUG if is_told else logging.ERROR
        _log.log(level, "%s (process %d) has ended with %s", self._name, self.child.pid, how)
        if not self._was_ready:
            message = self._failed or f"{self._name} has ended with {how} before it was ready; the log says more."
            self._give_up(message, EXIT_CONFIG if is_told else EXIT_ENGINE_DEAD)
            return
        now = time.monotonic()
        while self._restarts and now - self._restarts[0] > WINDOW:
            self._restarts.popleft()
        if len(self._restarts) == len(self._delays):
            self._give_up(f"{self._name} has ended {len(self._delays) + 1} times in {WINDOW / 60:g} minutes, "
                          f"the last time with {how}.", EXIT_ENGINE_DEAD)
            return
        delay = self._delays[len(self._restarts)]
        self._restarts.append(now)
        self.restarts[signal.Signals(-code).name if code < 0 else f"exit_{code}"] += 1
        _log.warning("%s is started again in %g s", self._name, delay)
        self._timer = self._loop.call_later(delay, self._start)

    def _give_up(self, message: str, code: int) -> None:
        self._stopping = True
        self._on_dead(message, code)


class Supervisor:
    """Made inside the event loop, by the first API process; the engine process starts in ``start``.

    Args:
        config: the engine's options.
        on_dead: called once, in the event loop, when the server cannot go on: a sentence for people and the exit code that
            this process should end with (1 for the operator's mistake at start, else 70).
        base: where the private folder is made; default as in RunDirectory. delays: see DELAYS. max_waiting: see MAX_WAITING.

    Attributes:
        directory: of the sockets, for EngineClient. dead: what on_dead was told, else None.

    Raises:
        ConfigError: there is no place for the folder.
    """

    _faults = ""
    """Faults for the engine processes (see faults.py); tests set it on the instance before ``start``."""

    def __init__(self, config: EngineConfig, *, on_dead: Callable[[str, int], None], base: Path | None = None,
                 delays: Sequence[float] = DELAYS, max_waiting: int = MAX_WAITING) -> None:
        self._config, self._on_dead, self._delays, self._max_waiting = config, on_dead, delays, max_waiting
        self._folder = RunDirectory(base)
        self.directory = self._folder.path
        self.dead: str | None = None
        self._engine: Keeper | None = None
        self._siblings: list[Keeper] = []

    @property
    def engine_pid(self) -> int:
        """Process id of the present engine process, 0 before ``start``."""
        return self._engine.child.pid if self._engine is not None else 0

    def start(self) -> None:
        """Start the engine process."""
        self._engine = Keeper(
            "the engine process", python("octavo.server.engine_process"),
            lambda epoch: encode_start(self._config, self.directory, epoch, self._max_waiting, self._faults),
            self._give_up, delays=self._delays)

    def start_sibling(self, command: Sequence[str], start: bytes, pass_fds: Sequence[int] = ()) -> None:
        """Start another API process, which calls ``child.attach`` and then notifies that it is ready.

        Args:
            command: see ``child.python``. start: its start message. pass_fds: descriptors of the listening sockets.
        """
        name = f"API process {len(self._siblings) + 1}"
        self._siblings.append(
            Keeper(name, command, lambda epoch: start, self._give_up, pass_fds=pass_fds, delays=self._delays))

    def restarts(self) -> dict[tuple[str, str], int]:
        """How often processes were started again: by kind, "engine" or "api", and cause; see Keeper."""
        api: Counter[str] = sum((sibling.restarts for sibling in self._siblings), Counter())
        engine = self._engine.restarts if self._engine is not None else {}
        return {("engine", cause): count for cause, count in engine.items()} | {
            ("api", cause): count for cause, count in api.items()}

    def sibling_pids(self) -> list[int]:
        """Process ids of the other API processes."""
        return [sibling.child.pid for sibling in self._siblings]

    def drain_siblings(self) -> None:
        """Ask the other API processes to end what they have begun and then to end (SIGTERM)."""
        for sibling in self._siblings:
            sibling.stop(signal.SIGTERM)

    async def stop(self, timeout: float) -> None:
        """End everything: siblings get ``timeout`` seconds to drain, the engine process has nothing to lose.

        Stopping twice is allowed.
        """
        self.drain_siblings()
        until = time.monotonic() + timeout
        for sibling in self._siblings:
            await sibling.wait(max(0.0, until - time.monotonic()))
        keepers = [*self._siblings, *([self._engine] if self._engine is not None else [])]
        for keeper in keepers:
            keeper.stop()
        await asyncio.gather(*(keeper.wait(LET_GO_SECONDS) for keeper in keepers))
        self.close()

    def close(self) -> None:
        """End everything now, without waiting for anything but the kernel."""
        for keeper in [*self._siblings, *([self._engine] if self._engine is not None else [])]:
            keeper.kill()
        self._folder.close()

    def _give_up(self, message: str, code: int) -> None:
        if self.dead is None:
            self.dead = message
            _log.log(logging.DEBUG if code == EXIT_CONFIG else logging.CRITICAL, "giving up: %s", message)
            self._on_dead(message, code)
