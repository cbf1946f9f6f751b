"""One browser for all tests of the page, a stand-in server and a fresh tab for each."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the tests import chromium, stand_in and acting by name

from chromium import Chromium, Page
from page_server import Running, StandIn


@pytest.fixture(scope="session")
def browser() -> Iterator[Chromium]:
    with Chromium() as browser:
        yield browser


@pytest.fixture
def server() -> Iterator[Running]:
    with Running() as running:
        yield running


@pytest.fixture
def stand_in(server: Running) -> StandIn:
    return server.stand_in


@pytest.fixture
def visit(browser: Chromium, server: Running) -> Iterator[Callable[..., Page]]:
    """visit(**options): the page in a fresh tab. At the end nothing may have complained, and nobody else been asked."""
    pages: list[Page] = []

    def visit(**options: Any) -> Page:
        pages.append(browser.page(server.url, **options))
        return pages[-1]

    yield visit
    for page in pages:
        page.js("1")  # what has been said until now has been heard
        page.close()
        assert page.complaints == []
        assert not [url for url in page.requests if not url.startswith((server.url, "data:image/svg+xml", "blob:"))]
