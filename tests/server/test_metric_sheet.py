"""Sheets: rows keep their place, and survive who wrote them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from octavo.server import metric_sheet
from octavo.server.metric_sheet import CELLS, NAMES, SPARE, Sheet, add, read_folder, read_rows


def test_rows_keep_their_places() -> None:
    sheet = Sheet()
    one = sheet.row("a", ("x",))
    many = sheet.row("h", (), 5)
    assert sheet.row("a", ("x",)) == one and sheet.row("a", ("y",)) not in (one, many)
    sheet.cells[one] = 2.5
    sheet.cells[many + 4] += 7.0
    assert sheet.read() == {("a", ("x",)): [2.5], ("h", ()): [0.0, 0.0, 0.0, 0.0, 7.0], ("a", ("y",)): [0.0]}


def test_labels_may_be_anything(tmp_path: Path) -> None:
    labels = ('"\n\\', "ü€😀", "")
    sheet = Sheet(tmp_path / "metrics-0")
    sheet.cells[sheet.row("a", labels)] = 1.0
    assert read_folder(tmp_path, 1) == {0: {("a", labels): [1.0]}}


def test_a_file_outlives_a_process_that_was_killed(tmp_path: Path) -> None:
    code = """if True:
        import os, signal, sys
        from pathlib import Path
        from octavo.server.metric_sheet import Sheet
        sheet = Sheet(Path(sys.argv[1]) / "metrics-1")
        sheet.cells[sheet.row("a")] = 41.0
        sheet.cells[sheet.row("b", ("x",), 2) + 1] = 3.0
        os.kill(os.getpid(), signal.SIGKILL)"""
    assert subprocess.run([sys.executable, "-c", code, tmp_path], check=False).returncode == -signal.SIGKILL
    assert read_folder(tmp_path, 3) == {1: {("a", ()): [41.0], ("b", ("x",)): [0.0, 3.0]}}
    again = Sheet(tmp_path / "metrics-1")
    again.cells[again.row("a")] += 1.0
    assert again.row("c") not in (again.row("a"), again.row("b", ("x",), 2))
    assert read_folder(tmp_path, 3)[1]["a", ()] == [42.0]
    assert os.stat(tmp_path / "metrics-1").st_size == 8 * CELLS + NAMES


def test_a_full_sheet_takes_what_it_can_and_keeps_the_rest_apart(tmp_path: Path) -> None:
    sheet = Sheet(tmp_path / "metrics-0")
    places = [sheet.row("h", (str(i),), 30) for i in range(2000)]
    kept = [place for place in places if place >= SPARE]
    assert 100 < len(kept) < 2000 and len(set(kept)) == len(kept)
    for place in places:
        for cell in range(place, place + 30):
            sheet.cells[cell] += 1.0
    rows = sheet.read()
    assert len(rows) == len(kept) and all(values == [1.0] * 30 for values in rows.values())
    long = Sheet()
    assert long.row("n" * NAMES) == 2 and long.read() == {}


def test_bytes_that_are_no_sheet_have_no_rows(tmp_path: Path) -> None:
    assert read_rows(b"") == {} and read_rows(b"x" * 100) == {}
    (tmp_path / "metrics-0").write_bytes(b"{" * (8 * CELLS + NAMES))
    Sheet(tmp_path / "metrics-1").row("a")
    assert list(read_folder(tmp_path, 2)[1]) == [("a", ())]
    assert read_folder(tmp_path / "nowhere", 2) == {}
    assert metric_sheet.PREFIX == "metrics-"  # rundir.py removes such files with the folder


def test_rows_are_added() -> None:
    total: dict[metric_sheet.Key, list[float]] = {}
    add(total, ("a", ()), [1.0, 2.0])
    add(total, ("a", ()), [3.0, 4.0])
    assert total == {("a", ()): [4.0, 6.0]}
