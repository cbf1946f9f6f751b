"""A pytest plugin (-p first_of_each): of every test function one case, and none that would begin after SECONDS; for sanitizers.

The case is the first whose name says "odd" or "small", else the first: an instrumented kernel is a hundred times slower.
"""

import time
from typing import Any

import pytest

SECONDS = 70
STARTED = time.monotonic()


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Keep one case of each function."""
    kept: dict[str, Any] = {}
    for item in items:
        name, _, case = item.nodeid.partition("[")
        small = any(word in case for word in ("odd", "small"))
        if name not in kept or (small and not kept[name][0]):
            kept[name] = (small, item)
    chosen = [item for _, item in kept.values()]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


def pytest_runtest_setup(item: Any) -> None:
    """Leave out what there is no time for; the summary counts it."""
    if time.monotonic() - STARTED > SECONDS:
        pytest.skip("no time left under the sanitizer")
