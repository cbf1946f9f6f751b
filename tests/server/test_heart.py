"""The heart beats whatever the main thread does."""

import os
import time
from pathlib import Path

import zmq
from border import LoopThread
from fakes import Bench

from octavo.server import heart
from octavo.server.heart import PROGRESS, Heart, Vitals
from octavo.server.ipc import decode_heartbeat, heartbeat_address


def test_heartbeats_come_by_themselves_and_with_every_phase(tmp_path: Path) -> None:
    context, vitals = zmq.Context(), Vitals(3)
    Heart(context, str(tmp_path), vitals)
    listener = context.socket(zmq.SUB)
    listener.subscribe(b"")
    listener.connect(heartbeat_address(str(tmp_path)))
    first = decode_heartbeat(listener.recv())
    assert (first.epoch, first.pid, first.phase, first.step_seconds, first.stats) == (3, os.getpid(), "starting", 0.0, None)
    second = decode_heartbeat(listener.recv())
    assert second.sent - first.sent > heart.INTERVAL / 2 and second.sent <= time.monotonic()
    for phase in list(PROGRESS)[1:]:
        vitals.enter(phase)
        while (beat := decode_heartbeat(listener.recv())).phase != phase:
            pass
        assert beat.progress == PROGRESS[phase]
    vitals.step_started = time.monotonic() - 7.0
    while (beat := decode_heartbeat(listener.recv())).step_seconds == 0.0:
        pass
    assert 7.0 <= beat.step_seconds < 67.0
    listener.close(0)
    vitals.changed.set()
    context.term()


def test_what_is_published_does_not_change_with_the_engine(tmp_path: Path) -> None:
    bench = Bench()
    with LoopThread(bench.engine, tmp_path) as thread:
        stats = thread.vitals.stats
        assert stats is not bench.engine.stats and stats.finished is not bench.engine.stats.finished
        assert stats == bench.engine.stats
