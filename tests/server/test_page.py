"""The chat page as a file: what its policy allows is what it holds, and it holds nothing that the policy forbids."""

import hashlib
import re
from base64 import b64encode
from html.parser import HTMLParser

import pytest

from octavo.server.page import content_security_policy, page


class Reader(HTMLParser):
    """Tags with their attributes, and the bodies of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.bodies: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem in self.bodies:
            self.bodies[self.cdata_elem].append(data)


@pytest.fixture(scope="module")
def text() -> str:
    return page()[0].decode()


@pytest.fixture(scope="module")
def read(text: str) -> Reader:
    return Reader(text)


def directives(policy: str) -> dict[str, list[str]]:
    return {name: words for name, *words in (part.split() for part in policy.split(";"))}


def test_the_page_is_small_and_one_file(text: str, read: Reader) -> None:
    assert len(text.encode()) < 60_000
    for tag, attributes in read.tags:
        for name in ("src", "srcset", "href", "action", "data", "poster"):
            value = attributes.get(name) or "#"
            assert value.startswith(("#", "data:image/svg+xml,")), f"<{tag} {name}={value[:60]!r}> is another file"
    code = "".join(read.bodies["style"] + read.bodies["script"])
    assert not re.search(r"@import|url\(|https?://(?!www\.w3\.org/2000/svg)\w", code)


def test_the_policy_names_what_the_page_holds_and_nothing_else(text: str, read: Reader) -> None:
    """The hashes are of the bodies as a parser of HTML sees them."""
    found = directives(page()[1]["Content-Security-Policy"])
    for tag in ("script", "style"):
        hashes = [f"'sha256-{b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in read.bodies[tag]]
        assert hashes and found.pop(f"{tag}-src") == hashes
    assert found == {
        "default-src": ["'none'"], "connect-src": ["'self'"], "img-src": ["'self'", "data:"], "base-uri": ["'none'"],
        "form-action": ["'none'"], "frame-ancestors": ["'none'"], "require-trusted-types-for": ["'script'"],
        "trusted-types": ["'none'"],
    }


def test_a_changed_script_changes_the_policy() -> None:
    one, two = (content_security_policy(f"<script>{body}</script><style>a</style>") for body in ("1", "2"))
    assert directives(one)["script-src"] != directives(two)["script-src"]
    assert directives(one)["style-src"] == directives(two)["style-src"]


def test_nothing_in_the_page_needs_what_the_policy_forbids(text: str, read: Reader) -> None:
    assert "\r" not in text  # a browser would hash other bytes
    assert not [(tag, name) for tag, attributes in read.tags for name in attributes if name.startswith("on") or name == "style"]
    assert not [tag for tag, attributes in read.tags if tag in ("script", "style") and attributes]
    assert not [tag for tag, _ in read.tags if tag in ("form", "iframe", "object", "embed", "base")]
    script = "".join(read.bodies["script"])
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|javascript:", script)


def test_every_control_has_a_name(read: Reader) -> None:
    labels = {attributes.get("for") for tag, attributes in read.tags if tag == "label"}
    for tag, attributes in read.tags:
        if tag in ("input", "textarea", "select"):
            assert attributes.get("id") in labels, attributes


def test_headers() -> None:
    body, headers = page()
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-cache"
    assert headers["ETag"] == f'"{hashlib.sha256(body).hexdigest()[:32]}"'
    assert page()[0] is body  # read once
