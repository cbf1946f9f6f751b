"""What the generators of pages share: write a page, or say that it is out of date.

Owns the command line of a generator; it does not know what a page says.
"""

import sys
from collections.abc import Callable
from pathlib import Path


def write_or_compare(path: Path, page: Callable[[], str]) -> int:
    """Write the page; with ``--check`` only compare it, and return 1 when it is out of date."""
    if "--check" not in sys.argv[1:]:
        path.write_text(page(), encoding="utf-8")
        return 0
    if path.exists() and path.read_text(encoding="utf-8") == page():
        return 0
    print(f"{path} is out of date: run make config-docs", file=sys.stderr)
    return 1
