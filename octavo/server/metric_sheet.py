"""Sheet: the numbers of one API process, in memory that its siblings can read.

With one API process the sheet is plain memory, with several each one's is a file in the server's private folder, mapped: a
number is written with one store and read without asking anybody. So a scrape that lands on any process sees all of them as
they are at that moment, never waits for one that is busy, stopped or dead, and loses nothing with one that dies: its file
stays, and the process that takes its place writes on where it ended.

Owns rows of floats under (name, labels); it does not know what they mean. Invariant: a row, once there, keeps its place as long
as the sheet exists; only its owner writes it.
"""

import contextlib
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

PREFIX = "metrics-"
CELLS = 16_384
NAMES = 128 << 10
"""Cells (floats), and bytes for the names of their rows. A sheet that is full drops new rows."""
SPARE = 64
"""Cells at the beginning that are written for rows that found no room; the first two say how far the sheet is filled."""

Key = tuple[str, tuple[str, ...]]


class _Entry(msgspec.Struct, array_like=True):
    name: str
    labels: tuple[str, ...]
    place: int
    size: int


_encoder, _decoder = msgspec.json.Encoder(), msgspec.json.Decoder(_Entry)


class Sheet:
    """A sheet to write on.

    Args:
        path: of its file, which may exist and is continued then; None for plain memory.

    Attributes:
        cells: the numbers. A row is ``cells[place : place + size]``.
    """

    def __init__(self, path: Path | None = None) -> None:
        if path is None:
            self._memory = mmap.mmap(-1, 8 * CELLS + NAMES)
        else:
            with path.open("a+b") as file:
                file.truncate(8 * CELLS + NAMES)
                self._memory = mmap.mmap(file.fileno(), 8 * CELLS + NAMES)
        self.cells: memoryview[float] = memoryview(self._memory)[: 8 * CELLS].cast("d")
        self._places = {(entry.name, entry.labels): entry.place for entry in _entries(self._memory[:])}
        self.cells[0] = max(self.cells[0], SPARE)

    def row(self, name: str, labels: tuple[str, ...] = (), size: int = 1) -> int:
        """The place of a row, which is made with zeros where it is new; ``size`` must not change."""
        key = (name, labels)
        if (place := self._places.get(key)) is None:
            place = self._places[key] = self._add(name, labels, size)
        return place

    def read(self) -> dict[Key, list[float]]:
        """All rows as they are now."""
        return read_rows(self._memory[:])

    def _add(self, name: str, labels: tuple[str, ...], size: int) -> int:
        place, end = int(self.cells[0]), int(self.cells[1])
        line = _encoder.encode(_Entry(name, labels, place, size)) + b"\n"
        if place + size > CELLS or end + len(line) > NAMES or size > SPARE - 2:
            return 2
        self._memory[8 * CELLS + end : 8 * CELLS + end + len(line)] = line
        self.cells[0], self.cells[1] = place + size, end + len(line)  # readers look at names up to here
        return place


def read_rows(data: bytes) -> dict[Key, list[float]]:
    """The rows of a sheet's bytes; none where they are no sheet."""
    if len(data) != 8 * CELLS + NAMES:
        return {}
    cells: memoryview[float] = memoryview(data)[: 8 * CELLS].cast("d")
    return {(e.name, e.labels): list(cells[e.place : e.place + e.size]) for e in _entries(data)}


def read_folder(folder: Path, count: int) -> dict[int, dict[Key, list[float]]]:
    """The rows of the sheets of ``count`` processes, by number; one that is not there yet, or just being made, is left out."""
    found = {}
    for number in range(count):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            found[number] = read_rows((folder / f"{PREFIX}{number}").read_bytes())
    return found


def add(rows: dict[Key, list[float]], key: Key, values: Sequence[float]) -> None:
    """Add values to a row of a sum."""
    rows[key] = [a + b for a, b in zip(rows[key], values, strict=True)] if key in rows else list(values)


def _entries(data: bytes) -> Iterator[_Entry]:
    end = int(memoryview(data)[: 8 * CELLS].cast("d")[1])
    for line in data[8 * CELLS : 8 * CELLS + end].splitlines():
        yield _decoder.decode(line)
