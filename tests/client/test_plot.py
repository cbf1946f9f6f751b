"""The picture: it is drawn, and what stands in its way is said before anything is measured."""

import sys
from pathlib import Path

import pytest

from octavo.client.load import Record
from octavo.client.plot import check_path, draw
from octavo.client.wire import ConnectionFailed
from octavo.errors import ConfigError

RECORDS = [Record(0.0, 4, 0.1, [0.05, 0.1], 0.3, 3), Record(0.5, 4, 0.9, [], 0.9, 1),
           Record(0.0, 4, failure=ConnectionFailed("gone"))]


def test_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "run.png"
    check_path(str(path))
    draw(str(path), "model: 3 requests", RECORDS)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10000


def test_what_stands_in_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"plot must name a \.png"):
        check_path("run.gif")
    with pytest.raises(ConfigError, match="no request was answered"):
        draw(str(tmp_path / "a.png"), "t", RECORDS[2:])
    with pytest.raises(ConfigError, match="cannot be written"):
        draw(str(tmp_path / "none" / "a.png"), "t", RECORDS)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'octavo\[plot\]'"):
        check_path("run.png")
