"""Every test of a layer starts from the same random numbers."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same numbers in any order of tests."""
    torch.manual_seed(0)
