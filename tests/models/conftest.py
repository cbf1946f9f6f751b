"""Makes the harness importable by name from the tests of this folder, and quiet."""

import sys
from pathlib import Path

import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="session")
def quiet() -> None:
    """No progress bars and advice of transformers between test results."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same numbers in any order of tests."""
    torch.manual_seed(0)
