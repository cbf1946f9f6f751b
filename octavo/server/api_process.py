"""ApiProcess: one API process: its link to the engine, its text side, its HTTP server, and how it ends.

Owns the order of these; it does not start or watch processes (main.py does). The port answers from the first moment:
before the model is there with 503. Invariant: when ``serve`` returns, every stream that was open has ended, with its
answer or with an error.
"""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp

from octavo.config import EngineConfig
from octavo.errors import ConfigError
from octavo.log import get_logger
from octavo.models.hub import resolve
from octavo.server import garbage
from octavo.server.app import build_app
from octavo.server.auth import read_keys
from octavo.server.child import EXIT_CONFIG, EXIT_ENGINE_DEAD
from octavo.server.config import ServerConfig
from octavo.server.listen import doors
from octavo.server.metrics import Metrics
from octavo.server.observers import Observers
from octavo.server.probes import Health
from octavo.server.protocol import uvicorn_config
from octavo.server.remote import EngineClient
from octavo.server.service import Service
from octavo.text.chat import ChatTemplate, load_chat_template
from octavo.text.intake import Intake
from octavo.text.tokenizer import load_tokenizer

EARLY = ("starting", "fetching", "down")
"""Phases of the engine in which the model's files may still be on their way."""

ENDING = "The server is shutting down."
ECHO_SECONDS = 0.3
READY_SECONDS = 0.02
CLOSE_SECONDS = 3.0
"""How long connections may take to send what is left, once every stream has ended."""

logger = get_logger(__name__)


class ApiProcess:
    """Made inside the event loop.

    Args:
        engine, server: options. directory: of the engine's sockets. number: of this API process, 0 for the first.
        sock: listening. on_failed: called with a sentence and an exit code when the model's text side cannot be loaded.

    Attributes:
        ready: set when requests are taken for the first time.
    """

    def __init__(self, engine: EngineConfig, server: ServerConfig, directory: Path, number: int, sock: socket.socket,
                 on_failed: Callable[[str, int], None]) -> None:
        self._config, self._server, self._sock, self._on_failed = engine, server, sock, on_failed
        self.ready = asyncio.Event()
        self._fetched = asyncio.Event()
        self._stopping = False
        self._drain_began = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self.metrics = Metrics(engine, server, directory, number)
        self._observers = Observers(self.metrics, engine, server)
        # The client's callbacks come from the event loop, so not before the service is there.
        self.client = EngineClient(
            directory, number, on_step=lambda out: self.service.on_step(out), on_heartbeat=self._heartbeat,
            on_refused=lambda name, error: self.service.on_refused(name, error),
            on_lost=lambda message: self.service.on_lost(message))
        self.service = Service(engine, server, self.client, self._observers)
        self.health = Health(self.client, server.step_timeout)
        app = build_app(self.service, self.health, self.metrics, read_keys(server.api_key, server.api_key_file))
        self._http = HttpServer(server, app)
        self.metrics.watch(self.service, self._http)

    async def serve(self, when_ready: bool = False) -> None:
        """Answer until ``stop``, or until ``drain`` is done.

        Args:
            when_ready: not before the model is there; until then others answer on the same port.
        """
        self._start(self._load_text())
        try:
            while when_ready and not (self.ready.is_set() or self.health.draining or self._stopping):
                await asyncio.sleep(READY_SECONDS)
            await self._http.serve(sockets=doors(self._sock))
        finally:
            for task in self._tasks:
                task.cancel()
            self.service.close()
            self.client.close()
            self.metrics.close()
            self._observers.close()

    def drain(self) -> None:
        """Take nothing new, end what has begun, then stop. Called again, and after ``shutdown_timeout``, it stops at once.

        A second call within a moment is the first one's echo: whoever signals a whole group of processes reaches one twice.
        """
        now = time.monotonic()
        if self.health.draining:
            if now - self._drain_began > ECHO_SECONDS:
                self.stop()
            return
        self.health.draining, self._drain_began = True, now
        self.service.admission.closed = ENDING
        self._http.say_close()
        self._start(self._drain())

    def stop(self, message: str = ENDING) -> None:
        """End every stream with an error, and then the server."""
        if not self._stopping:
            self._stopping = True
            self.service.admission.closed = message
            self.service.abort_all(message)
            self._http.should_exit = True

    def _start(self, work: Coroutine[None, None, None]) -> None:
        self._tasks.add(asyncio.create_task(work))

    async def _drain(self) -> None:
        if (count := self.service.num_open) > 0:
            logger.info("ending %d requests; a second signal ends them at once", count)
        try:
            await asyncio.wait_for(self.service.wait_idle(), self._server.shutdown_timeout)
        except TimeoutError:
            logger.warning("%d requests were not done in %g s", self.service.num_open, self._server.shutdown_timeout)
        self.stop()

    def _heartbeat(self) -> None:
        if self.client.phase not in EARLY:
            self._fetched.set()
        self.metrics.heartbeat(self.client)
        self._note_ready()

    def _note_ready(self) -> None:
        if not self.ready.is_set() and not self.health.trouble():
            self.ready.set()

    async def _load_text(self) -> None:
        """Read tokenizer and template, once the engine process has seen to it that the files are there."""
        await self._fetched.wait()
        try:
            intake, template = await asyncio.to_thread(_read_text, self._config, self._server)
        except ConfigError as error:
            self._on_failed(str(error), EXIT_CONFIG)
            return
        except Exception as error:
            logger.exception("the tokenizer could not be loaded")
            self._on_failed(f"the tokenizer could not be loaded ({type(error).__name__}); the log says more.", EXIT_ENGINE_DEAD)
            return
        self.service.equip(intake, template)
        garbage.spare()
        self.health.has_text = True
        self._note_ready()


class HttpServer(uvicorn.Server):
    """uvicorn with our protocol; signals are left to main.py."""

    def __init__(self, server: ServerConfig, app: ASGIApp) -> None:
        super().__init__(uvicorn_config(
            app, server, lifespan="off", log_level=server.uvicorn_log_level, timeout_graceful_shutdown=CLOSE_SECONDS))

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield

    @property
    def num_connections(self) -> int:
        """Connections of clients."""
        return len(self.server_state.connections)

    def say_close(self) -> None:
        """From now on connections end with their answers."""
        for connection in list(self.server_state.connections):
            connection.shutdown()


def _read_text(config: EngineConfig, server: ServerConfig) -> tuple[Intake, ChatTemplate | None]:
    source = resolve(config)
    tokenizer = None if config.skip_tokenizer_init else load_tokenizer(source, config)
    template = None if tokenizer is None else load_chat_template(tokenizer, config)
    return Intake(source, config, tokenizer, server.grammar_limits), template
