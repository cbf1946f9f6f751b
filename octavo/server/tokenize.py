"""/tokenize and /detokenize: what the model sees of a text or of a conversation, and back.

Owns these two schemas; how a conversation becomes ids is turn's. Invariant: the ids are exactly those that /v1/completions or
/v1/chat/completions would compute for the same fields.
"""

from typing import Any

import msgspec
from starlette.types import Receive, Scope, Send

from octavo.errors import RequestError
from octavo.server.exchange import look_up
from octavo.server.models import check_model
from octavo.server.prompting import Conversation
from octavo.server.sampling_fields import need_tokenizer
from octavo.server.service import Service
from octavo.server.turn import prompt_of


class TokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body: ``prompt``, or ``messages`` with what belongs to them.

    Attributes:
        add_special_tokens: by default true for a prompt, false for messages. return_token_strs: the ids' spelling too.
    """

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class TokenizeResponse(msgspec.Struct, kw_only=True):
    """The answer."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The body."""

    model: str | None = None
    tokens: list[int]


class DetokenizeResponse(msgspec.Struct):
    """The answer."""

    prompt: str


CHAT_ONLY = ("add_generation_prompt", "continue_final_message", "chat_template", "chat_template_kwargs", "tools")


def tokenized(service: Service, request: TokenizeRequest) -> bytes:
    """The answer to /tokenize; RequestError unless there is exactly one of prompt and messages."""
    check_model(service, request.model)
    tokenizer = need_tokenizer(service)
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("tokenize needs exactly one of prompt and messages.", "prompt")
    if request.prompt is not None:
        for name in CHAT_ONLY:
            if getattr(request, name) is not None:
                raise RequestError(f"{name} belongs to messages, not to a prompt.", name)
        ids = tokenizer.encode(request.prompt, request.add_special_tokens is not False)
    else:
        continues = bool(request.continue_final_message)
        generates = not continues if request.add_generation_prompt is None else request.add_generation_prompt
        _, ids = prompt_of(service, Conversation(
            messages=request.messages or [], tools=request.tools, add_generation_prompt=generates,
            continue_final_message=continues, chat_template=request.chat_template,
            template_kwargs=request.chat_template_kwargs), bool(request.add_special_tokens))
    strs = [tokenizer.id_to_piece(token) for token in ids] if request.return_token_strs else None
    return msgspec.json.encode(TokenizeResponse(
        count=len(ids), max_model_len=service.info.max_model_len, tokens=ids, token_strs=strs))


def detokenized(service: Service, request: DetokenizeRequest) -> bytes:
    """The answer to /detokenize; RequestError for an id beyond the vocabulary."""
    check_model(service, request.model)
    try:
        text = need_tokenizer(service).decode(request.tokens, skip_special_tokens=False)
    except RequestError as error:
        raise RequestError(str(error), "tokens") from None
    return msgspec.json.encode(DetokenizeResponse(text))


async def tokenize(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """POST /tokenize."""
    await look_up(service, scope, receive, send, TokenizeRequest, tokenized)


async def detokenize(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """POST /detokenize."""
    await look_up(service, scope, receive, send, DetokenizeRequest, detokenized)


ROUTES = (("POST", "/tokenize", tokenize), ("POST", "/detokenize", detokenize))
