"""The chat page of a running server, driven once and photographed: python tests/browser/drive.py URL [--out FOLDER] [--key KEY].

Sends a message, sees the answer grow over several frames, stops a second answer, and writes pictures (desktop light and dark,
settings, phone) into the folder. Exit status 1 and a reason where the page does not do what it should.
"""

import argparse
import sys
from pathlib import Path

from acting import ANSWER, DONE, say
from chromium import Chromium, Page


def main() -> int:
    """Drive the page; 0 where all went well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of a running server, as http://127.0.0.1:8000/")
    parser.add_argument("--out", type=Path, default=Path("chat-page"), help="folder for the pictures")
    parser.add_argument("--key", help="API key, where the server asks for one")
    parser.add_argument("--seconds", type=float, default=120.0, help="to wait for the server and for each answer")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with Chromium() as browser:
        page = browser.page(args.url)
        open_page(page, args.key, args.seconds)
        page.picture(args.out / "empty.png")
        lengths = converse(page, args.seconds)
        page.picture(args.out / "answer.png")
        page.media(dark=True)
        page.picture(args.out / "answer-dark.png")
        page.click("#tune")
        page.picture(args.out / "settings-dark.png")
        complaints = page.complaints
        page.close()
        phone = browser.page(args.url, width=360, height=740, phone=True)
        open_page(phone, args.key, args.seconds)
        say(phone, "Name three colours.", wait=False)
        phone.until(DONE, "an answer on the phone", args.seconds)
        phone.picture(args.out / "phone.png")
        wide = phone.js("document.documentElement.scrollWidth > innerWidth")
        complaints += phone.complaints
    faults = complaints + ["the phone scrolls sideways"] * wide + ["the answer came in one piece"] * (len(lengths) < 3)
    print("\n".join(faults) or f"all well; the first answer was seen at {len(lengths)} lengths; pictures in {args.out}")
    return int(bool(faults))


def open_page(page: Page, key: str | None, seconds: float) -> None:
    """Wait until the server is ready, and give it the key."""
    page.until("ready && (models.length > 0 || ui.key.open)", "the server to be ready", seconds)
    if page.js("ui.key.open"):
        page.type(key or "")
        page.press("Enter")
    page.until("models.length > 0", "the list of models (is the key right?)")


def converse(page: Page, seconds: float) -> list[int]:
    """One whole answer and one that is stopped; the lengths at which the first was seen."""
    page.js(f"""(() => {{
        globalThis.lengths = [];
        const look = () => {{
            const length = {ANSWER}.length;
            if (length && length !== lengths.at(-1)) lengths.push(length);
            requestAnimationFrame(look);
        }};
        look();
    }})()""")
    say(page, "Explain in a few sentences why the sky is blue.", wait=False)
    page.until(DONE, "an answer", seconds)
    print("first answer:", page.texts(".stats")[-1])
    lengths: list[int] = page.js("lengths")
    say(page, "Count from one to a thousand, in words.", wait=False)
    page.until(f"{ANSWER}.length > 10", "the second answer to begin", seconds)
    page.press("Escape")
    page.until(DONE, "the second answer to stop", seconds)
    print("second answer, stopped:", page.texts(".stats")[-1])
    return lengths


if __name__ == "__main__":
    sys.exit(main())
