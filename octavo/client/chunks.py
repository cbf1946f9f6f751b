"""The chunks of a streamed answer, of completions and of chats: what of them a client looks at, typed.

Owns which parts of a chunk count as output; it does not know connections or clocks. Invariant: a chunk is decoded in
one pass that skips what nobody reads, for this is the client's whole cost per token (see ``octavo.client.load``).
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import msgspec

from octavo.client.connection import Client, Refusal
from octavo.client.wire import ConnectionFailed

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


class Delta(msgspec.Struct):
    """What a chat's chunk adds to the answer."""

    role: str | None = None
    content: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: Sequence[Any] | None = None


class Choice(msgspec.Struct):
    """One continuation's part of a chunk; completions fill ``text``, chats ``delta``."""

    text: str | None = None
    delta: Delta | None = None
    finish_reason: str | None = None

    @property
    def said(self) -> str:
        """The text that it adds to the answer proper."""
        return self.text or (self.delta.content if self.delta is not None else None) or ""

    @property
    def counts(self) -> bool:
        """True when it brings output: text, reasoning, part of a tool call, or a token that has no text (yet).

        What only opens a message (its role) or only ends it is no output.
        """
        delta = self.delta
        if self.text or (delta is not None and (
                delta.content or delta.reasoning or delta.reasoning_content or delta.tool_calls)):
            return True
        empty = self.text if delta is None else delta.content
        return empty is not None and self.finish_reason is None and (delta is None or delta.role is None)


class Usage(msgspec.Struct):
    """Token counts of a request, by the server."""

    prompt_tokens: int = 0
    completion_tokens: int | None = None


class Chunk(msgspec.Struct):
    """One event of a streamed answer."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(Chunk)


async def stream(client: Client, path: str, body: Mapping[str, Any]) -> AsyncGenerator[list[Chunk], None]:
    """Post a request that streams and yield its chunks, those together that arrived together.

    Raises:
        Refusal: the server refused the request or ended its stream with an error. ConnectionFailed: the answer broke off.
    """
    async with aclosing(client.events(path, msgspec.json.encode(body))) as events:
        async for payloads in events:
            chunks = [decode(payload) for payload in payloads]
            for chunk in chunks:
                if chunk.error is not None:
                    raise stream_error(chunk.error)
            yield chunks


def decode(payload: bytes) -> Chunk:
    """One event; ConnectionFailed when it is no chunk."""
    try:
        return _DECODER.decode(payload)
    except (msgspec.DecodeError, RecursionError):
        raise ConnectionFailed(f"the server sent an event that is no chunk: {payload[:100]!r}") from None


def stream_error(error: Any) -> Refusal:
    """The error that ended a stream, as an exception."""
    listed = error if isinstance(error, dict) else {"message": error}
    message, code = listed.get("message"), listed.get("code")
    shown = " ".join(str(message).split())[:500]
    return Refusal(f"the server ended its answer with an error: {shown}", code=code if isinstance(code, str) else None)
