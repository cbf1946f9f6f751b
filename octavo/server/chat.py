"""/v1/chat/completions: one turn of a conversation in OpenAI's shape.

Owns its schema and both forms of its answer; what happens in between is Turn's. Invariant: the whole answer is the fold of the
same Pieces from which the stream's chunks are made.
"""

import secrets
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from octavo.errors import RequestError
from octavo.server.chunks import Chunks, Usage, new_identity
from octavo.server.dialect import serve_dialect
from octavo.server.errors import ApiError
from octavo.server.exchange import News
from octavo.server.logprobs import ChatLogprobs, PromptLogprobs, TokenNames, prompt_entries
from octavo.server.models import check_model
from octavo.server.prompting import Conversation
from octavo.server.sampling_fields import SamplingFields, usage_wishes
from octavo.server.service import Service
from octavo.server.sse import DONE, EVENT_STREAM, event, quote
from octavo.server.tools.events import CallArguments, CallStart, Content, Event, Reasoning
from octavo.server.turn import Piece, Turn

CALL_PREFIX = "chatcmpl-tool-"
_ROLE = b'"delta":{"role":"assistant","content":""}'
_NOTHING = b'"delta":{}'


class ChatRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """The body; see SamplingFields and Conversation.

    Attributes:
        max_completion_tokens, max_tokens: two names of one thing; None fills what fits.
        logprobs, top_logprobs: whether each token comes with its logprob, and with how many alternatives.
        modalities: ["text"].
    """

    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    include_reasoning: bool | None = None
    modalities: list[str] | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CalledFunction(msgspec.Struct):
    """arguments: JSON text."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct):
    """A call that the model makes."""

    id: str
    type: str
    function: CalledFunction


class ChatMessage(msgspec.Struct, kw_only=True):
    """The answer's message. tool_calls is absent without calls; reasoning stands under its new and its old name."""

    role: str = "assistant"
    content: str | None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    """One of the n answers. The last two are vLLM's."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None


class ChatResponse(msgspec.Struct, kw_only=True):
    """The answer. The last two are vLLM's."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    service_tier: str | None = None
    system_fingerprint: str | None = None
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None
    prompt_token_ids: list[int] | None = None


@dataclass(slots=True)
class Message:
    """The events of one choice, put together.

    Attributes:
        calls: (name, arguments in fragments), in order.
    """

    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[tuple[str, list[str]]] = field(default_factory=list)

    def take(self, one: Event) -> None:
        """Add an event."""
        if isinstance(one, Content):
            self.content.append(one.text)
        elif isinstance(one, Reasoning):
            self.reasoning.append(one.text)
        elif isinstance(one, CallStart):
            self.calls.append((one.name, []))
        elif isinstance(one, CallArguments):
            self.calls[one.index][1].append(one.fragment)


@dataclass(slots=True)
class _Choice:
    begun: bool = False
    message: Message = field(default_factory=Message)
    token_ids: list[int] = field(default_factory=list)
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ChatExchange:
    """One request under way; see Exchange."""

    media_type = EVENT_STREAM

    def __init__(self, service: Service, request: ChatRequest, key_salt: str) -> None:
        model = check_model(service, request.model)
        self._request, self._top = request, _top_logprobs(request)
        if request.modalities is not None and request.modalities != ["text"]:
            raise RequestError(f"modalities must be ['text'], got {request.modalities!r:.200}.", "modalities")
        self._turn = turn = Turn(service, request, conversation(request), key_salt, max_tokens=_max_tokens(request),
                                 logprobs=self._top)
        self.asks, self.timeout, self.streams = turn.asks, turn.timeout, bool(request.stream)
        self._names = TokenNames(turn.tokenizer, bool(request.return_tokens_as_token_ids))
        self._choices = [_Choice() for _ in range(turn.params.n)]
        self._identity = new_identity("chatcmpl", request.request_id, model)
        self._chunks = Chunks(
            self._identity, "chat.completion.chunk", turn.counter, *usage_wishes(request, service.server))
        self._is_plain = self._top is None and not request.return_token_ids

    def events(self, news: News) -> bytes:
        """The chunks of some news."""
        return b"".join(self._chunk(piece) for piece in self._turn.pieces(news))

    def ending(self) -> bytes:
        """Usage, where asked for, and the mark of the end."""
        return self._chunks.last() + DONE

    def failure(self, error: ApiError) -> bytes:
        """An error, and the mark of the end."""
        return event(error.body()) + DONE

    def fold(self, news: News) -> None:
        """Take pieces into the choices."""
        for piece in self._turn.pieces(news):
            choice = self._choices[piece.index]
            for one in piece.events:
                choice.message.take(one)
            choice.token_ids += piece.token_ids
            if (logprobs := self._logprobs(piece)) is not None:
                if choice.logprobs is None:
                    choice.logprobs = logprobs
                else:
                    choice.logprobs.content += logprobs.content
            if piece.finish_reason is not None:
                choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason

    def answer(self) -> bytes:
        """The whole answer."""
        request, turn, known = self._request, self._turn, self._identity
        entries = None
        if request.prompt_logprobs is not None:
            entries = prompt_entries(turn.prompt_logprobs or [], turn.prompt_ids, request.prompt_logprobs)
        return msgspec.json.encode(ChatResponse(
            id=known.id, created=known.created, model=known.model,
            choices=[self._whole(index, choice) for index, choice in enumerate(self._choices)],
            usage=turn.counter.usage(), prompt_logprobs=entries,
            prompt_token_ids=turn.prompt_ids if request.return_token_ids else None))

    def _whole(self, index: int, choice: _Choice) -> ChatChoice:
        return ChatChoice(
            index=index, message=whole_message(choice.message), logprobs=choice.logprobs, finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason, token_ids=choice.token_ids if self._request.return_token_ids else None)

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if self._top is None:
            return None
        return self._names.chat(piece.logprobs or [], piece.token_ids, self._top)

    def _chunk(self, piece: Piece) -> bytes:
        data, choice = b"", self._choices[piece.index]
        if not choice.begun:
            choice.begun = True
            data = self._chunks.plain(piece.index, _ROLE)
            if self._request.return_token_ids:
                data = self._chunks.with_top(data, {"prompt_token_ids": self._turn.prompt_ids})
        bodies = [body for one in piece.events if (body := _delta(one))]
        if self._is_plain and piece.finish_reason is None:
            if not bodies and self._chunks.continuous:
                bodies = [_NOTHING]
            for body in bodies:
                data += self._chunks.plain(piece.index, body)
            return data
        for body in bodies[:-1]:
            data += self._chunks.plain(piece.index, body)
        extra: dict[str, object] = {"token_ids": piece.token_ids} if self._request.return_token_ids else {}
        return data + self._chunks.full(piece.index, bodies[-1] if bodies else _NOTHING, piece.finish_reason,
                                        piece.stop_reason, self._logprobs(piece), extra)


def _delta(one: Event) -> bytes:
    """An event as the delta of a chunk; nothing for the end of a call."""
    if isinstance(one, Content):
        return b'"delta":{"content":' + quote(one.text) + b"}"
    if isinstance(one, Reasoning):
        text = quote(one.text)
        return b'"delta":{"reasoning":' + text + b',"reasoning_content":' + text + b"}"
    if isinstance(one, CallStart):
        return (b'"delta":{"tool_calls":[{"index":%d,"id":"%s","type":"function","function":{"name":' % (
            one.index, new_call_id().encode()) + quote(one.name) + b',"arguments":""}}]}')
    if isinstance(one, CallArguments):
        return b'"delta":{"tool_calls":[{"index":%d,"function":{"arguments":' % one.index + quote(one.fragment) + b"}}]}"
    return b""


def whole_message(message: Message) -> ChatMessage:
    """Events put together as OpenAI's message."""
    calls = [ToolCall(new_call_id(), "function", CalledFunction(name, "".join(parts))) for name, parts in message.calls]
    reasoning = "".join(message.reasoning) or None
    content = "".join(message.content)
    return ChatMessage(
        content=content if content or not (calls or reasoning) else None, tool_calls=calls or msgspec.UNSET,
        reasoning=reasoning, reasoning_content=reasoning)


def new_call_id() -> str:
    """An id for a tool call."""
    return CALL_PREFIX + secrets.token_hex(16)


def conversation(request: ChatRequest) -> Conversation:
    """What a chat request says."""
    return Conversation(
        messages=request.messages, tools=request.tools, tool_choice=request.tool_choice,
        parallel_tool_calls=request.parallel_tool_calls is not False,
        include_reasoning=request.include_reasoning is not False,
        add_generation_prompt=(not request.continue_final_message if request.add_generation_prompt is None
                               else request.add_generation_prompt),
        continue_final_message=bool(request.continue_final_message), echo=bool(request.echo),
        chat_template=request.chat_template, template_kwargs=request.chat_template_kwargs, documents=request.documents,
        reasoning_effort=request.reasoning_effort)


def _max_tokens(request: ChatRequest) -> int | None:
    new, old = request.max_completion_tokens, request.max_tokens
    if new is not None and old is not None and new != old:
        raise RequestError(f"max_tokens ({old}) and max_completion_tokens ({new}) contradict each other.", "max_tokens")
    return old if new is None else new


def _top_logprobs(request: ChatRequest) -> int | None:
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true.", "top_logprobs")
    if not request.logprobs:
        return None
    if (request.top_logprobs or 0) < 0:
        raise RequestError(f"top_logprobs must be 0 or more, got {request.top_logprobs}.", "top_logprobs")
    return request.top_logprobs or 0


async def create_chat_completion(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """POST /v1/chat/completions."""
    await serve_dialect(service, scope, receive, send, ChatRequest, ChatExchange, _names)


def _names(request: ChatRequest) -> dict[str, str]:
    """Under which names this client knows what the engine has one name for."""
    names = {"logprobs": "top_logprobs",  # the number of them; logprobs itself is a switch here
             "prompt": "messages"}
    if request.max_tokens is None and request.max_completion_tokens is not None:
        names["max_tokens"] = "max_completion_tokens"
    return names


ROUTES = (("POST", "/v1/chat/completions", create_chat_completion),)
