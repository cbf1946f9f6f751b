"""Logging: nothing is configured by an import; ``setup`` installs one handler, once; a server's log makes nobody wait."""

import logging
import os
import sys
import time
from pathlib import Path

import pytest

from octavo.log import LAST_SECONDS, Relay, detach, get_logger, setup


@pytest.fixture
def restored() -> logging.Logger:
    """The package's logger; tests/conftest.py puts it back as it was."""
    return logging.getLogger("octavo")


def test_setup_installs_one_handler(restored: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OCTAVO_LOGGING_LEVEL", raising=False)
    setup()
    setup()
    assert len(restored.handlers) == 1 and restored.level == logging.INFO
    assert get_logger("octavo.x").getEffectiveLevel() == logging.INFO


def test_the_level_comes_from_the_environment(restored: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_LOGGING_LEVEL", "debug")
    setup()
    assert restored.level == logging.DEBUG
    setup("error")
    assert restored.level == logging.ERROR


def test_an_unknown_level_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_LOGGING_LEVEL", "loud")
    with pytest.raises(ValueError, match="LOUD"):
        setup()


def line(text: str) -> logging.LogRecord:
    return logging.LogRecord("octavo.x", logging.INFO, __file__, 1, text, (), None)


def test_a_relay_writes_everything_in_order() -> None:
    read, write = os.pipe()
    relay = Relay(write)
    for number in range(50):
        relay.handle(line(f"line {number} \ud800"))
    relay.flush()
    os.close(write)
    with open(read, "rb") as pipe:
        assert pipe.read().decode() == "".join(f"line {number} \\ud800\n" for number in range(50))


def test_a_relay_waits_for_nobody_and_counts_what_it_drops() -> None:
    read, write = os.pipe()
    relay = Relay(write, most=10)
    began = time.monotonic()
    for _ in range(200):
        relay.handle(line("x" * 10_000))  # 2 MB: far more than a pipe holds
    assert time.monotonic() - began < LAST_SECONDS and 100 < relay.dropped < 200
    os.close(read)  # the thread ends its write with an error, and goes on
    relay.flush()
    assert not relay._lines.unfinished_tasks
    os.close(write)


def test_detach_replaces_the_handler_of_setup_only(
        restored: logging.Logger, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open(tmp_path / "log", "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        other = logging.NullHandler()
        restored.addHandler(other)
        setup()
        detach()
        assert restored.handlers == [other]  # setup leaves alone what a program has set up
        restored.removeHandler(other)
        setup()
        detach()
        (relay,) = restored.handlers
        assert isinstance(relay, Relay)
        restored.warning("something")
        relay.flush()
    assert "WARNING" in (tmp_path / "log").read_text()
