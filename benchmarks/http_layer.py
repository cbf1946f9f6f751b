"""Cost of the HTTP layer below the routes, next to uvicorn's own protocol with the same application and no middleware.

Owns one server thread at a time and a client that sends raw bytes. Requests carry a chat body of about 12 KB and are decoded
strictly; streams consist of small events, one write each. Server time is the CPU time of the server's thread. Table for
people, last line JSON.

    python benchmarks/http_layer.py [--requests 3000] [--chunks 20000]
"""

import argparse
import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import uvicorn
from starlette.types import Message, Receive, Scope, Send

from octavo.server.auth import Keys
from octavo.server.config import ServerConfig
from octavo.server.http import Gate, read_json_body, run_until_disconnect
from octavo.server.protocol import uvicorn_config
from octavo.server.sse import EventStream, send_json
from octavo.server.strict import decode

EVENT = b'data: {"id":"cmpl-1","object":"text_completion","choices":[{"index":0,"text":" word"}]}\n\n'
HEADERS = (b"Host: localhost\r\nAuthorization: Bearer key\r\nAccept: */*\r\nUser-Agent: bench\r\n"
           b"Content-Type: application/json\r\n")


class Turn(msgspec.Struct):
    role: str
    content: str


class Chat(msgspec.Struct, forbid_unknown_fields=True):
    messages: list[Turn]
    model: str | None = None
    temperature: float = 1.0


BODY = json.dumps({"messages": [{"role": "user", "content": "hello world, " * 45}] * 20, "model": "m"}).encode()


def application(config: ServerConfig, chunks: int) -> Callable[[Scope, Receive, Send], Any]:
    """POST: read and decode; GET: stream."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "POST":
            decode(await read_json_body(scope, receive, config), Chat)
            await send_json(send, b"{}")
        else:
            await run_until_disconnect(receive, stream(send))

    async def stream(send: Send) -> None:
        out = EventStream(send)
        for left in range(chunks, -1, -1):
            await out.write(EVENT, more=left > 0)

    return app


def measure(config: uvicorn.Config, requests: int, chunks: int) -> dict[str, float]:
    """Requests per second on one connection, and server microseconds per request and per chunk."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(16)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([sock],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    post = b"POST /echo HTTP/1.1\r\n" + HEADERS + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    try:
        with socket.create_connection(sock.getsockname()) as client:
            best = float("inf"), float("inf")
            for _ in range(3):
                wall, cpu = time.perf_counter(), time.clock_gettime(clock)
                for _ in range(requests):
                    client.sendall(post)
                    answer = client.recv(4096)
                    while not answer.endswith(b"{}"):
                        answer += client.recv(4096)
                    assert answer.startswith(b"HTTP/1.1 200"), answer
                best = min(best, (time.perf_counter() - wall, time.clock_gettime(clock) - cpu))
            streamed = float("inf")
            for _ in range(3):
                cpu = time.clock_gettime(clock)
                client.sendall(b"GET /stream HTTP/1.1\r\n" + HEADERS + b"\r\n")
                tail = b""
                while not tail.endswith(b"0\r\n\r\n"):
                    tail = tail[-8:] + client.recv(1 << 18)
                streamed = min(streamed, time.clock_gettime(clock) - cpu)
    finally:
        server.should_exit = True
        thread.join()
        sock.close()
    return {"requests_per_s": requests / best[0], "us_per_request": best[1] / requests * 1e6,
            "us_per_chunk": streamed / chunks * 1e6}


def middleware(count: int) -> float:
    """Microseconds that the middleware adds to a call, without a server."""
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": [
        (b"host", b"a"), (b"authorization", b"Bearer key"), (b"accept", b"*/*"), (b"user-agent", b"bench"),
        (b"content-type", b"application/json"), (b"content-length", b"12000"), *[(b"x-stainless-a", b"b")] * 8]}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    async def run(call: Any) -> float:
        best = float("inf")
        for _ in range(3):
            start = time.perf_counter()
            for _ in range(count):
                await call(dict(scope), receive, send)
            best = min(best, time.perf_counter() - start)
        return best

    gate = Gate(app, ServerConfig(disable_uvicorn_access_log=True), Keys(["other", "key"]))
    return (asyncio.run(run(gate)) - asyncio.run(run(app))) / count * 1e6


def decoding(count: int) -> float:
    """Microseconds to decode the body."""
    best = float("inf")
    for _ in range(count):
        start = time.perf_counter()
        decode(BODY, Chat)
        best = min(best, time.perf_counter() - start)
    return best * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--chunks", type=int, default=20_000)
    args = parser.parse_args()
    server = ServerConfig(disable_uvicorn_access_log=True)
    app = application(server, args.chunks)
    options: dict[str, Any] = {"lifespan": "off", "loop": "uvloop"}
    ours = measure(uvicorn_config(Gate(app, server, Keys(["other", "key"])), server, **options), args.requests, args.chunks)
    bare = measure(uvicorn_config(app, server, http="httptools", **options), args.requests, args.chunks)
    print(f"{'':24}{'ours':>10}{'uvicorn':>10}")
    for name in ours:
        print(f"{name:24}{ours[name]:10.1f}{bare[name]:10.1f}")
    alone = {"middleware_us": middleware(args.requests), "decode_us": decoding(args.requests)}
    for name, value in alone.items():
        print(f"{name:24}{value:10.1f}")
    print(json.dumps({"body_bytes": len(BODY), "ours": ours, "uvicorn": bare, **alone}))


if __name__ == "__main__":
    main()
