"""Heart: says once a second, and whenever the engine becomes idle, that the engine process lives, what it does and has done.

Owns the thread and its socket, and Vitals, the numbers that the main thread leaves for it; it does not touch the engine.
Invariant: a heartbeat comes every second as long as threads run at all, however long a step takes, so that a step that
hangs and a process that is stopped look different from outside.
"""

import os
import threading
import time

import zmq

from octavo.engine.stats import Stats
from octavo.log import get_logger
from octavo.plan import GroupInfo
from octavo.server.ipc import Heartbeat, encode_heartbeat, heartbeat_address

INTERVAL = 1.0
PAUSE = 0.05
"""Seconds between two heartbeats at least, however often the engine becomes idle."""
PROGRESS = {"starting": 0.0, "fetching": 0.1, "loading": 0.2, "preparing": 0.9, "ready": 1.0}
"""The phases in their order, and which share of the way to ready lies behind at the beginning of each."""

_log = get_logger(__name__)


class Vitals:
    """What the main thread says about itself; each field is written by the main thread only, and whole.

    Attributes: as of Heartbeat, and
        step_started: monotonic seconds, 0 between steps.
    """

    def __init__(self, epoch: int) -> None:
        self.epoch, self.phase = epoch, "starting"
        self.step_started = 0.0
        self.bad_frames = self.unknown_aborts = self.cut_off = 0
        self.stats: Stats | None = None
        self.info: GroupInfo | None = None
        self.changed = threading.Event()

    def enter(self, phase: str) -> None:
        """Begin a phase; everybody hears of it at once."""
        _log.debug("engine process: %s", phase)
        self.phase = phase
        self.changed.set()

    def heartbeat(self) -> Heartbeat:
        """The present state."""
        now, started, phase = time.monotonic(), self.step_started, self.phase
        return Heartbeat(
            epoch=self.epoch, pid=os.getpid(), phase=phase, progress=PROGRESS[phase], sent=now,
            step_seconds=now - started if started else 0.0, bad_frames=self.bad_frames, unknown_aborts=self.unknown_aborts,
            cut_off=self.cut_off, stats=self.stats, info=self.info)


class Heart:
    """Starts to beat when made, and beats until the process ends.

    Args:
        context: of ZeroMQ. directory: of the sockets. vitals: what to say.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", directory: str, vitals: Vitals) -> None:
        self._vitals = vitals
        self._socket = context.socket(zmq.PUB)  # whoever does not listen misses heartbeats, and nobody waits
        self._socket.bind(heartbeat_address(directory))
        threading.Thread(target=self._beat, name="octavo-heart", daemon=True).start()

    def _beat(self) -> None:
        vitals = self._vitals
        while True:
            vitals.changed.clear()
            try:
                self._socket.send(encode_heartbeat(vitals.heartbeat()), zmq.NOBLOCK)
            except zmq.ContextTerminated:
                self._socket.close()
                return
            time.sleep(PAUSE)
            vitals.changed.wait(INTERVAL - PAUSE)
