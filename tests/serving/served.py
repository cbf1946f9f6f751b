"""A real server in processes of its own, and what must hold for it whenever nobody asks it anything."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from web import KEY, OTHER_KEY, Reply, call, completion

ROOT = Path(__file__).parents[2]
LAUNCHER = Path(__file__).with_name("launch.py")
READY_SECONDS = 60.0
MAX_MODEL_LEN = 2048
BLOCKS = 512
"""Of 16 tokens: four requests of the greatest length."""
ROWS = 16
DESCRIPTORS = 5
"""How many more descriptors than before a process may hold at the end: pools that have grown."""


def wait_for(condition: Callable[[], Any], seconds: float, what: str = "this") -> Any:
    """Wait for a condition; returns its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what} has not come about in {seconds:g} s"
        time.sleep(0.01)
    return value


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for counts."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def descriptors(pid: int) -> int:
    """How many descriptors a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def memory(pid: int) -> int:
    """Bytes that are a process's own, in memory or swapped out."""
    text = Path(f"/proc/{pid}/status").read_text()
    return sum(1024 * int(value) for value in re.findall(r"^(?:RssAnon|VmSwap):\s+(\d+)", text, re.MULTILINE))


class Served:
    """A server; ``with`` it.

    Args:
        model: folder. options: of ``octavo serve``, beside those that keep it small. faults: see launch.py. blocks: of its
            pool. base: where its private folder is made, default a new one. log: descriptor that takes what it says about
            itself; with verbose all of that. environment: variables beside this process's.

    Attributes:
        port: where it listens. pid: of the first API process.
    """

    def __init__(self, model: Path, *options: str, faults: str = "", blocks: int = BLOCKS, base: Path | None = None,
                 log: int | None = None, verbose: bool = False, environment: dict[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="octavo-serving-"))
        self.log_path, self._out = self.folder / "log", self.folder / "out"
        self._seen = 0
        arguments = ["serve", str(model), "--port", "0", "--api-key", KEY, OTHER_KEY, "--max-model-len", str(MAX_MODEL_LEN),
                     "--num-gpu-blocks-override", str(blocks), "--max-num-seqs", str(ROWS), "--max-num-batched-tokens", "256",
                     "--swap-space", "0", "--batch-invariant", "--served-model-name", "tiny", *options]
        # One thread: the model is too small for two, and two wait for each other where other programs compute as well.
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_RUNTIME_DIR": str(base or self.folder), **(environment or {})}
        if verbose:
            variables["OCTAVO_LOGGING_LEVEL"] = "DEBUG"
        with open(self._out, "wb") as out, open(self.log_path, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, str(LAUNCHER), faults, str(self.folder / "look"), *arguments], stdin=subprocess.DEVNULL,
                stdout=out, stderr=file if log is None else log, env=variables, cwd=ROOT, start_new_session=True)
        self.pid = self.process.pid
        try:
            found = wait_for(lambda: re.search(r"listens on http://[^:]+:(\d+)", self._out.read_text()) or self._ended(),
                             READY_SECONDS, "an open port")
            self.port = int(found[1])
            self.wait_ready()
        except BaseException:
            self.close()
            raise

    def _ended(self) -> None:
        assert self.process.poll() is None, f"the server has ended:\n{self.log()[-3000:]}"

    def wait_ready(self, seconds: float = READY_SECONDS) -> None:
        """Wait until it takes requests; the first time also remember what must not change from then on."""
        wait_for(lambda: self._ended() or self.ask_status("/readyz") == 200, seconds, "readiness")
        if not hasattr(self, "canary"):
            self.canary = self.sing()
            self.engine_pid = self.look()["engine_pid"]
            self._descriptors = [descriptors(pid) for pid in (self.pid, self.engine_pid)]

    def __enter__(self) -> "Served":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def ask(self, path: str = "/v1/completions", body: Any = None, **options: Any) -> Reply:
        """One call, from code that does nothing else meanwhile."""
        return asyncio.run(call(self.port, path, body, **options))

    def ask_status(self, path: str) -> int:
        """Of a probe, from a coroutine: over in no time."""
        with socket.create_connection(("127.0.0.1", self.port), 5.0) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n".encode())
            return int(sock.recv(4096).split(b" ")[1])

    def sing(self) -> list[int]:
        """The canary: the same request, whose answer must be the same as long as the model is."""
        reply = self.ask(body=completion())
        assert reply.status == 200, reply
        ids: list[int] = reply.token_ids[0]
        assert len(ids) == 16
        return ids

    def look(self) -> dict[str, Any]:
        """The server's counters; see launch.py."""
        while True:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(5.0)
                sock.connect(str(self.folder / "look"))
                data = b""
                while piece := sock.recv(65536):
                    data += piece
            if data:
                found: dict[str, Any] = json.loads(data)
                return found

    def busy(self, since: float = 0.0) -> dict[str, int]:
        """Which counters say that something is open; what the engine said before ``since`` (monotonic) does not count."""
        seen = self.look()
        counters = seen["front"] | (seen["engine"] if seen["beat"] >= since else {"silent engine": 1})
        return {name: count for name, count in counters.items() if count}

    def log(self) -> str:
        """What the server's processes have written about themselves."""
        return self.log_path.read_text(errors="replace")

    def settle(self, *, restarted: bool = False, errors: bool = False, within: float = 3.0) -> None:
        """Check what must hold after every case.

        Args:
            restarted: the engine process is another one than before. errors: exceptions in the log are expected.
            within: seconds until nothing may be open any more.
        """
        assert self.process.poll() is None, self.log()[-3000:]
        for path in ("/livez", "/readyz"):
            reply = self.ask(path, method="GET", patience=1.0, key=None)
            assert reply.status == 200, (path, reply)
        pid = self.look()["engine_pid"]
        assert (pid != self.engine_pid) is restarted
        self.engine_pid = pid
        began = time.monotonic()
        assert self.sing() == self.canary
        while busy := self.busy(began):  # with the canary, the engine says again what it does
            assert time.monotonic() < began + within, f"still open after {within} s: {busy}"
            time.sleep(0.005)
        log = self.log()
        new, self._seen = log[self._seen :], len(log)
        assert errors or "Traceback" not in new, new[-3000:]

    def check_descriptors(self) -> None:
        """No process holds more than it did when it was ready, give or take a pool."""
        wait_for(lambda: self.look()["connections"] == 0, 10.0, "the end of all connections")
        now = [descriptors(pid) for pid in (self.pid, self.engine_pid)]
        assert all(new <= old + DESCRIPTORS for new, old in zip(now, self._descriptors, strict=True)), (self._descriptors, now)

    def siblings(self) -> list[int]:
        """Process ids of the other API processes."""
        return [pid for pid in self.children() if b"octavo.server.main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def children(self) -> list[int]:
        """Process ids of what the first process has started."""
        return [int(pid) for task in Path(f"/proc/{self.pid}/task").iterdir()
                for pid in (task / "children").read_text().split()]

    def end(self, number: int = signal.SIGTERM, seconds: float = 40.0) -> int:
        """Signal it and wait; its exit code."""
        self.process.send_signal(number)
        return self.process.wait(seconds)

    def close(self) -> None:
        """End it without asking."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
