"""What holds for every test: commands configure logging for their process, and a test leaves no trace of that."""

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def logger_as_it_was() -> Iterator[None]:
    """Put the package's logger back after the test."""
    root = logging.getLogger("octavo")
    level, handlers, propagate = root.level, root.handlers[:], root.propagate
    yield
    root.setLevel(level)
    root.handlers[:], root.propagate = handlers, propagate
