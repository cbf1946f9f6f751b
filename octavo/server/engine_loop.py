"""EngineLoop: what the engine process does all day: take in messages, compute a step, say what came of it.

Owns whose request is whose and the engine's socket; it does not know text, HTTP or how processes are started. Clients are
API processes. A client that is gone has its requests aborted. One that does not keep up is waited for, with everything: nothing
of an answer is lost, and what waits for a client is bounded. One that reads nothing for LAG_SECONDS counts as gone.

Invariant: nothing that arrives on the socket raises here; what cannot be used is dropped and counted. A request's news goes
to the client that sent it and to no other.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import zmq

from octavo.config import EngineConfig
from octavo.engine.engine import Engine
from octavo.engine.grammars import Grammars
from octavo.errors import EngineDead, RequestError
from octavo.log import get_logger
from octavo.messages import EngineRequest, StepOutput
from octavo.models.hub import resolve
from octavo.plan import Int32
from octavo.server import garbage
from octavo.server.faults import FaultyGroup
from octavo.server.heart import Vitals
from octavo.server.ipc import (
    ALIVE,
    Abort,
    Add,
    BadFrame,
    CutOff,
    Refused,
    Stepped,
    decode_request,
    encode_output,
    encode_request,
    is_abort,
)
from octavo.text.tokenizer import load_tokenizer
from octavo.worker.group import check_supported, for_serving, make_group
from octavo.worker.memory import resolve_device

INTAKE_SECONDS = 0.02
"""How long messages may be taken in between two steps: a thousand new requests do not stop those that run."""

MAX_BACKLOG = 20_000
"""New requests that may wait here; the rest waits in the socket."""

LAG_SECONDS = 5.0
"""How long the engine waits for an API process that does not read: as long as a stream may stand still."""

LAG_LOOK_MS = 1
"""Milliseconds between two looks at whether it reads again."""

LAG_WORTH_SAYING = 0.5
"""Seconds of waiting from which on the log has a line about it."""

LOOK_SECONDS = 1.0
"""How often the loop looks whether its clients are still there."""

STATS_SECONDS = 0.25

_log = get_logger(__name__)
_CUT_OFF = encode_output(CutOff())


def build(config: EngineConfig, vitals: Vitals, faults: str = "") -> Engine:
    """Start the workers and an engine over them, saying how far it is.

    Raises:
        ConfigError, ModelError: what does not fit, in one sentence.
    """
    check_supported(config)  # before anything is fetched
    config = for_serving(config)
    if resolve_device(config) == "cpu":
        _leave_a_core()
    vitals.enter("fetching")
    source = resolve(config)
    vitals.enter("loading")
    group = make_group(config, source)
    vitals.enter("preparing")
    engine = Engine(config, FaultyGroup(group, faults) if faults else group, seed=config.seed,
                    grammars=None if config.skip_tokenizer_init else Grammars(lambda: load_tokenizer(source, config)))
    vitals.info = group.info
    garbage.spare()
    return engine


def _leave_a_core() -> None:
    """Compute with one thread fewer than torch would, where there are more than two and nobody has said how many.

    The API process needs a core now and then, and every operator waits for its slowest thread: on 4 cores a step with four
    threads was found to take several times as long as one with three.
    """
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > 2:
        torch.set_num_threads(torch.get_num_threads() - 1)


@dataclass(slots=True)
class _Lag:
    """What waits for a client that does not keep up, and since when."""

    since: float
    unsent: deque[bytes]


class EngineLoop:
    """The loop around one engine.

    Args:
        engine: to be fed. socket: a bound ROUTER socket with ROUTER_MANDATORY, whose send limit says how much may wait for
            a client. vitals: gets the counters. clock: monotonic seconds.
    """

    def __init__(self, engine: Engine, socket: "zmq.Socket[bytes]", vitals: Vitals,
                 clock: Callable[[], float] = time.monotonic) -> None:
        self._engine, self._socket, self._vitals, self._clock = engine, socket, vitals, clock
        self._owners: dict[str, bytes] = {}
        self._open: dict[bytes, set[str]] = {}  # of clients with unfinished requests
        self._lagging: dict[bytes, _Lag] = {}  # clients for which no more can be sent at present
        self._cut: dict[bytes, bool] = {}  # clients that were cut off, and whether they have been told
        self._looked = self._counted = clock()
        self._backlog: deque[tuple[bytes, bytes]] = deque()  # new requests that no turn had time for
        self._gone: set[tuple[bytes, str]] = set()  # those of them that are not wanted any more
        self._places: tuple[list[tuple[str, int]], dict[bytes, Int32]] = ([], {})
        self._publish()

    def run(self) -> None:
        """Go on until the engine is dead.

        Raises:
            EngineDead: it is. Any other exception is a bug and means the same.
        """
        while True:
            self.turn()

    def turn(self) -> None:
        """Take in what has come, or wait for it where there is nothing else to do, and compute at most one step.

        No step is computed while a client lags: its news would have nowhere to go.
        """
        engine, vitals = self._engine, self._vitals
        behind = self._catch_up()
        if behind:
            self._socket.poll(LAG_LOOK_MS)
        elif not engine.has_work() and not self._backlog:
            self._publish()
            self._vitals.changed.set()  # idle: everybody hears of it now, not within a second
            self._socket.poll(int(1000 * LOOK_SECONDS) if self._cut else None)
        self._receive()
        if engine.has_work() and not behind:
            vitals.step_started = self._clock()
            out = engine.step()
            vitals.step_started = 0.0
            self._send(out)
        now = self._clock()
        if now - self._counted >= STATS_SECONDS:
            self._publish()
        if now - self._looked >= LOOK_SECONDS:
            self._look_after()

    def _publish(self) -> None:
        """Leave the counters for the heart, which must not look into the engine from its thread."""
        self._counted = self._clock()
        self._vitals.stats = self._engine.stats.copy()

    # -- in ------------------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Take what has come off the socket: aborts at once, new requests in order and for a limited time.

        An abort that stood in line behind a thousand new requests would let the engine work for clients that have left.
        """
        until = self._clock() + INTAKE_SECONDS
        backlog = self._backlog
        while len(backlog) < MAX_BACKLOG and int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            client, *parts = self._socket.recv_multipart()
            for part in parts:
                if is_abort(part):
                    self._take(client, part)
                else:
                    backlog.append((client, part))
        while backlog:
            self._take(*backlog.popleft())
            if self._clock() > until:
                return
        self._vitals.unknown_aborts += len(self._gone)
        self._gone.clear()

    def _take(self, client: bytes, part: bytes) -> None:
        try:
            message = decode_request(part)
        except BadFrame as error:
            self._vitals.bad_frames += 1
            _log.warning("a message of %d bytes was dropped: %.200s", len(part), error)
            return
        if client in self._cut:  # it does not know yet, and will learn that all it has sent is lost
            return
        if isinstance(message, Add):
            self._add(client, message.request)
        else:
            self._abort(client, message)

    def _add(self, client: bytes, request: EngineRequest) -> None:
        name = request.request_id
        try:
            self._engine.add(request)
        except RequestError as error:
            self._deliver(client, encode_output(Refused(name, str(error), error.param, error.code)))
        except EngineDead:
            raise
        except Exception:  # a bug, but of one request only: nothing has been computed
            _log.exception("a request could not be added")
            if name not in self._owners:
                self._engine.abort(name, report=False)
                refused = Refused(name, "The engine could not take the request.", None, "server_error")
                self._deliver(client, encode_output(refused))
        else:
            self._owners[name] = client
            self._open.setdefault(client, set()).add(name)
            if (client, name) in self._gone:
                self._gone.discard((client, name))
                self._engine.abort(name)

    def _abort(self, client: bytes, message: Abort) -> None:
        known = self._owners.get(message.request_id) == client
        if not known and self._backlog:  # it may stand there
            if message.index is None:
                self._gone.add((client, message.request_id))
            else:
                self._backlog.append((client, encode_request(message)))
        elif not (known and self._engine.abort(message.request_id, message.index)):
            self._vitals.unknown_aborts += 1

    # -- out -----------------------------------------------------------------------------------------------------------

    def _send(self, out: StepOutput) -> None:
        if _says(out):
            shares = dict.fromkeys(self._open, out) if len(self._open) == 1 else self._split(out)
            for client, share in shares.items():
                self._deliver(client, encode_output(Stepped(share)))
        for name in out.finished:
            client = self._owners.pop(name, b"")
            if (names := self._open.get(client)) is not None:
                names.discard(name)
                if not names:
                    del self._open[client]

    def _split(self, out: StepOutput) -> dict[bytes, StepOutput]:
        """Each client's share of a step's news; the numbers of tokens stay those of the whole step."""
        shares = {client: StepOutput(planned=out.planned, num_prompt_tokens=out.num_prompt_tokens,
                                     num_generated_tokens=out.num_generated_tokens) for client in self._open}
        nobody = StepOutput()  # reads what is said about requests whose client has just gone

        def share(name: str) -> StepOutput:
            return shares.get(self._owners.get(name, b""), nobody)

        if out.streamed is not self._places[0]:  # the engine makes the list anew only when other requests stream
            found: dict[bytes, list[int]] = {}
            for place, (name, _) in enumerate(out.streamed):
                found.setdefault(self._owners.get(name, b""), []).append(place)
            self._places = (out.streamed, {client: np.array(places, np.int32) for client, places in found.items()})
        for client, places in self._places[1].items():
            part = shares.get(client, nobody)
            part.streamed = [out.streamed[place] for place in places.tolist()]
            part.tokens = np.asarray(out.tokens)[places]
            part.logprobs = [out.logprobs[place] for place in places.tolist()] if out.logprobs else []
        for started in out.started:
            share(started[0]).started.append(started)
        for entries in out.prompt_logprobs:
            share(entries[0]).prompt_logprobs.append(entries)
        for end in out.ended:
            share(end.request_id).ended.append(end)
        for name in out.finished:
            share(name).finished.append(name)
        return {client: part for client, part in shares.items() if _says(part)}

    def _deliver(self, client: bytes, data: bytes) -> None:
        """Send without waiting; what finds no place follows later, and a client that is gone is forgotten."""
        if (lag := self._lagging.get(client)) is not None:
            lag.unsent.append(data)
        elif self._offer(client, data) is False and client not in self._cut:
            self._lagging[client] = _Lag(self._clock(), deque([data]))

    def _offer(self, client: bytes, data: bytes) -> bool | None:
        """Send if there is a place for it; whether there was, None if the client is gone."""
        try:
            self._socket.send_multipart((client, data), zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._lagging.pop(client, None)
            self._cut.pop(client, None)
            self._forget(client)
            return None
        return True

    def _catch_up(self) -> bool:
        """Send what waits for clients that lag; whether some of it still waits."""
        for client, lag in list(self._lagging.items()):
            while lag.unsent and self._offer(client, lag.unsent[0]):
                lag.unsent.popleft()
            seconds = self._clock() - lag.since
            if not lag.unsent:
                del self._lagging[client]
                if seconds > LAG_WORTH_SAYING:
                    _log.warning("the engine waited %.1f s for an API process that did not keep up", seconds)
            elif client in self._lagging and seconds > LAG_SECONDS:
                _log.warning("an API process does not read what the engine says: its %d requests are aborted",
                             len(self._open.get(client, ())))
                del self._lagging[client]
                self._vitals.cut_off += 1
                self._cut[client] = False
                self._forget(client)
        return bool(self._lagging)

    def _forget(self, client: bytes) -> None:
        for name in self._open.pop(client, ()):
            del self._owners[name]
            self._engine.abort(name, report=False)

    def _look_after(self) -> None:
        """Find clients that are gone, and tell those that were cut off as soon as they can hear it."""
        self._looked = self._clock()
        for client in self._open.keys() - self._lagging.keys():
            self._deliver(client, ALIVE)
        for client, told in list(self._cut.items()):
            if self._offer(client, ALIVE if told else _CUT_OFF):
                self._cut[client] = True


def _says(out: StepOutput) -> bool:
    """Whether there is something in it that a client wants to know."""
    return bool(out.streamed or out.ended or out.started or out.prompt_logprobs or out.finished)
