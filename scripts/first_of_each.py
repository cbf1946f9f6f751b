"""A pytest plugin (-p first_of_each): of every test function only its first parameter set, so each kernel once and quickly."""

from typing import Any


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Drop the others."""
    first: dict[str, Any] = {}
    for item in items:
        first.setdefault(item.nodeid.partition("[")[0], item)
    dropped = [item for item in items if item not in first.values()]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = list(first.values())
