"""Host time per streamed token in the API process, from a step's output to the write: detokenise, parse, make the chunk, send.

256 requests stream at once, every step gives each of them a token; the engine and the sockets are not there, everything
between them is. ``collect`` is what happens before the routes' tasks wake, ``chunk`` the rest. Table for people, last line JSON.

    python benchmarks/stream_cost.py [--streams 256] [--steps 200]
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from octavo.messages import EngineRequest, StepOutput

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "server"))
from fake_service import CHATML, HERMES, THINKING, entry, find, make_service, texts, tokenizer

USER = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "get_weather"}}
USAGE = {"include_usage": True, "continuous_usage_stats": True}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "completions": ("/v1/completions", CHATML, {"prompt": "Hi"}),
    "completions, 5 logprobs": ("/v1/completions", CHATML, {"prompt": "Hi", "logprobs": 5}),
    "chat": ("/v1/chat/completions", CHATML, {"messages": USER}),
    "chat, usage in each chunk": ("/v1/chat/completions", CHATML, {"messages": USER, "stream_options": USAGE}),
    "chat, 4 stop strings": ("/v1/chat/completions", CHATML, {"messages": USER, "stop": ["Human:", "\n\n", "User", "###"]}),
    "chat, reasoning parser": ("/v1/chat/completions", THINKING, {"messages": USER}),
    "chat, tool parser": ("/v1/chat/completions", HERMES, {"messages": USER, "tools": [TOOL]}),
}


async def measure(case: str, streams: int, steps: int) -> dict[str, Any]:
    """Microseconds per token of one case."""
    path, template, fields = CASES[case]
    service, link = make_service(texts("x"), template=template)
    requests: list[EngineRequest] = []
    link.add = requests.append  # type: ignore[method-assign]
    handler, params = find("POST", path)
    body = json.dumps({**fields, "stream": True, "max_tokens": 4000}).encode()
    size = 0

    async def connection() -> None:
        parts = [{"type": "http.request", "body": body}]

        async def receive() -> Any:
            if parts:
                return parts.pop()
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            nonlocal size
            size += len(message.get("body", b""))

        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "path_params": params,
                 "state": {"cache_salt": "", "request_id": "x"}}
        await handler(service, scope, receive, send)

    begun = time.perf_counter()
    tasks = [asyncio.create_task(connection()) for _ in range(streams)]
    while len(requests) < streams:
        await asyncio.sleep(0)
    opened = time.perf_counter() - begun
    keys = [(request.request_id, 0) for request in requests]
    token = tokenizer().encode(" Paris", add_special_tokens=False)[0]
    tokens = np.full(streams, token, np.int32)
    logprobs = [entry(token, fields["logprobs"])] * streams if "logprobs" in fields else []
    collected, begun = 0.0, time.perf_counter()
    for step in range(steps):
        out = StepOutput(streamed=keys, tokens=tokens, logprobs=logprobs, started=[] if step else [(name, 0) for name, _ in keys])
        before = time.perf_counter()
        service.on_step(out)
        collected += time.perf_counter() - before
        seen = size
        while size == seen:
            await asyncio.sleep(0)
    whole = time.perf_counter() - begun
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    service.close()
    per = 1e6 / streams / steps
    return {"case": case, "collect_us": round(collected * per, 2), "chunk_us": round((whole - collected) * per, 2),
            "open_us": round(opened / streams * 1e6, 1), "bytes_per_token": round(size / streams / steps)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    found = []
    print("microseconds per token (open: per request), bytes per token")
    print(f"{'case':<28} {'collect':>8} {'chunk':>8} {'open':>8} {'bytes':>6}")
    for case in CASES:
        one = uvloop.run(measure(case, args.streams, args.steps))
        print(f"{case:<28} {one['collect_us']:>8.2f} {one['chunk_us']:>8.2f} {one['open_us']:>8.1f} {one['bytes_per_token']:>6}")
        found.append(one)
    print(json.dumps({"streams": args.streams, "steps": args.steps, "cases": found}))


if __name__ == "__main__":
    main()
