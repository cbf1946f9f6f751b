"""What the tests of the page do again and again: open it, say something, look at the last answer."""

from collections.abc import Callable
from typing import Any

from chromium import Page

Visit = Callable[..., Page]
DONE = "streams.size === 0 && chat.messages.length > 0"
ANSWER = "([...document.querySelectorAll('.message:not(.user) .prose')].at(-1)?.innerText ?? '')"
NAMES = "#chats .name"
KEPT = "Object.keys(localStorage).filter((key) => key.startsWith('octavo.chat.')).length"


def ready(visit: Visit, **options: Any) -> Page:
    """The page, ready to be written to."""
    page = visit(**options)
    page.until("ready && models.length === 2")
    return page


def say(page: Page, text: str, wait: bool = True) -> None:
    """Write into the box and send with Enter; wait for the end of the answer."""
    page.js("ui.input.focus()")
    page.type(text)
    page.press("Enter")
    if wait:
        page.until(DONE, f"the answer to {text!r}")
