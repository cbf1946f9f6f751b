"""Whole-server tests: real processes around a model of noise. What they share lies in modules beside this file."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import tinymodel
from served import Served


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinymodel.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    """One server for the tests of a file, which must find and leave it idle."""
    with Served(model) as served:
        yield served
        served.settle()
        served.check_descriptors()
        assert served.end() == 0
