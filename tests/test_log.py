"""Logging: nothing is configured by an import; ``setup`` installs one handler, once."""

import logging

import pytest

from octavo.log import get_logger, setup


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
