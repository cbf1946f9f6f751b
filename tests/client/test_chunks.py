"""Chunks: what counts as output, in both shapes, and what ends a stream as an error."""

import asyncio
import json
from typing import Any

import pytest
from stand_in import StandIn, chunked

from octavo.client.chunks import CHAT, decode, stream
from octavo.client.connection import Address, Client, Refusal
from octavo.client.wire import ConnectionFailed


@pytest.mark.parametrize(("choice", "counts", "said"), [
    ({"text": "a", "finish_reason": None}, True, "a"),
    ({"text": "a", "finish_reason": "stop"}, True, "a"),
    ({"text": "", "finish_reason": None}, True, ""),  # a token that has no text yet
    ({"text": "", "finish_reason": "length"}, False, ""),
    ({"delta": {"role": "assistant", "content": ""}, "finish_reason": None}, False, ""),
    ({"delta": {"role": "assistant", "content": "a"}, "finish_reason": None}, True, "a"),
    ({"delta": {"content": ""}, "finish_reason": None}, True, ""),
    ({"delta": {"content": None}, "finish_reason": None}, False, ""),
    ({"delta": {"reasoning": "a"}}, True, ""), ({"delta": {"reasoning_content": "a"}}, True, ""),
    ({"delta": {"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}}, True, ""),
    ({"delta": {}, "finish_reason": "stop"}, False, ""),
    ({"index": 3, "logprobs": {"x": [1]}, "delta": {"content": "b", "refusal": None}, "stop_reason": 2}, True, "b"),
])
def test_what_counts_as_output(choice: dict[str, Any], counts: bool, said: str) -> None:
    chunk = decode(json.dumps({"id": "x", "choices": [choice], "usage": None, "new_field": [{}]}).encode())
    assert (chunk.choices[0].counts, chunk.choices[0].said) == (counts, said)


@pytest.mark.parametrize("payload", [b"", b"nope", b"[]", b'{"choices": 1}', b'{"choices": [{"text": 1}]}', b"[" * 100000])
def test_what_is_no_chunk(payload: bytes) -> None:
    with pytest.raises(ConnectionFailed, match="no chunk"):
        decode(payload)


@pytest.mark.parametrize(("event", "message"), [
    ({"error": {"message": "the engine failed", "type": "server_error", "code": "x"}}, "with an error: the engine failed"),
    ({"error": "plain"}, "with an error: plain"),
])
def test_an_error_in_the_middle(server: StandIn, event: dict[str, Any], message: str) -> None:
    first = b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n'
    server.override = lambda seen: chunked([first, f"data: {json.dumps(event)}\n\n".encode(), b"data: [DONE]\n\n"])

    async def work() -> None:
        client = Client(Address.parse(server.url))
        try:
            async for _ in stream(client, CHAT, {"stream": True}):
                pass
        finally:
            await client.close()

    with pytest.raises(Refusal, match=message) as caught:
        asyncio.run(work())
    assert caught.value.status is None
