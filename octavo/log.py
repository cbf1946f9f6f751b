"""One logger for the whole package: ``get_logger(__name__)``.

Owns the format and the level (``OCTAVO_LOGGING_LEVEL``); it does not know what is logged. Invariant: importing this
file configures nothing for the embedding program; only ``setup`` (called by our own commands) installs a handler.
"""

import logging
import os
import sys

FORMAT = "%(levelname)s %(asctime)s %(name)s: %(message)s"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; children of ``octavo`` share its level and handler."""
    return logging.getLogger(name)


def setup(level: str | None = None) -> None:
    """Install the stderr handler once.

    Args:
        level: a name of ``logging``; default is OCTAVO_LOGGING_LEVEL, else INFO. An unknown name raises ValueError.
    """
    root = logging.getLogger("octavo")
    root.setLevel((level or os.environ.get("OCTAVO_LOGGING_LEVEL") or "INFO").upper())
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(FORMAT, datefmt="%m-%d %H:%M:%S"))
        root.addHandler(handler)
        root.propagate = False
