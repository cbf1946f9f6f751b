"""Chunks of a stream as bytes: what is the same in every chunk is encoded once, and only the news are put between.

Owns the order of a chunk's keys and what usage looks like; it does not know what an API puts into a choice. Invariant: every
chunk of a stream is one JSON object without ends of line, with the same id, created and model, and at most one choice.
"""

import secrets
import time

import msgspec

from octavo.server.sse import encode_event, quote
from octavo.text.deltas import Step

_OPEN = b",\"logprobs\":null,\"finish_reason\":null}]"
_REASONS: dict[str | None, bytes] = {None: b"null", "stop": b'"stop"', "length": b'"length"', "tool_calls": b'"tool_calls"'}


class PromptTokensDetails(msgspec.Struct):
    """cached_tokens: those of the prompt that were not computed again."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Tokens of a request, all its prompts and choices together."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class Counter:
    """Counts the tokens of a request.

    Args:
        prompt_tokens: of all prompts. details: usage says what was cached.
    """

    def __init__(self, prompt_tokens: int, details: bool) -> None:
        self.prompt_tokens, self._details = prompt_tokens, details
        self.completion_tokens = self.cached_tokens = 0

    def take(self, step: Step) -> None:
        """Count what a step brought."""
        for delta in step.deltas:
            self.completion_tokens += len(delta.token_ids)
        if step.num_cached_tokens is not None:
            self.cached_tokens += step.num_cached_tokens

    def usage(self) -> Usage:
        """What has been counted so far."""
        details = PromptTokensDetails(self.cached_tokens) if self._details else None
        return Usage(self.prompt_tokens, self.prompt_tokens + self.completion_tokens, self.completion_tokens, details)


class Identity(msgspec.Struct):
    """What every chunk of an answer, and the answer itself, begin with. created: seconds since 1970."""

    id: str
    created: int
    model: str


def new_identity(prefix: str, request_id: str | None, model: str) -> Identity:
    """The identity of a new answer; a request's own id takes the place of a random one."""
    return Identity(f"{prefix}-{request_id or secrets.token_hex(16)}", int(time.time()), model)


class Chunks:
    """The chunks of one stream.

    Args:
        kind: their ``object``. include_usage: the last one holds usage, the others null in its place, or with
            ``continuous`` usage too.
    """

    def __init__(self, identity: Identity, kind: str, counter: Counter, include_usage: bool, continuous: bool) -> None:
        self._counter, self.continuous, self.include_usage = counter, continuous, include_usage
        self._front = (b'data: {"id":' + quote(identity.id) + b',"object":"' + kind.encode() + b'","created":'
                       + str(identity.created).encode() + b',"model":' + quote(identity.model) + b',"choices":[')
        self._back = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._plain = _OPEN + self._back
        self._heads: dict[int, bytes] = {}

    def plain(self, index: int, body: bytes) -> bytes:
        """A chunk with nothing but text: ``body`` is the choice's own key and value."""
        head = self._heads.get(index)
        if head is None:
            head = self._heads[index] = self._front + b'{"index":' + str(index).encode() + b","
        if self.continuous:
            return head + body + _OPEN + b',"usage":' + encode_event(self._counter.usage()) + b"}\n\n"
        return head + body + self._plain

    def full(self, index: int, body: bytes, finish_reason: str | None, stop_reason: int | str | None,
             logprobs: msgspec.Struct | None, extra: dict[str, object] | None = None) -> bytes:
        """A chunk with all that there may be; ``extra``: more keys of the choice."""
        data = self._front + b'{"index":' + str(index).encode() + b"," + body
        data += b',"logprobs":' + (b"null" if logprobs is None else encode_event(logprobs))
        data += b',"finish_reason":' + _REASONS[finish_reason]
        if finish_reason is not None:
            data += b',"stop_reason":' + encode_event(stop_reason)
        for name, value in (extra or {}).items():
            data += b"," + quote(name) + b":" + encode_event(value)
        if self.continuous:
            return data + b'}],"usage":' + encode_event(self._counter.usage()) + b"}\n\n"
        return data + b"}]" + self._back

    def last(self) -> bytes:
        """The chunk with usage, where it was asked for."""
        return self._front + b'],"usage":' + encode_event(self._counter.usage()) + b"}\n\n" if self.include_usage else b""

    def with_top(self, chunk: bytes, extra: dict[str, object]) -> bytes:
        """A chunk with more keys beside its choices."""
        more = b"".join(b"," + quote(name) + b":" + encode_event(value) for name, value in extra.items())
        return chunk[: -len(b"}\n\n")] + more + b"}\n\n"
