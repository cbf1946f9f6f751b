"""RunDirectory: the private folder of a running server, where its sockets lie.

Owns the folder's place, its lock and its removal; it does not know the sockets. The folder itself is locked (flock) as long
as its owner lives, and the kernel unlocks it when the owner dies in whatever way: that is how the next server of the same
user tells a folder that was left behind from one that is in use. Programs that tidy up /tmp respect the same lock. An owner
that is killed cannot remove its folder, and the kernel kills its children with it: a shell of a line does, when its input ends.

Invariant: a folder of ours that is not locked belongs to nobody.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from octavo.errors import ConfigError

PREFIX = "octavo-server-"
LONGEST_PATH = 107 - len("/engine-0000000000")
"""Bytes of a folder's path: a socket's whole path may have 107."""

_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class RunDirectory:
    """A fresh private folder (mode 0700); those that dead servers of this user have left in the same place are removed.

    Args:
        base: where to make it; default: $XDG_RUNTIME_DIR, the folder for temporary files or /tmp, the first that will do.

    Attributes:
        path: of the folder.

    Raises:
        ConfigError: there is no place for it.
    """

    def __init__(self, base: Path | None = None) -> None:
        base = base or _base()
        sweep(base)
        try:
            self.path, self._lock = _make(base)
        except OSError as error:
            raise ConfigError(f"no folder for sockets can be made in {base}: {error.strerror}.") from error
        self._heir = _heir(self.path)

    def close(self) -> None:
        """Remove the folder. Closing twice is allowed."""
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1
            if self._heir is not None:
                self._heir.communicate()


def _make(base: Path) -> tuple[Path, int]:
    while True:
        path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        with contextlib.suppress(FileNotFoundError):  # swept before it was locked: another one
            lock = os.open(path, _FLAGS)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return path, lock
            os.close(lock)


def _heir(path: Path) -> subprocess.Popen[bytes] | None:
    """A process that removes the folder when this one is gone; None where there is no shell: then the next server does."""
    with contextlib.suppress(OSError):
        return subprocess.Popen(
            ["/bin/sh", "-c", 'trap "" HUP INT TERM; read -r _; rm -rf -- "$0"', path], stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={"PATH": os.defpath}, cwd="/", start_new_session=True)
    return None


def sweep(base: Path) -> list[Path]:
    """Remove what dead servers of this user have left in ``base``; returns what was removed."""
    removed = []
    with contextlib.suppress(OSError):
        for path in list(base.iterdir()):
            if path.name.startswith(PREFIX):
                with contextlib.suppress(OSError):
                    if _remove(path):
                        removed.append(path)
    return removed


def _remove(path: Path) -> bool:
    """Remove a folder if its owner is dead. Only what looks exactly like one of ours is touched."""
    lock = os.open(path, _FLAGS)
    try:
        info = os.fstat(lock)
        if info.st_uid != os.getuid() or stat.S_IMODE(info.st_mode) != 0o700:
            return False
        if not all(name == "heartbeat" or name.startswith(("engine-", "metrics-")) for name in os.listdir(lock)):
            return False
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # OSError: in use
        shutil.rmtree(path)
        return True
    finally:
        os.close(lock)


def _base() -> Path:
    for place in _places():
        if place.is_dir() and os.access(place, os.W_OK | os.X_OK) and len(os.fsencode(place)) + 24 <= LONGEST_PATH:
            return place
    raise ConfigError(f"no folder for sockets: {', '.join(map(str, _places()))} cannot be written, or their paths are too long.")


def _places() -> Iterator[Path]:
    if given := os.environ.get("XDG_RUNTIME_DIR"):
        yield Path(given)
    yield Path(tempfile.gettempdir())
    yield Path("/tmp")
