"""The server as a whole: the first API process with its supervisor, and the entry of the other API processes.

Owns start, signals and the exit code; it does not know requests. The first process listens, starts the engine process and
the other API processes, and answers itself. Invariant: whatever ends the server, it ends with every process that it
started, and with exit code 0 (asked to), 1 (the operator's mistake) or 70 (it could not go on).
"""

import asyncio
import logging
import os
import resource
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TextIO

import msgspec
import uvloop

from octavo import __version__, log
from octavo.config import EngineConfig
from octavo.server.api_process import ApiProcess
from octavo.server.child import Notice, attach, python
from octavo.server.config import ServerConfig
from octavo.server.listen import address, listen
from octavo.server.supervisor import Supervisor

STOP_SECONDS = 2.0
"""How long the other API processes get beyond their own time to drain."""

READ_SECONDS = 0.2
"""How long a line for people waits for room in a pipe."""

_log = log.get_logger(__name__)


class Sibling(msgspec.Struct):
    """What an API process beside the first one is told at its start."""

    engine: EngineConfig
    server: ServerConfig
    directory: str
    number: int
    listener: int


def run(engine: EngineConfig, server: ServerConfig) -> int:
    """Serve until a signal or a failure ends it; returns the exit code.

    Raises:
        ConfigError: an address cannot be listened on, or a key file cannot be read.
    """
    began = time.monotonic()
    if not log.get_logger("octavo").hasHandlers():
        log.setup()
    log.detach()
    _allow_files()
    sock = listen(server)
    try:
        return _run(_first(engine, server, sock, began))
    finally:
        sock.close()
        if server.uds is not None:
            Path(server.uds).unlink(missing_ok=True)


def _allow_files() -> None:
    """Connections are files, of which a shell allows fewer at first than may be."""
    soft, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    _log.debug("up to %d open files, %d before", most, soft)


async def _first(engine: EngineConfig, server: ServerConfig, sock: socket.socket, began: float) -> int:
    code = 0
    front: ApiProcess | None = None

    def failed(message: str, status: int) -> None:
        nonlocal code
        if not code:
            code = status
            _say(f"octavo: error: {message}", sys.stderr)
        if front is not None:
            front.stop("The server cannot go on.")

    supervisor = Supervisor(engine, on_dead=failed)
    try:
        supervisor.start()  # the longest way to go; the rest gets ready beside it
        front = ApiProcess(engine, server, supervisor.directory, 0, sock, failed)
        front.metrics.watch_restarts(supervisor.restarts)
        for number in range(1, server.api_server_count):
            start = Sibling(engine, server, str(supervisor.directory), number, sock.fileno())
            supervisor.start_sibling(python("octavo.server.main"), msgspec.json.encode(start), (sock.fileno(),))

        def ask_to_end() -> None:
            supervisor.drain_siblings()
            front.drain()

        _on_signals(ask_to_end)
        where = address(server, sock)
        _say(f"Octavo {__version__} listens on {where}; {engine.model} is being loaded.")
        announcing = asyncio.create_task(_announce(front, server, engine, where, began))
        if not code:
            await front.serve()
        announcing.cancel()
        await supervisor.stop(STOP_SECONDS + (server.shutdown_timeout if supervisor.sibling_pids() else 0.0))
    finally:
        supervisor.close()
    return code


async def _announce(front: ApiProcess, server: ServerConfig, engine: EngineConfig, where: str, began: float) -> None:
    await front.ready.wait()
    _say(f"Ready after {time.monotonic() - began:.1f} s.")
    target = f"--unix-socket {server.uds} http://localhost" if server.uds is not None else where
    key = " -H 'Authorization: Bearer KEY'" if server.api_key or server.api_key_file else ""
    body = '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}'
    _say(f"Try:  curl {target}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
    if server.uds is None:
        _say(f"Chat: {where}/")


def _say(line: str, stream: TextIO | None = None) -> None:
    """Print a line, by default to the standard output; whoever started the server and does not read is not waited for."""
    out = stream or sys.stdout
    try:
        if not select.select([], [out], [], READ_SECONDS)[1]:
            raise BlockingIOError
        print(line, file=out, flush=True)
    except OSError:  # no reason to end the server
        _log.info("%s", line)


def _on_signals(ask_to_end: Callable[[], None]) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup: it outlives its terminal
            loop.add_signal_handler(number, ask_to_end)


def _run(work: Coroutine[Any, Any, int]) -> int:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


async def _other(sibling: Sibling, ready: Callable[[], None]) -> int:
    code = 0
    sock = socket.socket(fileno=sibling.listener)
    sock.setblocking(False)

    def failed(message: str, status: int) -> None:
        nonlocal code
        code = status
        _log.critical("%s", message)
        front.stop("The server cannot go on.")

    front = ApiProcess(sibling.engine, sibling.server, Path(sibling.directory), sibling.number, sock, failed)
    _on_signals(front.drain)
    asyncio.get_running_loop().call_soon(ready)  # it answers; whether the engine does is not its own
    await front.serve(when_ready=True)
    return code


if __name__ == "__main__":
    parent = attach()
    log.setup()
    log.detach()
    exit_code = _run(_other(msgspec.json.decode(parent.start, type=Sibling), lambda: parent.notify(Notice(ready=True))))
    logging.shutdown()
    os._exit(exit_code)
