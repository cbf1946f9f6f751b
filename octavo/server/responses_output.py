"""What /v1/responses says: the response as an object, its items, and the events that announce them piece by piece.

Owns these shapes and the order of events; it does not know where blocks come from. Invariant: each item that an event adds is
in the last event's response, exactly as its "done" event has it.
"""

import secrets
from typing import Any

import msgspec

from octavo.server.blocks import Block, Change
from octavo.server.logprobs import TokenLogprob
from octavo.server.sse import encode_event, named_event, quote

STATUSES = {"open": "in_progress", "whole": "completed", "cut": "incomplete"}
PREFIXES = {"reasoning": "rs", "text": "msg", "call": "fc"}
# What the events of a block's text are called.
EVENTS = {"reasoning": "response.reasoning_text", "text": "response.output_text", "call": "response.function_call_arguments"}


class ReasoningText(msgspec.Struct):
    """The one part of a reasoning item."""

    text: str
    type: str = "reasoning_text"


class OutputText(msgspec.Struct):
    """The one part of a message. logprobs: one entry per token, where asked for."""

    text: str
    logprobs: list[TokenLogprob] = []
    annotations: list[None] = []
    type: str = "output_text"


class ReasoningItem(msgspec.Struct, kw_only=True, tag="reasoning", tag_field="type"):
    """What the model thought."""

    id: str
    status: str
    summary: list[None] = []
    content: list[ReasoningText]
    encrypted_content: None = None


class MessageItem(msgspec.Struct, kw_only=True, tag="message", tag_field="type"):
    """What it said."""

    id: str
    status: str
    role: str = "assistant"
    content: list[OutputText]


class CallItem(msgspec.Struct, kw_only=True, tag="function_call", tag_field="type"):
    """What it calls. arguments: JSON text."""

    id: str
    status: str
    call_id: str
    name: str
    arguments: str


Item = ReasoningItem | MessageItem | CallItem


class InputTokensDetails(msgspec.Struct):
    """cached_tokens: those of the input that were not computed again."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(msgspec.Struct):
    """reasoning_tokens: those of the output before its answer."""

    reasoning_tokens: int


class ResponseUsage(msgspec.Struct, kw_only=True):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(msgspec.Struct):
    """Why a response ended early."""

    reason: str


class ResponseError(msgspec.Struct):
    """Why it failed."""

    message: str
    code: str = "server_error"


class Response(msgspec.Struct, kw_only=True):
    """The answer; below ``output``, what the request asked for and what became of it."""

    id: str
    object: str = "response"
    created_at: int
    completed_at: int | None = None
    status: str
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[Item] = []
    usage: ResponseUsage | None = None
    background: bool = False
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: None = None
    prompt_cache_key: str | None
    reasoning: dict[str, str | None]
    safety_identifier: str | None
    service_tier: str = "default"
    store: bool = False
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    top_p: float
    truncation: str = "disabled"
    user: str | None


class Items:
    """Blocks as items, whose ids stay the same from event to event."""

    def __init__(self) -> None:
        self._stem = secrets.token_hex(16)

    def id(self, block: Block) -> str:
        """The id of a block's item."""
        return f"{PREFIXES[block.kind]}_{self._stem}{block.index}"

    def item(self, block: Block, final: bool = False) -> Item:
        """A block as far as it is known; final: nothing will come any more."""
        name, status = self.id(block), STATUSES["cut" if final and block.state == "open" else block.state]
        if block.kind == "call":
            return CallItem(id=name, status=status, call_id=f"call_{self._stem}{block.index}", name=block.name,
                            arguments=block.text)
        if block.kind == "reasoning":
            return ReasoningItem(id=name, status=status, content=[ReasoningText(block.text)] if block.parts else [])
        begun = block.parts or block.state != "open"
        return MessageItem(id=name, status=status, content=[OutputText(block.text, block.logprobs)] if begun else [])


class Events:
    """The events of one stream, numbered."""

    def __init__(self, items: Items) -> None:
        self._items, self._number, self._heads = items, 0, dict[int, bytes]()

    def event(self, name: str, /, **fields: object) -> bytes:
        """An event with these fields."""
        data = encode_event({"type": name, "sequence_number": self._number, **fields})
        self._number += 1
        return named_event(name, data)

    def change(self, change: Change) -> bytes:
        """The events that tell of a change of a block."""
        if change.what == "more":
            return self._more(change)
        return self._open(change.block) if change.what == "open" else self._close(change.block)

    def _open(self, block: Block) -> bytes:
        fresh = Block(block.index, block.kind, block.name)  # the news may have filled it already
        data = self.event("response.output_item.added", output_index=block.index, item=self._items.item(fresh))
        if block.kind == "call":
            return data
        part = OutputText("") if block.kind == "text" else ReasoningText("")
        return data + self.event("response.content_part.added", **self._place(block), part=part)

    def _more(self, change: Change) -> bytes:
        block = change.block
        head = self._heads.get(block.index)
        if head is None:  # of thousands of events, these are all but a few
            name = f"{EVENTS[block.kind]}.delta"
            fields = encode_event({"type": name, **self._place(block)})
            head = self._heads[block.index] = b"event: " + name.encode() + b"\ndata: " + fields[:-1] + b',"delta":'
        logprobs = b',"logprobs":' + encode_event(change.logprobs) if block.kind == "text" else b""
        number = self._number
        self._number += 1
        return head + quote(change.text) + logprobs + b',"sequence_number":%d}\n\n' % number

    def _close(self, block: Block) -> bytes:
        name, item = f"{EVENTS[block.kind]}.done", self._items.item(block)
        if isinstance(item, CallItem):
            data = self.event(name, **self._place(block), name=block.name, arguments=item.arguments)
        else:
            part = item.content[0]
            logprobs = {"logprobs": block.logprobs} if block.kind == "text" else {}
            data = self.event(name, **self._place(block), text=part.text, **logprobs)
            data += self.event("response.content_part.done", **self._place(block), part=part)
        return data + self.event("response.output_item.done", output_index=block.index, item=item)

    def _place(self, block: Block) -> dict[str, object]:
        place: dict[str, object] = {"item_id": self._items.id(block), "output_index": block.index}
        return place if block.kind == "call" else place | {"content_index": 0}
