"""/v1/messages and its count_tokens: one turn of a conversation in Anthropic's shape.

Owns both forms of the answer; what a request says is messages_input's. Invariant: the whole answer is the fold of the same
Changes from which the stream's events are made.
"""

import secrets
import time
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from octavo.errors import RequestError
from octavo.server.blocks import Block, Blocks, Change
from octavo.server.chunks import Identity
from octavo.server.dialect import serve_dialect, translated
from octavo.server.errors import ApiError
from octavo.server.exchange import News, look_up
from octavo.server.messages_input import (
    NAMES,
    MessagesRequest,
    Said,
    check_budget,
    conversation,
    sampling_fields,
)
from octavo.server.models import check_model
from octavo.server.service import Service
from octavo.server.sse import EVENT_STREAM, encode_event, named_event, quote
from octavo.server.turn import Piece, Turn, prompt_of

SIGNATURE = "unsigned"
"""Of thinking: nobody checks it here, but clients send back only what has one."""
PATH = "/v1/messages"


class MessageUsage(msgspec.Struct, kw_only=True):
    """Tokens of a message. input_tokens: those of the prompt that were computed; the others were read from the cache."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class Message(msgspec.Struct, kw_only=True):
    """The answer. content: blocks of type text, thinking and tool_use."""

    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: MessageUsage


class TokenCount(msgspec.Struct):
    """The answer of count_tokens."""

    input_tokens: int


class MessagesExchange:
    """One request under way; see Exchange."""

    media_type = EVENT_STREAM

    def __init__(self, service: Service, request: MessagesRequest, key_salt: str) -> None:
        model = check_model(service, request.model)
        check_budget(request)
        self._turn = turn = Turn(service, sampling_fields(request), conversation(service, request), key_salt,
                                 max_tokens=request.max_tokens)
        self.asks, self.timeout, self.streams = turn.asks, turn.timeout, bool(request.stream)
        self._identity = Identity(f"msg_{secrets.token_hex(16)}", int(time.time()), model)
        self._blocks = Blocks()
        self._last: Piece | None = None
        self._begun = False

    def events(self, news: News) -> bytes:
        """The events of some news."""
        data = b""
        for piece in self._turn.pieces(news):
            if not self._begun:  # not before, because the first step says what was cached
                self._begun = True
                data += _event("message_start", message=self._message(output_tokens=0))
            for change in self._take(piece):
                data += self._change(change)
        return data

    def ending(self) -> bytes:
        """Why it ended, usage, and the mark of the end."""
        reason, sequence = self._stop()
        usage = self._usage(self._turn.counter.completion_tokens)
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return _event("message_delta", delta=delta, usage=usage) + _event("message_stop")

    def failure(self, error: ApiError) -> bytes:
        """An error, after which nothing comes."""
        return named_event("error", encode_event(error.document(PATH)))

    def fold(self, news: News) -> None:
        """Take pieces into the blocks."""
        for piece in self._turn.pieces(news):
            self._take(piece)

    def answer(self) -> bytes:
        """The whole message."""
        message = self._message(self._turn.counter.completion_tokens)
        message.content = [self._block(block) for block in self._blocks.row]
        message.stop_reason, message.stop_sequence = self._stop()
        return msgspec.json.encode(message)

    def _take(self, piece: Piece) -> list[Change]:
        self._last = piece
        return self._blocks.take(piece)

    def _stop(self) -> tuple[str, str | None]:
        """stop_reason and stop_sequence."""
        assert self._last is not None
        if self._last.finish_reason == "length":
            return "max_tokens", None
        if self._blocks.called:
            return "tool_use", None
        stop = self._last.stop_reason
        return ("stop_sequence", stop) if isinstance(stop, str) else ("end_turn", None)

    def _message(self, output_tokens: int) -> Message:
        return Message(id=self._identity.id, model=self._identity.model, content=[], usage=self._usage(output_tokens))

    def _usage(self, output_tokens: int) -> MessageUsage:
        counter = self._turn.counter
        return MessageUsage(input_tokens=counter.prompt_tokens - counter.cached_tokens,
                            cache_read_input_tokens=counter.cached_tokens, output_tokens=output_tokens)

    def _block(self, block: Block) -> dict[str, Any]:
        """A block as far as it is known."""
        if block.kind == "text":
            return {"type": "text", "text": block.text}
        if block.kind == "reasoning":
            return {"type": "thinking", "thinking": block.text, "signature": SIGNATURE}
        # Arguments stand as the model wrote them; what the end of the output cut off is no JSON that could stand there.
        given = msgspec.Raw(block.text.encode()) if block.state == "whole" else {}
        return {"type": "tool_use", "id": self._call_id(block), "name": block.name, "input": given}

    def _call_id(self, block: Block) -> str:
        return f"toolu_{self._identity.id.removeprefix('msg_')}{block.index}"

    def _change(self, change: Change) -> bytes:
        block = change.block
        if change.what == "open":
            fresh = self._block(Block(block.index, block.kind, block.name))  # the news may have filled it already
            if block.kind == "reasoning":
                fresh["signature"] = ""
            return _event("content_block_start", index=block.index, content_block=fresh)
        if change.what == "close":
            data = b""
            if block.kind == "reasoning":
                data = _delta(block, b'"signature_delta","signature":' + quote(SIGNATURE))
            return data + _event("content_block_stop", index=block.index)
        text = quote(change.text)
        if block.kind == "text":
            return _delta(block, b'"text_delta","text":' + text)
        if block.kind == "reasoning":
            return _delta(block, b'"thinking_delta","thinking":' + text)
        return _delta(block, b'"input_json_delta","partial_json":' + text)


def _event(kind: str, **fields: object) -> bytes:
    return named_event(kind, encode_event({"type": kind, **fields}))


def _delta(block: Block, body: bytes) -> bytes:
    """An event of one delta; body: its type and what follows it."""
    return (b'event: content_block_delta\ndata: {"type":"content_block_delta","index":%d,"delta":{"type":' % block.index
            + body + b"}}\n\n")


def counted(service: Service, said: Said) -> bytes:
    """The answer of count_tokens; errors as for a message."""
    check_model(service, said.model)
    try:
        ids = prompt_of(service, conversation(service, said))[1]
    except RequestError as error:
        raise translated(error, NAMES) from None
    return msgspec.json.encode(TokenCount(len(ids)))


async def create_message(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """POST /v1/messages."""
    await serve_dialect(service, scope, receive, send, MessagesRequest, MessagesExchange, lambda request: NAMES)


async def count_tokens(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """POST /v1/messages/count_tokens."""
    await look_up(service, scope, receive, send, Said, counted)


ROUTES = (("POST", PATH, create_message), ("POST", f"{PATH}/count_tokens", count_tokens))
