"""Processes that cannot outlive their parent, tried with children of a few lines."""

import asyncio
import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from border import PATIENCE, gone, until

from octavo.server.child import Child, Notice, python

ATTACH = "from octavo.server.child import Notice, attach\nparent = attach()\n"
SLEEP = ATTACH + "import time\nparent.notify(Notice(ready=True))\nwhile True: time.sleep(1)\n"


class Watched:
    """A child with all that it said."""

    def __init__(self, code: str, start: bytes = b"", **options: object) -> None:
        self.notices: list[Notice] = []
        self.heard, self.ended = threading.Event(), threading.Event()
        self.code: int | None = None
        self.child = Child([sys.executable, "-c", code], start, on_notice=self._note, on_exit=self._exit, **options)

    def _note(self, notice: Notice) -> None:
        self.notices.append(notice)
        self.heard.set()

    def _exit(self, code: int) -> None:
        assert self.code is None
        self.code = code
        self.ended.set()


def test_the_start_message_arrives_whole_and_notices_come_back() -> None:
    start = bytes(range(256)) * 4096  # more than a pipe holds
    watched = Watched(ATTACH + "import hashlib, os\nparent.notify(Notice(failed=hashlib.sha256(parent.start).hexdigest()))\n"
                      "print('a library prints')\nos._exit(7)", start)
    assert watched.ended.wait(PATIENCE) and watched.code == 7
    assert [notice.failed for notice in watched.notices] == [hashlib.sha256(start).hexdigest()]


def test_a_child_that_is_let_go_ends() -> None:
    watched = Watched(SLEEP)
    assert watched.heard.wait(PATIENCE) and watched.code is None
    watched.child.let_go()
    assert watched.ended.wait(PATIENCE) and watched.code == 0
    assert watched.child.join(PATIENCE)
    watched.child.send_signal(signal.SIGKILL)  # no error, and nobody is hit


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_requests_to_end_are_left_to_the_parent(number: int) -> None:
    watched = Watched(SLEEP)
    assert watched.heard.wait(PATIENCE)
    assert os.getsid(watched.child.pid) != os.getsid(0)  # Ctrl-C in a terminal does not even come
    watched.child.send_signal(number)
    assert not watched.ended.wait(0.2)
    watched.child.send_signal(signal.SIGKILL)
    assert watched.ended.wait(PATIENCE) and watched.code == -signal.SIGKILL


def test_what_cannot_be_started_ends_at_once() -> None:
    ended = threading.Event()
    codes: list[int] = []
    child = Child(["/does/not/exist"], b"", on_notice=lambda notice: None, on_exit=lambda code: (codes.append(code), ended.set()))
    assert ended.wait(PATIENCE) and codes == [127] and child.pid == 0


def test_descriptors_are_inherited_on_request_only() -> None:
    kept, other = os.pipe()
    os.set_inheritable(other, True)
    code = ATTACH + f"import os\nos.write({other}, b'x')\nos._exit(0)"
    watched = Watched(code, pass_fds=(other,))
    assert watched.ended.wait(PATIENCE) and watched.code == 0 and os.read(kept, 1) == b"x"
    watched = Watched(code)
    assert watched.ended.wait(PATIENCE) and watched.code == 1
    os.close(kept)
    os.close(other)


PARENT = """
import sys, threading
from octavo.server.child import Child
ready = threading.Event()
child = Child([sys.executable, "-c", {code!r}], b"", on_notice=lambda notice: ready.set(), on_exit=lambda code: None)
ready.wait()
print(child.pid, flush=True)
threading.Event().wait()
"""
HUNG = ATTACH + """
parent.notify(Notice(ready=True))
import ctypes
ctypes.PyDLL(None).pause()  # holds the interpreter's lock: no thread of Python runs any more
"""


@pytest.mark.parametrize("code", [SLEEP, HUNG], ids=["sleeping", "hung"])
def test_no_child_survives_its_parent(code: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT.format(code=code)], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    asyncio.run(until(lambda: gone(pid), 5.0))


def test_a_child_survives_the_thread_that_made_it() -> None:
    made: list[Watched] = []
    thread = threading.Thread(target=lambda: made.append(Watched(SLEEP)))
    thread.start()
    thread.join()
    assert made[0].heard.wait(PATIENCE) and not made[0].ended.wait(0.2)
    made[0].child.let_go()
    assert made[0].ended.wait(PATIENCE)


def test_files_in_the_working_directory_are_no_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "msgspec.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    ended, codes = threading.Event(), []
    Child(python("octavo.server.child"), b"", on_notice=lambda notice: None,
          on_exit=lambda code: (codes.append(code), ended.set()))
    assert ended.wait(PATIENCE) and codes == [0]
