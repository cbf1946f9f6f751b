"""A machine's memory: the host's own, or what a container leaves of it."""

import psutil
import pytest

from octavo.worker import machine
from octavo.worker.machine import GIB, MIB, machine_memory, size_text

BOX = 1_000_000_000


@pytest.fixture
def box(tmp_path, monkeypatch):
    """box(limit, used, stat): files of a control group."""
    monkeypatch.setattr(machine, "CGROUPS", ((tmp_path, "max", "current", "inactive_file"),))

    def write(limit, used="300000000", stat="anon 5\ninactive_file 100000000"):
        for name, text in (("max", limit), ("current", used), ("memory.stat", stat)):
            (tmp_path / name).write_text(f"{text}\n")
        return machine_memory()

    return write


def test_the_limit_of_a_container_counts(box):
    whole, boxed = box("max"), box(str(BOX))
    assert whole.total > boxed.total == boxed.host_total == BOX and boxed.device == "cpu"
    assert boxed.available <= 800_000_000  # cached pages of files make room when asked


def test_a_full_container_has_nothing(box):
    assert box(str(BOX), "1200000000", "inactive_file 50000000").available == 0


def test_a_limit_beyond_the_machine_changes_nothing(box):
    found = box(str(2**62))
    assert found.total == found.host_total == psutil.virtual_memory().total and 0 < found.available < found.total


@pytest.mark.parametrize("limit", ["max", "", "words"])
def test_a_limit_that_is_no_number_is_no_limit(box, limit):
    assert box(limit).total == psutil.virtual_memory().total


def test_without_control_groups_it_is_the_host(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUPS", ((tmp_path / "nowhere", "max", "current", "inactive_file"),))
    found = machine_memory()
    assert found.total == found.host_total == psutil.virtual_memory().total and 0 < found.available < found.total


def test_the_first_version_of_control_groups_is_read_too(tmp_path, monkeypatch):
    (_, *second), (_, *first) = machine.CGROUPS
    monkeypatch.setattr(machine, "CGROUPS", ((tmp_path, *second), (tmp_path, *first)))
    (tmp_path / "memory.limit_in_bytes").write_text(f"{BOX}\n")
    (tmp_path / "memory.usage_in_bytes").write_text("900000000\n")
    (tmp_path / "memory.stat").write_text("total_inactive_file 1000\n")
    found = machine_memory()
    assert found.total == BOX and found.available <= 100_001_000


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (MIB - 1, "1048575 bytes"), (MIB, "1.00 MiB"), (GIB - 1, "1024.00 MiB"), (GIB, "1.00 GiB"),
     (int(1.5 * GIB), "1.50 GiB"), (3000 * GIB, "3000.00 GiB")],
)  # fmt: skip
def test_bytes_for_people(num_bytes, text):
    assert size_text(num_bytes) == text
