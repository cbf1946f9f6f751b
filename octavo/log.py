"""One logger for the whole package: ``get_logger(__name__)``.

Owns the format and the level (``OCTAVO_LOGGING_LEVEL``); it does not know what is logged. Invariant: importing this
file configures nothing for the embedding program; only ``setup`` (called by our own commands) installs a handler.
"""

import contextlib
import logging
import os
import queue
import sys
import threading
import time

MAX_LINES = 10_000
"""Lines that may wait for whoever reads the log of a server."""
LAST_SECONDS = 1.0
"""How long the end of a program waits for its last lines to be read."""

FORMAT = "%(levelname)s %(asctime)s %(name)s: %(message)s"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; children of ``octavo`` share its level and handler."""
    return logging.getLogger(name)


def setup(level: str | None = None) -> None:
    """Install the stderr handler once.

    Args:
        level: a name of ``logging``; default is OCTAVO_LOGGING_LEVEL, else INFO. An unknown name raises ValueError.
    """
    root = logging.getLogger("octavo")
    root.setLevel((level or os.environ.get("OCTAVO_LOGGING_LEVEL") or "INFO").upper())
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(FORMAT, datefmt="%m-%d %H:%M:%S"))
        root.addHandler(handler)
        root.propagate = False


def detach() -> None:
    """From now on nobody waits for whoever reads the log: lines that are not read wait, and beyond MAX_LINES are dropped.

    For servers, whose standard error may be a pipe that is full. Does nothing where ``setup`` has not installed a handler.
    """
    root = logging.getLogger("octavo")
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler and handler.stream is sys.stderr:
            handler.flush()
            relay = Relay(sys.stderr.fileno())
            relay.setFormatter(handler.formatter)
            root.removeHandler(handler)
            root.addHandler(relay)


class Relay(logging.Handler):
    """Hands lines to a thread that writes them.

    Args:
        descriptor: where to. most: lines that may wait.

    Attributes:
        dropped: lines for which there was no room.
    """

    def __init__(self, descriptor: int, most: int = MAX_LINES) -> None:
        super().__init__()
        self._descriptor, self.dropped = descriptor, 0
        self._lines: queue.Queue[bytes] = queue.Queue(most)
        threading.Thread(target=self._write, name="octavo-log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Take a line."""
        try:
            self._lines.put_nowait(self.format(record).encode("utf-8", "backslashreplace") + b"\n")
        except queue.Full:
            self.dropped += 1
        except Exception:  # of the formatting; logging has its own way to say so
            self.handleError(record)

    def flush(self) -> None:
        """Wait a moment until all lines are written."""
        until = time.monotonic() + LAST_SECONDS
        while self._lines.unfinished_tasks and time.monotonic() < until:
            time.sleep(0.005)

    def _write(self) -> None:
        while True:
            line = self._lines.get()
            with contextlib.suppress(OSError):  # a full disk, or a reader that is gone
                while line:
                    line = line[os.write(self._descriptor, line) :]
            self._lines.task_done()
