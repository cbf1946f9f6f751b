"""A server in OpenAI's shape for tests: it answers at once, and does as a test says: errors, cuts, splits, silence.

It runs on a loop of its own in a thread, so that commands, which own their loop, can be tested as a user runs them.
"""

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Seen:
    """A request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    connection: int


@dataclass
class StandIn:
    """The server, and how it behaves.

    Attributes:
        override: (Seen) -> raw bytes to send instead of an answer; None goes on as usual, b"" hangs up at once.
        split: bytes per write; 0 writes whole. drop_after: hang up after so many bytes of an answer.
        keep_alive: whether connections stay. usage: whether streams report it. tokens: words of each answer.
        count: prompt -> prompt tokens. seen: all requests. model: the one listed; None lists nothing.
    """

    override: Callable[[Seen], bytes | None] = lambda seen: None
    split: int = 0
    drop_after: int | None = None
    keep_alive: bool = True
    usage: bool = True
    role_chunk: bool = True
    ids_allowed: bool = True
    model: str | None = "stand-in"
    max_model_len: int | None = 100
    release: Callable[[Seen], asyncio.Event | None] = lambda seen: None
    seen: list[Seen] = field(default_factory=list)
    gone: int = 0
    port: int = 0
    connections: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def count(self, body: Any) -> int:
        """Tokens of a prompt: ids count once, words one and a half, and a chat has 7 more."""
        prompt = body.get("prompt")
        if isinstance(prompt, list):
            return len(prompt)
        text = prompt if isinstance(prompt, str) else " ".join(m["content"] for m in body["messages"])
        return int(len(text.split()) * 1.5) + (0 if isinstance(prompt, str) else 7)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        try:
            while await self._one(reader, writer, number):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self.gone += 1
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:] if line)}
        data = await reader.readexactly(int(headers.get("content-length", "0")))
        seen = Seen(method, path, headers, json.loads(data) if data else None, number)
        self.seen.append(seen)
        hold = self.release(seen)
        answer = self.override(seen)
        usual = answer is None
        if answer is None:
            answer = self.answer(seen)
        if self.drop_after is not None and usual and method == "POST":
            answer = answer[:self.drop_after]
        for at in range(0, len(answer), self.split or len(answer)):
            writer.write(answer[at:at + (self.split or len(answer))])
            if self.split:
                await writer.drain()
                await asyncio.sleep(0)
            if hold is not None and at == 0:
                await hold.wait()
        await writer.drain()
        return self.keep_alive and usual and self.drop_after is None

    def answer(self, seen: Seen) -> bytes:
        if seen.path == "/v1/models":
            cards = [] if self.model is None else [
                {"id": self.model, "object": "model", "max_model_len": self.max_model_len}]
            return self.json(200, {"object": "list", "data": cards})
        if seen.path == "/health":
            return self.json(200, {})
        if seen.path == "/tokenize":
            return self.json(200, {"count": self.count(seen.body)})
        if isinstance(seen.body.get("prompt"), list) and not self.ids_allowed:
            return error(400, "token ids are beyond the vocabulary")
        if seen.path not in ("/v1/completions", "/v1/chat/completions", "/v1/responses"):
            return error(404, "no such route", "unknown_route")
        chat = seen.path != "/v1/completions"
        tokens = seen.body.get("max_tokens") or seen.body.get("max_completion_tokens") or 5
        words = [f"w{i} " for i in range(tokens)]
        usage = {"prompt_tokens": self.count(seen.body), "completion_tokens": tokens, "total_tokens": 0}
        if not seen.body.get("stream"):
            return self.json(200, {"id": "x", "choices": [{"index": 0, "text": "".join(words)}], "usage": usage})
        events: list[dict[str, Any]] = []
        if chat and self.role_chunk:
            events.append({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
        for i, word in enumerate(words):
            last = "length" if i == tokens - 1 else None
            said = {"delta": {"content": word}} if chat else {"text": word}
            events.append({"choices": [{"index": 0, **said, "finish_reason": last}]})
        if self.usage and seen.body.get("stream_options", {}).get("include_usage"):
            events.append({"choices": [], "usage": usage})
        parts = [f"data: {json.dumps(event)}\n\n".encode() for event in events] + [b"data: [DONE]\n\n"]
        return chunked(parts)

    def json(self, status: int, value: Any) -> bytes:
        return plain(status, json.dumps(value).encode(), self.keep_alive)


def plain(status: int, body: bytes, keep: bool = True, more: str = "") -> bytes:
    """A response with a length."""
    close = "" if keep else "Connection: close\r\n"
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{close}{more}\r\n"
    return head.encode() + body


def error(status: int, message: str, code: str | None = None, more: str = "") -> bytes:
    """OpenAI's error body."""
    body = {"error": {"message": message, "type": "t", "param": None, "code": code}}
    return plain(status, json.dumps(body).encode(), more=more)


def chunked(parts: list[bytes], kind: str = "text/event-stream; charset=utf-8") -> bytes:
    """A response in chunks, one per part."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    return head + b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def running(server: StandIn) -> Iterator[StandIn]:
    """The server on a free port, until the generator is closed."""
    loop = asyncio.new_event_loop()
    ready, stop = threading.Event(), asyncio.Event()

    async def main() -> None:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        server.port = listening.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        listening.close()
        # A connection that was accepted a moment ago has a task a moment later: looked at until there are none.
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0.01)

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
        loop.close()
