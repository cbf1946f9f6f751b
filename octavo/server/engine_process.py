"""The engine process: ``python -m octavo.server.engine_process``, started by the supervisor and by nobody else.

Owns the order of its life (bond with the parent, heart, engine, loop) and what its end means: exit code 1 for a mistake of
the operator, 71 when the device's context is lost, 70 for every other end of the engine. It does not know requests.
Invariant: it has said why, to its parent and in the log, before it ends with a code.
"""

import logging
import os
from collections.abc import Callable

import zmq

from octavo import log
from octavo.errors import ConfigError, DeviceLost
from octavo.server import ipc
from octavo.server.child import EXIT_CONFIG, EXIT_DEVICE_LOST, EXIT_ENGINE_DEAD, Notice, Parent, attach
from octavo.server.heart import Heart, Vitals

_HARD_LIMIT = 8 * ipc.MAX_FRAME
"""Bytes of a message that ZeroMQ itself refuses by breaking the link; shorter ones are counted where they are decoded."""

_log = log.get_logger("octavo.server.engine_process")


class EngineProcess:
    """This process. When it is made, the socket is bound and the heart beats.

    Attributes:
        config, faults, vitals: what the engine is built from. socket: where requests come in.
    """

    def __init__(self, parent: Parent) -> None:
        log.setup()
        log.detach()
        self._parent = parent
        start, self.config = ipc.decode_start(parent.start)
        self.faults, self.vitals = start.faults, Vitals(start.epoch)
        context = zmq.Context()
        self.socket: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
        self.socket.set(zmq.ROUTER_MANDATORY, 1)
        self.socket.set(zmq.SNDHWM, start.max_waiting)
        self.socket.set(zmq.MAXMSGSIZE, _HARD_LIMIT)
        self.socket.set(zmq.LINGER, 0)
        self.socket.bind(ipc.engine_address(start.directory, start.epoch))
        Heart(context, start.directory, self.vitals)

    def run(self, make: Callable[[], Callable[[], None]]) -> int:
        """Make the engine and run the loop over it, which ``make`` returns; returns the exit code."""
        try:
            loop = make()
        except ConfigError as error:
            return self._fail(str(error), EXIT_CONFIG)
        except Exception as error:
            _log.exception("the engine could not start")
            return self._fail(f"the engine could not start ({type(error).__name__}); the log says more.", EXIT_ENGINE_DEAD)
        self._parent.notify(Notice(ready=True))
        self.vitals.enter("ready")
        try:
            loop()
        except DeviceLost as error:
            _log.critical("the device is lost", exc_info=error)
            return self._fail(f"the engine has ended: {error}", EXIT_DEVICE_LOST)
        except Exception as error:
            _log.critical("the engine has ended", exc_info=error)
            return self._fail(f"the engine has ended ({type(error).__name__}); the log says more.", EXIT_ENGINE_DEAD)
        return 0

    def _fail(self, message: str, code: int) -> int:
        self._parent.notify(Notice(failed=message))
        return code


if __name__ == "__main__":
    process = EngineProcess(attach())
    # torch takes seconds on a cold disk; the heart beats already.
    from octavo.server.engine_loop import EngineLoop, build

    def make() -> Callable[[], None]:
        engine = build(process.config, process.vitals, process.faults)
        return EngineLoop(engine, process.socket, process.vitals).run

    code = process.run(make)
    logging.shutdown()
    os._exit(code)  # nothing is left that is worth waiting for, and a device that is lost may never answer
