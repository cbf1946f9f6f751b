"""What holds for every test: two threads, and a logger that is as it was before.

Two threads, because a pool with more threads than free cores waits for its slowest one at every operator. The examples of
property tests are the same in every run, so that a run that fails can be repeated by anybody; to look for new ones:
``pytest --hypothesis-profile random``.
"""

import logging
import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "2")  # read when torch is first imported, here and in child processes

import pytest

try:
    from hypothesis import settings
except ImportError:  # a bare GPU machine, for tests/gpu alone
    pass
else:
    settings.register_profile("fixed", derandomize=True)
    settings.register_profile("random", print_blob=True)
    settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def logger_as_it_was() -> Iterator[None]:
    """Put the package's logger back after the test."""
    root = logging.getLogger("octavo")
    level, handlers, propagate = root.level, root.handlers[:], root.propagate
    yield
    root.setLevel(level)
    root.handlers[:], root.propagate = handlers, propagate
