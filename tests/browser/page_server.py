"""A server that stands in for Octavo's: the page with its real headers, and answers chosen by the words of the message.

Owns a uvicorn on 127.0.0.1 in a thread. Invariant: an answer is decided by the last user message alone (and by ``key`` and
``loading``), so a test says what it wants by what it types. Bodies are written in pieces that split characters and lines.
"""

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from octavo.server.page import page

TOUR = """Here is **paged attention** in brief, with a _little_ of everything.

## How it works

1. The cache is cut into `blocks` of 16 tokens.
2. A table says where each block lies:
   - no copy when a sequence grows
   - shared when two prompts begin alike
3. The kernel walks the table.

```python
def blocks_needed(tokens: int, size: int = 16) -> int:
    \"\"\"How many blocks hold so many tokens.\"\"\"
    return -(-tokens // size)
```

| Method | Waste | Copies |
|:-------|------:|:------:|
| One buffer per request | 60 % | many |
| Blocks of 16 | 4 % | none |

> What is never moved need not be tidied.

More in [the paper](https://arxiv.org/abs/2309.06180) or at https://example.org/blocks.
"""
ATTACK = """<script>window.hacked = 1</script> <img src=x onerror="window.hacked = 2">

[click](javascript:window.hacked=3) [data](data:text/html,<script>alert(1)</script>) ![pic](https://example.org/x.png)

<svg onload="window.hacked=4"></svg> <a href="javascript:alert(1)">x</a> <iframe src="https://example.org"></iframe>

[ok](https://example.org/?q="onmouseover=window.hacked=5) <javascript:alert(1)> [v](  vbscript:x) [t](\tjavascript:alert(1))

```html"><img src=x onerror=window.hacked=6>
<style>body { display: none }</style>
```
"""
LETTERS = "Grüße 👩‍👩‍👧, 日本語 und ✓. " * 4
MANY = " ".join(f"word{i}" if i % 97 else f"**word{i}**\n\n- item {i}\n- `code {i}`\n\n" for i in range(10_000))


@dataclass
class StandIn:
    """What the server is to do and what it was asked."""

    key: str | None = None
    loading: list[dict[str, Any] | None] = field(default_factory=list)  # bodies of /ready until it is; None: no JSON
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of the requests for chats
    gone: int = 0  # streams whose client went away
    attempts: dict[str, int] = field(default_factory=dict)
    hold: threading.Event = field(default_factory=threading.Event)  # lets a "hold" answer go on

    def app(self) -> Starlette:
        """The routes."""
        return Starlette(routes=[
            Route("/", self.root), Route("/ready", self.ready), Route("/v1/models", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ])

    def root(self, request: Request) -> Response:
        """The page, as it will be served."""
        body, headers = page()
        return Response(body, headers=headers)

    def ready(self, request: Request) -> Response:
        """503 and what it does while something is left to load; every look moves the loading on."""
        if not self.loading:
            return Response()
        state = self.loading.pop(0)
        return Response("", status_code=503) if state is None else JSONResponse(state, status_code=503)

    def refused(self, request: Request) -> Response | None:
        """401 without the key."""
        if self.key is None or request.headers.get("authorization") == f"Bearer {self.key}":
            return None
        return error(401, "The API key is missing or wrong.")

    def models(self, request: Request) -> Response:
        """Two models."""
        found = [{"id": "smollm2", "object": "model", "max_model_len": 8192}, {"id": "other", "object": "model"}]
        return self.refused(request) or JSONResponse({"object": "list", "data": found})

    async def chat(self, request: Request) -> Response:
        """An answer by the words of the last message."""
        if (refusal := self.refused(request)) is not None:
            return refusal
        body = await request.json()
        self.bodies.append(body)
        words = body["messages"][-1]["content"]
        self.attempts[words] = self.attempts.get(words, 0) + 1
        if "refuse" in words:
            return error(400, "The prompt has 9000 tokens, and max_model_len is 8192.")
        if "full" in words and self.attempts[words] == 1:
            return error(503, "The server is full.", {"Retry-After": "2"})
        return StreamingResponse(self.stream(words), media_type="text/event-stream")

    async def stream(self, words: str) -> AsyncIterator[bytes]:
        """The bytes of an answer."""
        text, pause, size, thoughts, finish = "Hello! You wrote: " + words, 0.01, 7, "", "stop"
        if "tour" in words:
            text, pause = TOUR, 0.004
        elif "attack" in words:
            text, pause = ATTACK, 0.002
        elif "utf8" in words:
            text, size = LETTERS, 1
        elif "think" in words:
            text, thoughts = "Forty-two.", "The question is old. Let me weigh it with care, and look at it from both sides. " * 3
        elif "long" in words:
            text, finish = "A long answer. " * 30, "length"
        elif "many" in words:
            text, pause, size = MANY, 0.0, 4096
        elif "forever" in words:
            text = "and on " * 100_000
        count = 0
        try:
            async for piece in self.pieces(text, thoughts, words):
                count += bool(piece.get("content") or piece.get("reasoning_content"))
                if "break" in words and count == 4:
                    yield b'event: error\ndata: {"error": {"message": "The engine has died.", "type": "server_error"}}\n\n'
                    yield b"data: [DONE]\n\n"
                    return
                if "cut" in words and count == 4:
                    return
                chunk = json.dumps({"choices": [{"index": 0, "delta": piece}]}, ensure_ascii=False)
                raw = f": a comment\r\n\r\ndata: {chunk}\r\n\r\n".encode()
                for start in range(0, len(raw), size if pause else len(raw)):
                    yield raw[start:start + size] if pause else raw
                if pause:
                    await asyncio.sleep(pause)
            usage = {"prompt_tokens": 12, "completion_tokens": count, "total_tokens": 12 + count}
            last = [{"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}, {"choices": [], "usage": usage}]
            for part in last:
                yield b"data: " + json.dumps(part).encode() + b"\n\n"
            yield b"data: [DONE]\n\n"
        except (asyncio.CancelledError, GeneratorExit):
            self.gone += 1
            raise

    async def pieces(self, text: str, thoughts: str, words: str) -> AsyncIterator[dict[str, str]]:
        """The deltas: thoughts, then the text, some characters at a time."""
        yield {"role": "assistant", "content": ""}
        for start in range(0, len(thoughts), 6):
            yield {"reasoning_content": thoughts[start:start + 6]}
        for start in range(0, len(text), 5):
            if start > len(text) // 2 and "hold" in words:
                while not self.hold.is_set():
                    await asyncio.sleep(0.01)
            yield {"content": text[start:start + 5]}


def error(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """An error in OpenAI's shape."""
    return JSONResponse({"error": {"message": message, "type": "error", "param": None, "code": None}}, status, headers)


class Running:
    """A StandIn behind a port, for the length of a ``with`` block."""

    def __init__(self) -> None:
        self.stand_in = StandIn()
        config = uvicorn.Config(
            self.stand_in.app(), host="127.0.0.1", port=0, log_level="error", lifespan="off", ws="none",
            timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> "Running":
        self.thread.start()
        while not self.server.started:
            self.thread.join(0.01)
            assert self.thread.is_alive(), "the stand-in did not start"
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        return self

    def __exit__(self, *_: object) -> None:
        self.stand_in.hold.set()
        self.server.should_exit = True
        self.thread.join()
