"""What holds for every test: two threads, and a logger that is as it was before.

Two threads, because a pool with more threads than free cores waits for its slowest one at every operator.
"""

import logging
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read when torch is first imported, here and in child processes

import pytest


@pytest.fixture(autouse=True)
def logger_as_it_was() -> Iterator[None]:
    """Put the package's logger back after the test."""
    root = logging.getLogger("octavo")
    level, handlers, propagate = root.level, root.handlers[:], root.propagate
    yield
    root.setLevel(level)
    root.handlers[:], root.propagate = handlers, propagate
