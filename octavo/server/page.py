"""The chat page at ``/``: one static file, and the headers that let a browser run nothing else.

Owns page.html as bytes, its ETag and its Content-Security-Policy; it knows no route and no request. Invariant: the policy
names, by hash, exactly the scripts and the style that the file holds, so a page that is served is a page that runs, and
nothing that a model writes can become a script, a style, a picture from elsewhere or a call to another host.
"""

import hashlib
import re
from base64 import b64encode
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("page.html")


@cache
def page() -> tuple[bytes, dict[str, str]]:
    """The page and its headers, ETag among them. Read once; the answers to all requests share the dict: copy before a change."""
    text = FILE.read_text("utf-8")
    body = text.encode()
    return body, {
        "Content-Type": "text/html; charset=utf-8",
        "Content-Security-Policy": content_security_policy(text),
        "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"',
        "Cache-Control": "no-cache",  # kept by the browser, asked for again each time: a newer server shows its own page
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Opener-Policy": "same-origin",
    }


def content_security_policy(text: str) -> str:
    """The policy for a page with these inline scripts and styles, all without attributes.

    Trusted Types beside the rest: where a browser knows them, an assignment to innerHTML is an error.
    """
    return "; ".join([
        "default-src 'none'", f"script-src {hashes('script', text)}", f"style-src {hashes('style', text)}", "connect-src 'self'",
        "img-src 'self' data:", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'",
        "require-trusted-types-for 'script'", "trusted-types 'none'",
    ])


def hashes(tag: str, text: str) -> str:
    """The sources of a policy for every inline element of one kind."""
    bodies = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return " ".join(f"'sha256-{b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in bodies)
