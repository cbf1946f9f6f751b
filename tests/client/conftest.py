"""A stand-in server on a free port."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from stand_in import StandIn, running


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """A running StandIn."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    yield from running(StandIn())
