"""A server of one's own ends with its parent, even with one that dies while it starts."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

from octavo.client import private
from octavo.client.connection import Client
from octavo.client.private import PrivateServer
from octavo.errors import OctavoError

MARK = "import pathlib, sys\npathlib.Path(sys.argv[1]).touch()\n"


def start(mark: Path) -> PrivateServer:
    return PrivateServer([], [sys.executable, "-c", MARK, str(mark)])


def test_a_command_runs_as_the_server_and_its_folder_goes(tmp_path: Path) -> None:
    with start(tmp_path / "mark") as server:
        assert server._process.wait(30.0) == 0
    assert (tmp_path / "mark").exists() and not server._folder.path.exists()


def test_without_its_parent_it_does_not_even_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.getppid
    monkeypatch.setattr(private.os, "getppid", lambda: real() + 1)  # as if another process had taken the child in
    with start(tmp_path / "mark") as server:
        assert server._process.wait(30.0) != 0

        async def ready() -> None:
            await server.ready(Client(server.address))

        with pytest.raises(OctavoError, match="could not start"):
            asyncio.run(ready())
    assert not (tmp_path / "mark").exists()
