"""``octavo serve`` for tests, with two things more that the program itself does not have: faults, and a look inside.

``python launch.py FAULTS SOCKET serve MODEL ...``. FAULTS: see octavo/server/faults.py, "" for none; of the first engine
process only, so that the next one is sound. SOCKET: a Unix socket that answers each connection with the counters of the
first API process, as JSON.
"""

import json
import socket
import sys
import threading
from typing import Any

from octavo import cli
from octavo.engine.stats import Stats
from octavo.server import main
from octavo.server.api_process import ApiProcess
from octavo.server.supervisor import Supervisor


def look(front: ApiProcess, supervisor: Supervisor) -> dict[str, Any]:
    """What must be zero when nobody asks anything, and what tells who serves."""
    service, client, door = front.service, front.client, front.service.admission
    beat = client.last
    stats = Stats() if beat is None or beat.stats is None else beat.stats
    return {
        "front": {
            "tickets": len(door.tickets), "waiting": door.waiting, "tokens": door.tokens, "bytes": door.bytes,
            "streams": len(service._streams), "collected": len(service._collector), "jobs": service._num_jobs,
            "unsent": client.num_unsent},
        "engine": {name: getattr(stats, name) for name in ("running", "waiting", "swapped", "compiling", "kv_used")},
        "beat": 0.0 if beat is None or beat.stats is None else beat.sent, "bad_frames": 0 if beat is None else beat.bad_frames,
        "engine_pid": supervisor.engine_pid, "epoch": client.epoch, "directory": str(supervisor.directory),
        "prompt_tokens": stats.prompt_tokens, "generated_tokens": stats.generated_tokens,
        "preempted": stats.preempted_recompute + stats.preempted_swap, "dropped": service.num_dropped,
        "connections": len(front._http.server_state.connections),
    }


def show(path: str, front: ApiProcess, supervisor: Supervisor) -> None:
    """Answer everybody who connects, from a thread: a look inside must not depend on the event loop."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    sock.listen(16)
    while True:
        connection, _ = sock.accept()
        with connection:
            try:
                connection.sendall(json.dumps(look(front, supervisor)).encode())
            except (RuntimeError, OSError):  # a dictionary changed under our eyes, or the asker is gone: ask again
                continue


def run(faults: str, path: str, arguments: list[str]) -> int:
    """Serve, watched."""
    supervisors: list[Supervisor] = []

    class Faulty(Supervisor):
        _faults = faults

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            supervisors.append(self)

        def start(self) -> None:
            super().start()
            self._faults = ""  # the start message of the first process is on its way

    class Shown(ApiProcess):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            threading.Thread(target=show, args=(path, self, supervisors[0]), daemon=True).start()

    main.Supervisor, main.ApiProcess = Faulty, Shown  # type: ignore[misc]
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2], sys.argv[3:]))
