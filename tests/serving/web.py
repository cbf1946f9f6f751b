"""A client for the tests that does what it is told: whole calls, calls that are left half-way, bytes that are no request.

It believes nothing: an answer counts as whole only when its framing says so.
"""

import asyncio
import json
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

KEY = "sk-test-key-one"
OTHER_KEY = "sk-test-key-two"
PATIENCE = 60.0


@dataclass
class Reply:
    """An answer.

    Attributes:
        status: 0 where none came. whole: it arrived to its end. times: monotonic seconds at which parts of it came.
        seconds: from the call to the end.
    """

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = False
    times: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[Any]:
        """The events of a stream; its mark of the end as "[DONE]"."""
        found = []
        for event in self.body.decode().split("\n\n"):
            if event.startswith("data: "):
                data = event.removeprefix("data: ")
                found.append(data if data == "[DONE]" else json.loads(data))
        return found

    @property
    def token_ids(self) -> list[list[int]]:
        """Of a completion with return_token_ids, streamed or not: those of each choice."""
        if not self.headers.get("content-type", "").startswith("text/event-stream"):
            return [choice["token_ids"] for choice in self.json["choices"]]
        ids: dict[int, list[int]] = {}
        for event in self.events:
            if event != "[DONE]":
                for choice in event.get("choices", ()):
                    ids.setdefault(choice["index"], []).extend(choice.get("token_ids") or ())
        return [ids[index] for index in sorted(ids)]

    @property
    def ended_well(self) -> bool:
        """A whole answer, and of a stream one with reasons for its end and no error."""
        if self.status != 200 or not self.whole:
            return False
        if not self.headers.get("content-type", "").startswith("text/event-stream"):
            return all(choice["finish_reason"] in ("stop", "length") for choice in self.json["choices"])
        events = self.events
        return bool(events) and events[-1] == "[DONE]" and not any("error" in event for event in events[:-1])

    @property
    def stream_error(self) -> dict[str, Any] | None:
        """The error with which a stream has ended as it should: an event, then the mark of the end."""
        events = self.events
        if self.whole and len(events) >= 2 and events[-1] == "[DONE]" and "error" in events[-2]:
            error: dict[str, Any] = events[-2]["error"]
            return error
        return None


def completion(prompt: Any = "The capital of France", **fields: Any) -> dict[str, Any]:
    """A body for /v1/completions whose answer can be compared."""
    return {"prompt": prompt, "max_tokens": 16, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **fields}


def encode(path: str, body: Any, *, method: str = "POST", key: str | None = KEY, headers: dict[str, str] | None = None) -> bytes:
    """A request after whose answer the connection ends. ``body``: bytes as they are, None for none, all else as JSON."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = {"host": "test", "connection": "close", "content-length": str(len(data))}
    if body is not None:
        lines["content-type"] = "application/json"
    if key is not None:
        lines["authorization"] = f"Bearer {key}"
    lines |= headers or {}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data


async def call(port: int, path: str = "/v1/completions", body: Any = None, *, patience: float = PATIENCE,
               on_data: Callable[[Reply], None] | None = None, raw: bytes | None = None, **options: Any) -> Reply:
    """Send a request, or ``raw`` bytes, and read to the end of the connection.

    Args:
        patience: seconds for all of it; TimeoutError beyond. on_data: called whenever something has come.
    """
    reply, began = Reply(), time.monotonic()
    async with asyncio.timeout(patience):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
        try:
            writer.write(encode(path, body, **options) if raw is None else raw)
            await receive(reader, reply, on_data)
        finally:
            writer.transport.abort()
    reply.seconds = time.monotonic() - began
    return reply


async def leave(port: int, body: Any, *, path: str = "/v1/completions", after: float = 0.0, tokens: bool = False,
                reset: bool = True) -> float:
    """Send a request and go: after some seconds, or with ``tokens`` as soon as something has come. Returns when (monotonic).

    Args:
        reset: with a TCP reset, else with an orderly end.
    """
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        writer.write(encode(path, body))
        if tokens:
            await reader.read(1)
        await asyncio.sleep(after)
    except OSError:
        pass
    finally:
        sock = writer.get_extra_info("socket")
        if reset and sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        writer.close()
    return time.monotonic()


async def receive(reader: asyncio.StreamReader, reply: Reply, on_data: Callable[[Reply], None] | None = None) -> None:
    """Read an answer to the end of the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except (asyncio.IncompleteReadError, OSError):
        return
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    reply.status = int(first.split(" ")[1])
    reply.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    try:
        if reply.headers.get("transfer-encoding") == "chunked":
            while size := int(await reader.readuntil(b"\r\n"), 16):
                reply.body += (await reader.readexactly(size + 2))[:-2]
                reply.times.append(time.monotonic())
                if on_data is not None:
                    on_data(reply)
            await reader.readexactly(2)
        else:
            reply.body = await reader.readexactly(int(reply.headers["content-length"]))
        reply.whole = await reader.read(1) == b""
    except (asyncio.IncompleteReadError, OSError):
        return
