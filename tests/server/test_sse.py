"""octavo.server.sse: framing, and text that no reader of lines takes apart."""

import asyncio
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from octavo.server.sse import EventStream, encode_event, event, quote, send_json

TEXT = st.text(st.characters(codec="utf-8"))


@given(TEXT)
def test_a_text_is_one_line_of_json(text: str) -> None:
    for data in (quote(text), encode_event({"a": text})[5:-1]):
        assert json.loads(data) == text
        assert len(data.decode().splitlines()) == 1 and b"\n" not in data
    assert event(quote(text)).decode().splitlines()[1:] == [""]


def test_a_stream_sends_its_head_with_the_first_bytes() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def run() -> None:
        out = EventStream(send, "text/plain")
        assert not out.begun and not sent
        await out.write(b"a")
        assert out.begun
        await out.write(b"b", more=False)
        await send_json(send, b"{}", 503, [(b"retry-after", b"1")])

    asyncio.run(run())
    kinds = [message["type"].rpartition(".")[2] for message in sent]
    assert kinds == ["start", "body", "body", "start", "body"]
    assert dict(sent[0]["headers"]) == {
        b"content-type": b"text/plain", b"cache-control": b"no-cache", b"x-accel-buffering": b"no"}
    assert [message.get("more_body") for message in sent[1:3]] == [True, False]
    assert sent[3]["status"] == 503
    assert dict(sent[3]["headers"]) == {b"content-type": b"application/json", b"content-length": b"2", b"retry-after": b"1"}
