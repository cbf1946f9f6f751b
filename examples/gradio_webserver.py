"""A Gradio page in front of a running server: ``octavo serve smollm2`` in one terminal, this file in another.

Gradio 6 or newer is needed and not among Octavo's dependencies: ``pip install gradio``. The page listens on this machine
only, unless --host says otherwise, and is never shared through Gradio's tunnel. (Octavo serves a chat page of its own at
``/`` and needs no Gradio.)
"""

import argparse
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

MODEL_URL = "http://127.0.0.1:8000/v1/chat/completions"


class Bot:
    """Talks to one URL of a server, /v1/chat/completions or /v1/completions; keeps no conversation."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url, self.key = url, key
        self.chat = url.rstrip("/").endswith("/chat/completions")

    def body(self, message: str, history: list[dict[str, Any]]) -> dict[str, Any]:
        """The request: the whole conversation for a chat, the message alone as a text to go on with otherwise."""
        if not self.chat:
            return {"prompt": message, "max_tokens": 128, "stream": True}
        past = [{"role": turn["role"], "content": words(turn["content"])} for turn in history]
        return {"messages": [*past, {"role": "user", "content": message}], "stream": True}

    def answer(self, message: str, history: list[dict[str, Any]]) -> Iterator[str]:
        """The answer so far, again and again while it grows; an error of the server as its last words."""
        text = "" if self.chat else message
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url, json.dumps(self.body(message, history)).encode(), headers)
        try:
            with urllib.request.urlopen(request) as response:
                for line in response:
                    data = line.removeprefix(b"data:").strip()
                    if not line.startswith(b"data:") or data == b"[DONE]":
                        continue
                    chunk = json.loads(data)
                    if "error" in chunk:
                        yield f"{text}\n\n[{chunk['error']['message']}]"
                        return
                    for choice in chunk["choices"]:
                        text += (choice["delta"].get("content") if self.chat else choice["text"]) or ""
                    yield text
        except urllib.error.HTTPError as error:
            with error:
                yield f"[{error.code}: {reason(error.read())}]"
        except OSError as error:
            yield f"{text}\n\n[The server at {self.url} cannot be reached: {getattr(error, 'reason', error)}]".strip()


def words(content: Any) -> str:
    """The text of a turn: Gradio gives a string or a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def reason(body: bytes) -> str:
    """The server's own words from the body of an error."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "no reason was given"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address that the page listens on (default %(default)s)")
    parser.add_argument("--port", type=int, default=8001, help="port that the page listens on (default %(default)s)")
    parser.add_argument("--model-url", default=MODEL_URL, help="where the server answers (default %(default)s)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Serve the page until it is interrupted. The server's key, if it wants one, is read from OCTAVO_API_KEY."""
    args = parse_args(arguments)
    try:
        import gradio  # optional, and heavy: only this example needs it
    except ImportError:
        print("This example needs Gradio, which Octavo does not install:\n    pip install gradio", file=sys.stderr)
        return 1
    if int(gradio.__version__.split(".")[0]) < 6:
        print(f"This example needs Gradio 6, and {gradio.__version__} is installed:\n    pip install -U gradio", file=sys.stderr)
        return 1
    bot = Bot(args.model_url, os.environ.get("OCTAVO_API_KEY"))
    page = gradio.ChatInterface(bot.answer, title="Octavo")
    page.launch(server_name=args.host, server_port=args.port, share=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
