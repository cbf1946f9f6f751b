"""Tests in this folder need a GPU and the CUDA kernels: without a GPU nothing here is collected."""

import sys
from pathlib import Path

import torch

from octavo import ops
from octavo.models.hub import SMOLLM2, cache_dir

sys.path.insert(0, str(Path(__file__).parent))  # the tests import support by name
collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
if torch.cuda.is_available():
    ops.load_cuda()


def pytest_report_header() -> list[str]:
    """What a run leaves out, and why."""
    if not torch.cuda.is_available():
        return ["tests/gpu: left out, there is no GPU"]
    found = (cache_dir() / SMOLLM2.file_name).is_file()
    return [] if found else [f"tests/gpu/test_greedy.py: has no tests unless {SMOLLM2.file_name} is in {cache_dir()}"]
