"""The private folder: private, short, and swept only when its owner is dead."""

import asyncio
import fcntl
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from border import gone, until

from octavo.errors import ConfigError
from octavo.server.rundir import LONGEST_PATH, RunDirectory, sweep


def abandoned(base: Path, name: str = "octavo-server-dead", *, mode: int = 0o700) -> Path:
    path = base / name
    path.mkdir(mode=mode)
    path.chmod(mode)
    (path / "heartbeat").touch()
    (path / "engine-0").touch()
    return path


def test_a_folder_is_private_and_goes_away(tmp_path: Path) -> None:
    folder = RunDirectory(tmp_path)
    assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700 and folder.path.parent == tmp_path
    folder.close()
    folder.close()
    assert not folder.path.exists()


def test_what_a_dead_server_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    dead = abandoned(tmp_path)
    folder = RunDirectory(tmp_path)
    assert not dead.exists() and folder.path.exists()
    folder.close()


OWNER = """
import signal, sys
from pathlib import Path
from octavo.server.rundir import RunDirectory
folder = RunDirectory(Path(sys.argv[1]))
(folder.path / "engine-0").touch()
print(folder.path, folder._heir.pid, flush=True)
signal.pause()
"""


def ignores(pid: int, number: int) -> bool:
    """Whether a process ignores a signal."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigIgn:"))
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


def test_the_folder_of_a_killed_server_goes_with_it_and_no_other(tmp_path: Path) -> None:
    mine = RunDirectory(tmp_path)
    owner = subprocess.Popen([sys.executable, "-c", OWNER, tmp_path], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    path, heir = owner.stdout.readline().split()
    asyncio.run(until(lambda: ignores(int(heir), signal.SIGTERM)))
    os.kill(int(heir), signal.SIGTERM)  # a manager of services that signals all processes, before it kills
    assert Path(path).exists()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    asyncio.run(until(lambda: not Path(path).exists() and gone(int(heir)), 5.0))
    assert list(tmp_path.iterdir()) == [mine.path]
    mine.close()
    assert mine._heir is not None and mine._heir.returncode == 0


def test_without_a_shell_the_folder_is_left_to_the_next_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "Popen", absent)
    folder = RunDirectory(tmp_path)
    folder.close()
    assert not folder.path.exists()


def test_folders_in_use_stay(tmp_path: Path) -> None:
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    assert sweep(tmp_path) == [] and first.path.exists() and second.path.exists()
    first.close()
    second.close()


def test_only_what_is_ours_is_touched(tmp_path: Path) -> None:
    abandoned(tmp_path, "other-name")
    abandoned(tmp_path, "octavo-server-open", mode=0o755)
    (abandoned(tmp_path, "octavo-server-notes") / "notes.txt").write_text("mine")
    (tmp_path / "octavo-server-file").touch()
    (tmp_path / "octavo-server-link").symlink_to(abandoned(tmp_path, "target"))
    locked = abandoned(tmp_path, "octavo-server-locked")
    lock = os.open(locked, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert sweep(tmp_path) == []
    os.close(lock)
    assert sweep(tmp_path) == [locked]


def test_a_folder_that_was_swept_before_it_was_locked_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def swept(descriptor: int, operation: int) -> None:
        made.append(max(tmp_path.iterdir()))
        if len(made) == 1:
            made[0].rmdir()

    monkeypatch.setattr(fcntl, "flock", swept)
    folder = RunDirectory(tmp_path)
    assert len(made) == 2 and folder.path == made[1] and folder.path.exists()
    folder.close()


def test_the_first_place_that_will_do_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    folder = RunDirectory()
    assert folder.path.parent == tmp_path
    folder.close()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "absent"))
    folder = RunDirectory()
    assert folder.path.parent != tmp_path
    folder.close()
    long = tmp_path / ("x" * LONGEST_PATH)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    folder = RunDirectory()
    assert len(os.fsencode(folder.path)) <= LONGEST_PATH
    folder.close()


def test_no_place_is_the_operators_problem(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder for sockets"):
        RunDirectory(tmp_path / "absent")
