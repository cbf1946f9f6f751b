"""A headless Chromium, driven through the pipe of its DevTools protocol: no driver program and no library in between.

Owns the process, its profile folder and its messages; it knows nothing of the page. Invariant: when the ``with`` block ends,
the process and its children are gone and so is the profile. Messages are JSON, each ended by a NUL byte (file descriptors 3
and 4 of the browser).
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--remote-debugging-pipe",
)
KEYS = {
    "Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), "ArrowUp": (38, ""), "ArrowDown": (40, ""), "Backspace": (8, ""),
    "Home": (36, ""), "End": (35, ""), "PageUp": (33, ""), " ": (32, " "),
}
ALT, CTRL, META, SHIFT = 1, 2, 4, 8


class ScriptError(AssertionError):
    """A script of a test threw."""


def find() -> str:
    """The program.

    Raises:
        FileNotFoundError: there is no Chromium.
    """
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if found := shutil.which(name):
            return found
    raise FileNotFoundError("the tests of the chat page need Chromium: apt-get install chromium")


class Chromium:
    """One browser; ``page`` opens a tab with storage of its own."""

    def __init__(self) -> None:
        self.profile = tempfile.mkdtemp(prefix="octavo-chromium-")
        child_in, self.send_fd = os.pipe()
        self.receive_fd, child_out = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (child_in, child_out)]  # clear of 3 and 4
        os.close(child_in)
        os.close(child_out)
        command = [find(), *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        with open(Path(self.profile) / "stderr", "wb") as errors:
            self.process = subprocess.Popen(
                ["bash", "-c", f'exec "$@" 3<&{high[0]} 4>&{high[1]} {high[0]}<&- {high[1]}>&-', "bash", *command],
                pass_fds=high, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, start_new_session=True)
        for fd in high:
            os.close(fd)
        self.buffer = b""
        self.last_id = 0
        self.answers: dict[int, dict[str, Any]] = {}
        self.pages: dict[str, Page] = {}

    def __enter__(self) -> "Chromium":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # the group that this object started
        self.process.wait()
        os.close(self.send_fd)
        os.close(self.receive_fd)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, session: str | None = None, /, timeout: float = 30.0, **params: Any) -> dict[str, Any]:
        """One command and its result.

        Raises:
            RuntimeError: the browser refused it.
            TimeoutError: no answer within ``timeout`` seconds.
        """
        self.last_id += 1
        message: dict[str, Any] = {"id": self.last_id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self.send_fd, data):]
        wanted, limit = self.last_id, time.monotonic() + timeout
        while wanted not in self.answers:
            if not self.pump(limit - time.monotonic()):
                raise TimeoutError(f"{method}: no answer in {timeout} s")
        answer = self.answers.pop(wanted)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    def pump(self, seconds: float) -> bool:
        """Read what has come, waiting at most ``seconds`` for the first byte; whether something came."""
        if not select.select([self.receive_fd], [], [], max(0.0, seconds))[0]:
            return False
        data = os.read(self.receive_fd, 1 << 20)
        if not data:
            errors = Path(self.profile, "stderr").read_text(errors="replace")[-2000:]
            raise RuntimeError(f"Chromium has ended:\n{errors}")
        *messages, self.buffer = (self.buffer + data).split(b"\0")
        for text in messages:
            message = json.loads(text)
            if "id" in message:
                self.answers[message["id"]] = message
            elif (page := self.pages.get(message.get("sessionId", ""))) is not None:
                page.note(message["method"], message["params"])
        return True

    def page(self, url: str, *, width: int = 1280, height: int = 800, dark: bool = False, phone: bool = False) -> "Page":
        """A tab of a fresh context (own storage) that has loaded ``url``."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self.pages[session] = Page(self, session, context)
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            page.call(f"{domain}.enable")
        page.resize(width, height, phone=phone)
        page.media(dark=dark)
        page.go(url)
        return page


class Page:
    """A tab: what it said on the console, keys and clicks into it, scripts in it, pictures of it."""

    def __init__(self, browser: Chromium, session: str, context: str) -> None:
        self.browser, self.session, self.context = browser, session, context
        self.complaints: list[str] = []  # exceptions, console errors, violations of the policy
        self.requests: list[str] = []  # every URL that was asked for
        self.loads = 0

    def call(self, method: str, /, timeout: float = 30.0, **params: Any) -> dict[str, Any]:
        """A command to this tab."""
        return self.browser.call(method, self.session, timeout=timeout, **params)

    def note(self, method: str, params: dict[str, Any]) -> None:
        """An event of this tab."""
        if method == "Page.loadEventFired":
            self.loads += 1
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            detail = params["exceptionDetails"]
            self.complaints.append("exception: " + detail.get("exception", {}).get("description", detail["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.complaints.append("console: " + str([argument.get("value") for argument in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error" and params["entry"]["source"] != "network":
            self.complaints.append(f"log: {params['entry']['text']}")  # an answer of 4xx or 5xx is a "network" entry
        elif method == "Audits.issueAdded" and "contentSecurityPolicyIssueDetails" in params["issue"]["details"]:
            self.complaints.append("policy: " + json.dumps(params["issue"]["details"]["contentSecurityPolicyIssueDetails"]))

    def go(self, url: str) -> None:
        """Load a URL and wait until it is loaded.

        Raises:
            RuntimeError: nothing answers there.
        """
        before = self.loads
        if error := self.call("Page.navigate", url=url).get("errorText"):
            raise RuntimeError(f"{url}: {error}")
        self.until(lambda: self.loads > before, f"{url} to load")

    def reload(self) -> None:
        """Load the same URL again."""
        before = self.loads
        self.call("Page.reload")
        self.until(lambda: self.loads > before, "the page to load again")

    def resize(self, width: int, height: int, *, phone: bool = False) -> None:
        """The size of the window in CSS pixels; a phone also has touch and two device pixels for one."""
        scale = 2 if phone else 1
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)

    def media(self, *, dark: bool = False, calm: bool = False) -> None:
        """What the system prefers: a dark page, less motion."""
        self.call("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
            {"name": "prefers-reduced-motion", "value": "reduce" if calm else "no-preference"},
        ])

    def offline(self, off: bool) -> None:
        """Take the network away, or give it back."""
        self.call("Network.emulateNetworkConditions", offline=off, latency=0, downloadThroughput=-1, uploadThroughput=-1)

    def grant(self, *permissions: str) -> None:
        """Answer the browser's questions with yes."""
        self.browser.call("Browser.grantPermissions", permissions=list(permissions), browserContextId=self.context)

    def js(self, expression: str, timeout: float = 30.0) -> Any:
        """The JSON value of an expression; a promise is waited for.

        Raises:
            ScriptError: it threw.
        """
        answer = self.call(
            "Runtime.evaluate", timeout=timeout, expression=expression, awaitPromise=True, returnByValue=True, userGesture=True)
        if "exceptionDetails" in answer:
            detail = answer["exceptionDetails"]
            raise ScriptError(detail.get("exception", {}).get("description", detail["text"]))
        return answer["result"].get("value")

    def until(self, condition: str | Callable[[], Any], what: str = "", seconds: float = 20.0) -> None:
        """Wait for a condition (a script or a function) to hold.

        Raises:
            TimeoutError: it did not within ``seconds``.
        """
        limit = time.monotonic() + seconds
        while not (self.js(f"(async () => Boolean(await ({condition})))()") if isinstance(condition, str) else condition()):
            if time.monotonic() > limit:
                raise TimeoutError(f"waited {seconds} s for {what or condition}; complaints: {self.complaints}")
            self.browser.pump(0.02)

    def texts(self, selector: str) -> list[str]:
        """The text of every element that matches, as it is written in the document."""
        found: list[str] = self.js(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.textContent)")
        return found

    def shown(self, selector: str) -> bool:
        """Whether an element matches and is seen."""
        return bool(self.js(f"!!document.querySelector({json.dumps(selector)})?.checkVisibility({{visibilityProperty: true}})"))

    def type(self, text: str) -> None:
        """Text into what has the focus, as from an input method."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """One key, down and up, with CTRL, SHIFT, ALT or META."""
        code, text = KEYS.get(key, (ord(key[0].upper()), key))
        if modifiers & (CTRL | META):
            text = ""
        place = key if len(key) > 1 else "Space" if key == " " else f"Key{key.upper()}"
        named: dict[str, Any] = {"key": key, "code": place, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, unmodifiedText=text, **named)
        self.call("Input.dispatchKeyEvent", type="keyUp", **named)

    def click(self, selector: str) -> None:
        """The mouse on the middle of the first element that matches; it must be what lies on top there."""
        x, y, hit = self.js(f"""(() => {{
            const node = document.querySelector({json.dumps(selector)});
            node.scrollIntoView({{block: "nearest"}});
            const box = node.getBoundingClientRect(), x = box.x + box.width / 2, y = box.y + box.height / 2;
            return [x, y, node.contains(document.elementFromPoint(x, y))];
        }})()""")
        assert hit, f"{selector} is covered or not shown"
        for kind, button in (("mouseMoved", "none"), ("mousePressed", "left"), ("mouseReleased", "left")):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)

    def wheel(self, selector: str, by: int) -> None:
        """Turn the wheel over an element; negative is up."""
        box = self.js(f"document.querySelector({json.dumps(selector)}).getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        self.call("Input.dispatchMouseEvent", type="mouseWheel", x=x, y=y, deltaX=0, deltaY=by)

    def picture(self, path: Path) -> None:
        """What the window shows, as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """Close the tab and forget its storage."""
        self.browser.call("Target.disposeBrowserContext", browserContextId=self.context)
        del self.browser.pages[self.session]
