"""Child processes that cannot outlive their parent: both ends of the bond.

The parent's end (``Child``) is a thread per process, which starts it and waits for its end. The child's end (``attach``) takes
the start message from the standard input; afterwards an end of file there means that the parent is gone or has let go, and
ends the process at once. The kernel's parent-death signal does the same for a process that cannot run Python any more; it is
bound to the *thread* that started the process, which is why that thread lives as long as the child.

Owns processes, pipes and exit codes; it does not know what the processes do. Invariant: a child ends when its parent
process ends, in whatever way, and the parent learns of each end of a child exactly once.
"""

import contextlib
import ctypes
import os
import signal
import site
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from octavo.log import get_logger

EXIT_CONFIG = 1
EXIT_ENGINE_DEAD = 70
EXIT_DEVICE_LOST = 71

_LENGTH = struct.Struct("<I")
_PR_SET_PDEATHSIG = 1
_log = get_logger(__name__)


class Notice(msgspec.Struct):
    """Child -> parent, a line on the child's standard output.

    Attributes:
        ready: the child works. failed: one sentence, for people, on why it will end.
    """

    ready: bool = False
    failed: str | None = None


class Child:
    """A process that ends with this one.

    Args:
        command: what to run; its process has to call ``attach``. start: bytes that ``attach`` returns there.
        pass_fds: descriptors that the child inherits under their numbers.
        on_notice: called in the watching thread for every notice.
        on_exit: called in the watching thread with the exit code, negative for a signal, as the last of all calls.

    Attributes:
        pid: of the process, 0 until it runs and where it could not be started (that is exit code 127).
    """

    def __init__(self, command: Sequence[str], start: bytes, *, pass_fds: Sequence[int] = (),
                 on_notice: Callable[[Notice], None], on_exit: Callable[[int], None]) -> None:
        self._command, self._start, self._pass_fds = list(command), start, tuple(pass_fds)
        self._on_notice, self._on_exit = on_notice, on_exit
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()  # nobody signals a process that has been waited for
        self._ended = False
        self.pid = 0
        started = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(started,), name="octavo-child", daemon=True)
        self._thread.start()
        started.wait()

    def let_go(self) -> None:
        """Close the child's standard input: it ends by itself."""
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        with self._lock:
            if self._process is not None and not self._ended:
                os.kill(self._process.pid, number)

    def join(self, timeout: float) -> bool:
        """Wait for the end; whether it has come. ``on_exit`` has returned then."""
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _watch(self, started: threading.Event) -> None:
        try:
            # A session of its own: Ctrl-C in a terminal reaches the parent only, which knows what to do.
            process = self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=self._pass_fds, start_new_session=True,
                env=_environment())
        except OSError:
            _log.exception("cannot start %s", self._command[:3])
            started.set()
            self._on_exit(127)
            return
        self.pid = process.pid
        started.set()
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError, ValueError):  # it has ended already, or was let go
            process.stdin.write(_LENGTH.pack(len(self._start)) + self._start)
            process.stdin.flush()
        for line in process.stdout:
            try:
                notice = msgspec.json.decode(line, type=Notice)
            except msgspec.MsgspecError:
                _log.error("process %d wrote on its standard output, which is not for that: %.200r", process.pid, line)
                continue
            self._on_notice(notice)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its number stays taken until nobody can signal it
        with self._lock:
            self._ended = True
            code = process.wait()
        process.stdout.close()
        self.let_go()
        self._on_exit(code)


def python(module: str) -> list[str]:
    """The command that runs a module of this package in a Python like this one; files in the working directory are no modules."""
    return [sys.executable, "-P", "-m", module]


def _environment() -> dict[str, str]:
    """This process's, with this package on the path where it is not installed but was found in some folder."""
    root = str(Path(__file__).resolve().parents[2])
    if root in map(os.path.realpath, [*site.getsitepackages(), site.getusersitepackages()]):
        return dict(os.environ)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


class Parent:
    """The child's view of its parent; see ``attach``.

    Attributes:
        start: the bytes that ``Child`` was given.
    """

    def __init__(self, start: bytes, notices: BinaryIO) -> None:
        self.start, self._notices = start, notices

    def notify(self, notice: Notice) -> None:
        """Tell the parent something; a parent that is gone is no error."""
        with contextlib.suppress(OSError):
            self._notices.write(msgspec.json.encode(notice) + b"\n")
            self._notices.flush()


def attach() -> Parent:
    """Take the start message, and from now on end with the parent. To be called once, first of all.

    Interrupts and polite requests to end are left to the parent, which gets them too: from a terminal, or from a manager of
    services that signals all processes of a service. What was standard output and is written to by a library goes to
    standard error.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        _log.warning("the kernel knows no parent-death signal: a hung process could outlive its parent")
    # A parent that died before this line is noticed here: its end of the pipe is closed.
    bond = os.fdopen(os.dup(0), "rb", buffering=0)
    notices = os.fdopen(os.dup(1), "wb")
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(2, 1)
    (length,) = _LENGTH.unpack(_read(bond, _LENGTH.size))
    start = _read(bond, length)
    threading.Thread(target=_end_with_parent, args=(bond,), name="octavo-parent", daemon=True).start()
    return Parent(start, notices)


def _read(pipe: BinaryIO, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = pipe.read(size - len(data))
        if not piece:
            sys.exit(0)  # nobody is there who would want a message
        data += piece
    return data


def _end_with_parent(bond: BinaryIO) -> None:
    with contextlib.suppress(OSError):
        while bond.read(4096):
            pass
    os._exit(0)
