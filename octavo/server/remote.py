"""EngineClient: the engine, as an API process sees it: add and abort go out, steps, refusals and heartbeats come in.

Owns the sockets of one API process and what the heartbeats said last; it does not know text, HTTP, or who starts engine
processes. A *link* is one connection to one engine process, under a name that is never used again: after an engine's end,
or when this process was cut off because it did not read, a new link begins, and nothing that was sent over an old one
counts any more.

Invariant: nothing here blocks or raises into the event loop. Each link that carried something ends with one ``on_lost``,
after which no step of it is reported.
"""

import asyncio
import math
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import zmq

from octavo.engine.stats import Stats
from octavo.errors import EngineDown, RequestError
from octavo.log import get_logger
from octavo.messages import EngineRequest, StepOutput
from octavo.plan import GroupInfo
from octavo.server.ipc import (
    ALIVE,
    PARTS,
    Abort,
    Add,
    BadFrame,
    CutOff,
    Heartbeat,
    Refused,
    decode_heartbeat,
    decode_output,
    encode_request,
    engine_address,
    heartbeat_address,
)

MAX_UNSENT = 8192
"""Messages that wait here when the engine process takes in nothing; beyond, requests are refused."""

MAX_UNREAD = 64
"""Steps that may lie in the socket here, as in the engine's (see MAX_WAITING of supervisor.py), before the engine waits."""

FRAMES_PER_TURN, SECONDS_PER_TURN = 16, 0.004
"""Steps that are read, and how long at most, before the event loop gets its turn: hundreds of streams take milliseconds each."""

ENDED = "The engine has ended."
CUT_OFF = "The engine's answers were not read in time."

_log = get_logger(__name__)


class EngineClient:
    """Made inside the event loop in which the callbacks are called.

    Args:
        directory: of the server's sockets. client_id: number of this API process.
        on_step: gets the news of this client's requests, once per step that has some.
        on_refused: gets a request id and why the engine did not take it.
        on_lost: everything that is open has failed; the message is fit for users.
        on_heartbeat: called after each heartbeat, with the phase, stats and counters in place.

    Attributes:
        prefix: begins with it, and a request id differs from those of all other API processes.
        phase, progress, info, stats: of the last heartbeat; info and stats are there when the phase is "ready". It is
            "down" between an engine's end and the first heartbeat of the next.
        epoch: counts engine processes from 0, -1 before the first heartbeat.
        last: that heartbeat whole, for its counters.
        bad_frames: messages from the engine that could not be read (a bug).
    """

    def __init__(self, directory: Path, client_id: int, *, on_step: Callable[[StepOutput], None],
                 on_refused: Callable[[str, RequestError], None], on_lost: Callable[[str], None],
                 on_heartbeat: Callable[[], None] = lambda: None) -> None:
        self._directory, self._client_id = str(directory), client_id
        self._on_step, self._on_refused, self._on_lost, self._on_heartbeat = on_step, on_refused, on_lost, on_heartbeat
        self.prefix = f"{client_id}.{os.urandom(3).hex()}."
        self.phase, self.progress, self.epoch, self.bad_frames = "starting", 0.0, -1, 0
        self.info: GroupInfo | None = None
        self.stats: Stats | None = None
        self.last: Heartbeat | None = None
        self._beat, self._lost = time.monotonic(), 0.0
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[bytes] = deque()
        self._flushing = self._used = self._reading = False
        self._link: zmq.Socket[bytes] | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._hearing: zmq.Socket[bytes] = self._context.socket(zmq.SUB)
        self._hearing.subscribe(b"")
        self._hearing.set(zmq.LINGER, 0)
        self._hearing.set(zmq.RECONNECT_IVL, 20)
        # The heartbeats' connection breaks when the engine process ends: the kernel says so at once.
        self._breaks = self._hearing.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._hearing.connect(heartbeat_address(self._directory))
        self._loop.add_reader(self._hearing.fileno(), self._hear)
        self._loop.add_reader(self._breaks.fileno(), self._hear)
        self._loop.call_soon(self._hear)

    @property
    def ready(self) -> bool:
        """True while requests are taken."""
        return self.phase == "ready"

    @property
    def num_unsent(self) -> int:
        """Messages that wait here because the engine process takes in nothing."""
        return len(self._unsent)

    def heartbeat_age(self) -> float:
        """Seconds since the engine process last said that it lives, or since this object was made or an engine ended."""
        return time.monotonic() - self._beat

    def step_age(self) -> float:
        """Seconds for which the present step has been computing, 0 between steps."""
        if self.last is None or not self.last.step_seconds:
            return 0.0
        return self.last.step_seconds + self.heartbeat_age()

    def add(self, request: EngineRequest) -> None:
        """Send a request with what else is sent in this turn of the event loop.

        Raises:
            EngineDown: no engine takes requests. RequestError: the request cannot be sent; see encode_request.
        """
        if not self.ready:
            raise EngineDown(f"the engine is not ready (phase {self.phase}).")
        if len(self._unsent) >= MAX_UNSENT:
            raise EngineDown("the engine takes in nothing.")
        self._send(encode_request(Add(request)))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one continuation of it; an end that the engine already knows of is no error."""
        if self.ready:
            self._send(encode_request(Abort(request_id, index)))

    def close(self) -> None:
        """Leave; the engine aborts what is open. Closing twice is allowed."""
        if self._context.closed:
            return
        self._loop.remove_reader(self._hearing.fileno())
        self._loop.remove_reader(self._breaks.fileno())
        self._unlink()
        self._hearing.disable_monitor()
        self._hearing.close(linger=0)
        self._breaks.close(linger=0)
        self._context.term()
        self.phase = "down"

    # -- heartbeats ----------------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        """Take in what the monitor and the heart have said. A break comes before the heartbeats of the next engine."""
        while not self._context.closed and int(self._breaks.get(zmq.EVENTS)) & zmq.POLLIN:
            self._breaks.recv_multipart()
            self._lose(ENDED)
        while not self._context.closed and int(self._hearing.get(zmq.EVENTS)) & zmq.POLLIN:
            try:
                heartbeat = decode_heartbeat(self._hearing.recv())
            except BadFrame:
                self.bad_frames += 1
                continue
            # What an engine said before its end may come after its end; what it says later is a broken connection, mended.
            if heartbeat.epoch > self.epoch or (heartbeat.epoch == self.epoch and heartbeat.sent > self._lost):
                self._take(heartbeat)

    def _take(self, heartbeat: Heartbeat) -> None:
        if self._link is None or heartbeat.epoch != self.epoch:
            self._lose(ENDED)
            self.epoch = heartbeat.epoch
            self._connect()
        self.last, self._beat = heartbeat, heartbeat.sent
        self.phase, self.progress = heartbeat.phase, heartbeat.progress
        self.info, self.stats = heartbeat.info, heartbeat.stats
        self._call(self._on_heartbeat)

    def _lose(self, message: str) -> None:
        """The engine process is gone."""
        if self._link is None:
            return
        self._read(self._link)  # what it had still said
        if self._link is None:  # a callback has closed this client
            return
        self._unlink()
        self.phase, self.progress, self.info, self.stats, self.last = "down", 0.0, None, None, None
        self._beat = self._lost = time.monotonic()
        self._end(message)

    # -- the link ------------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        link = self._link = self._context.socket(zmq.DEALER)
        link.set(zmq.IDENTITY, f"{self._client_id}-{os.urandom(8).hex()}".encode())
        link.set(zmq.LINGER, 0)
        link.set(zmq.RCVHWM, MAX_UNREAD)
        link.connect(engine_address(self._directory, self.epoch))
        self._loop.add_reader(link.fileno(), self._wake, link)

    def _unlink(self) -> None:
        if self._link is not None:
            self._loop.remove_reader(self._link.fileno())
            self._link.close(linger=0)
            self._link = None
        self._reading = False
        self._unsent.clear()

    def _end(self, message: str) -> None:
        if self._used:
            self._used = False
            self._call(self._on_lost, message)

    def _send(self, data: bytes) -> None:
        self._unsent.append(data)
        self._used = True
        if not self._flushing:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        link = self._link
        if link is None:
            return
        while self._unsent:
            parts = [self._unsent.popleft() for _ in range(min(PARTS, len(self._unsent)))]
            try:
                link.send_multipart(parts, zmq.NOBLOCK)
            except zmq.Again:  # the descriptor says when there is room again
                self._unsent.extendleft(reversed(parts))
                break
        self._wake(link)  # sending may have eaten the one signal that something has come

    def _wake(self, link: "zmq.Socket[bytes]") -> None:
        """The descriptor changed, once: look at all that it may have meant, unless that is about to be done anyway."""
        if link is not self._link or self._reading:
            return
        if self._read(link, FRAMES_PER_TURN, SECONDS_PER_TURN):
            self._reading = True
            self._loop.call_soon(self._read_on, link)
        elif link is self._link and self._unsent and not self._flushing and int(link.get(zmq.EVENTS)) & zmq.POLLOUT:
            self._flushing = True
            self._loop.call_soon(self._flush)

    def _read_on(self, link: "zmq.Socket[bytes]") -> None:
        if link is self._link:
            self._reading = False
            self._wake(link)

    def _read(self, link: "zmq.Socket[bytes]", most: int = 1 << 30, seconds: float = math.inf) -> bool:
        """Take in up to ``most`` messages, and after some seconds no further one; whether there may be more."""
        until = time.monotonic() + seconds
        for _ in range(most):
            if link is not self._link or not int(link.get(zmq.EVENTS)) & zmq.POLLIN:
                return False
            data = link.recv(zmq.NOBLOCK)
            if data == ALIVE:
                continue
            try:
                message = decode_output(data)
            except BadFrame as error:  # something is missing now, and nobody knows from which answer
                _log.error("the engine said what cannot be read: %s", error)
                self.bad_frames += 1
                self._begin_again(ENDED)
                return False
            if isinstance(message, CutOff):
                _log.warning("this process did not read what the engine said, and was cut off")
                self._begin_again(CUT_OFF)
                return False
            if isinstance(message, Refused):
                error_ = RequestError(message.message, message.param, message.code)
                self._call(self._on_refused, message.request_id, error_)
            else:
                self._call(self._on_step, message.output)
            if time.monotonic() > until:
                break
        return True

    def _call(self, callback: Callable[..., None], *args: object) -> None:
        """A bug of whoever is told must not cost others what comes after it."""
        try:
            callback(*args)
        except Exception:
            _log.exception("the news of a step could not be handed on")

    def _begin_again(self, message: str) -> None:
        """A new link to the same engine, which aborts what came over the old one."""
        self._unlink()
        self._connect()
        self._end(message)
