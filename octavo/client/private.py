"""PrivateServer: an Octavo server of one's own, behind a unix socket, for as long as a command needs it.

Owns the process and its socket; it does not know what is asked of it. Invariant: the server ends with this process, in
whatever way that ends, and nobody but this user can reach it.
"""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from types import TracebackType

from octavo.client.connection import Address, Client
from octavo.client.wire import ConnectionFailed
from octavo.errors import OctavoError
from octavo.server.rundir import RunDirectory

POLL_SECONDS = 0.1
STOP_SECONDS = 40.0  # more than the server gives its requests
STDERR = 2
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class PrivateServer:
    """A server process; a context manager, within which it runs. What it prints goes to stderr.

    Args:
        words: arguments of ``octavo serve``, the model first. command: what runs instead, in tests.

    Attributes:
        address: where it listens.
    """

    def __init__(self, words: Sequence[str], command: Sequence[str] = (sys.executable, "-m", "octavo", "serve")) -> None:
        self._folder = RunDirectory()
        # A name of this form is one that later servers remove when this process has died without doing so.
        path = str(self._folder.path / "engine-http")
        self.address = Address.unix(path)
        environment = {name: value for name, value in os.environ.items() if name != "OCTAVO_API_KEY"}
        try:
            self._process = subprocess.Popen(
                [*command, *words, "--uds", path], stdin=subprocess.DEVNULL, stdout=STDERR, env=environment,
                process_group=0, preexec_fn=partial(end_with_parent, os.getpid()))
        except BaseException:
            self._folder.close()
            raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def ready(self, client: Client) -> None:
        """Wait until it can answer; OctavoError when it ends instead."""
        while True:
            try:
                if (await client.request("GET", "/health")).status == 200:
                    return
            except ConnectionFailed:
                pass  # the socket is not there yet
            if self._process.poll() is not None:
                raise OctavoError(f"the server could not start (exit code {self._process.returncode}); it said why above.")
            await asyncio.sleep(POLL_SECONDS)

    def __enter__(self) -> "PrivateServer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            self._folder.close()


def end_with_parent(parent: int) -> None:
    """What a child runs before it becomes a server: it will be asked to end when the process ``parent`` has ended.

    A process group of its own keeps Ctrl-C for the parent, which then stops it.
    """
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:  # it died before that line, and nobody will tell
        os._exit(1)
