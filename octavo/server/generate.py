"""/generate: the plain API of vLLM 0.1.0.

Owns its schema, which is a prompt and SamplingParams under their own names, and its answers, which repeat the prompt; a stream
of it holds the whole text again with every object, each ended by a zero byte. Invariant: what is refused is refused in the same
words as by the other routes.
"""

import msgspec
from starlette.types import Receive, Scope, Send

from octavo.server.completions import default_max_tokens
from octavo.server.errors import ApiError
from octavo.server.exchange import News, serve
from octavo.server.sampling_fields import (
    ParamFields,
    Prompts,
    check_length,
    check_timeout,
    make_asks,
    need_tokenizer,
    plain_constraint,
    to_params,
)
from octavo.server.service import Service

BINARY = "application/octet-stream"


class GenerateRequest(ParamFields, kw_only=True, forbid_unknown_fields=True):
    """The body. Special-token strings in the prompt are special tokens."""

    prompt: str
    stream: bool | None = None


class GenerateResponse(msgspec.Struct):
    """One text per continuation, each beginning with the prompt."""

    text: list[str]


class GenerateExchange:
    """One request under way; see Exchange."""

    media_type = BINARY

    def __init__(self, service: Service, request: GenerateRequest, key_salt: str) -> None:
        max_tokens = default_max_tokens(request) if request.max_tokens is None else request.max_tokens
        params = to_params(request, service, max_tokens=max_tokens, structured=plain_constraint(request, service))
        check_length(request.prompt, None, service)
        prompts = Prompts([request.prompt], [need_tokenizer(service).encode(request.prompt)])
        self.asks = make_asks(prompts, params, service, key_salt, explicit_max=request.max_tokens is not None)
        self.timeout, self.streams = check_timeout(request.timeout), bool(request.stream)
        self._texts = [[request.prompt] for _ in range(params.n)]

    def events(self, news: News) -> bytes:
        """All texts so far."""
        self.fold(news)
        return self.answer() + b"\0"

    def ending(self) -> bytes:
        """Nothing: the last object holds everything."""
        return b""

    def failure(self, error: ApiError) -> bytes:
        """An error as one more object."""
        return error.body() + b"\0"

    def fold(self, news: News) -> None:
        """Take news into the texts."""
        for _, step in news:
            for delta in step.deltas:
                self._texts[delta.index].append(delta.text)

    def answer(self) -> bytes:
        """All texts so far."""
        return msgspec.json.encode(GenerateResponse(["".join(parts) for parts in self._texts]))


async def generate(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """POST /generate."""
    await serve(service, scope, receive, send, GenerateRequest, GenerateExchange)


ROUTES = (("POST", "/generate", generate),)
