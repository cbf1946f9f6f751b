"""Tests in this folder need g++ on x86-64 and the headers of a CUDA toolkit: where one is missing nothing here is collected."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the tests import their neighbours by name

import kernel_library

_refusal = kernel_library.refusal()
collect_ignore_glob = ["*.py"] if _refusal else []


def pytest_report_header() -> list[str]:
    """What a run leaves out, and why."""
    return [f"tests/emulated: left out: {_refusal}"] if _refusal else []
