"""/v1/completions: prompts to be continued.

Owns its schema, the echo of prompts, and both forms of its answer; how to sample is sampling_fields', how to send is
exchange's. Invariant: the whole answer is the fold of the same pieces from which the stream's chunks are made. Choices are
numbered prompt by prompt: choice ``i`` of prompt ``p`` has the index ``p * n + i``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import msgspec
from starlette.types import Receive, Scope, Send

from octavo.errors import RequestError
from octavo.outputs import PositionLogprobs
from octavo.params import SamplingParams
from octavo.server.chunks import Chunks, Counter, Usage, new_identity
from octavo.server.errors import ApiError
from octavo.server.exchange import News, serve
from octavo.server.logprobs import CompletionLogprobs, Offsets, PromptLogprobs, TokenNames, prompt_entries
from octavo.server.models import check_model
from octavo.server.sampling_fields import (
    ParamFields,
    Prompts,
    SamplingFields,
    check_fields,
    check_length,
    check_timeout,
    constraint,
    make_asks,
    need_tokenizer,
    to_params,
    truncated,
    usage_wishes,
)
from octavo.server.service import Service
from octavo.server.sse import DONE, EVENT_STREAM, event, quote
from octavo.text.deltas import Delta
from octavo.text.vocabulary import Tokenizer

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """The body.

    Attributes:
        prompt: a text, ids, or a list of texts or of lists of ids; special-token strings in texts are special tokens.
        logprobs: how many alternatives per token; 0 is the token alone. max_tokens: 0 with echo only scores the prompt.
        echo: the answer begins with the prompt.
    """

    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One continuation. The last three are vLLM's."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionResponse(msgspec.Struct, kw_only=True):
    """The answer."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    service_tier: str | None = None
    system_fingerprint: str | None = None
    usage: Usage


@dataclass(slots=True)
class Piece:
    """What one step adds to one choice, the echo included."""

    text: str
    token_ids: list[int]
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None


@dataclass(slots=True)
class _Choice:
    begun: bool = False
    told: bool = False  # the prompt's ids
    offsets: Offsets | None = None
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class _Echo:
    """One prompt as its choices show it.

    Args:
        text: as it was given, None where ids were; then the echo is their text.

    Attributes:
        logprobs: of its tokens, where they are asked for.
    """

    logprobs: CompletionLogprobs | None = None

    def __init__(self, text: str | None, ids: Sequence[int], params: SamplingParams, tokenizer: Tokenizer) -> None:
        skip, spaces = params.skip_special_tokens, params.spaces_between_special_tokens
        shift = 0
        if text is None:
            self.text = tokenizer.decode_generated(ids, skip, spaces, ())
        else:  # special tokens that were written are seen in it, one that was put before it is not
            self.text, skip = text, False
            shift = max(0, len(tokenizer.decode_generated(ids, skip, spaces, ())) - len(text))
        self.offsets = Offsets(tokenizer.stream(skip, spaces), -shift).take(ids)


class CompletionExchange:
    """One request under way; see Exchange."""

    media_type = EVENT_STREAM

    def __init__(self, service: Service, request: CompletionRequest, key_salt: str) -> None:
        self._request, self._tokenizer = request, need_tokenizer(service)
        model = check_model(service, request.model)
        check_fields(request)
        self._scores = request.max_tokens == 0
        if self._scores and not request.echo:
            raise RequestError("max_tokens must be at least 1 without echo, got 0.", "max_tokens")
        max_tokens = default_max_tokens(request) if request.max_tokens is None else request.max_tokens
        about_prompt = [request.prompt_logprobs, request.logprobs if request.echo else None]
        self._params = params = to_params(
            request, service, max_tokens=1 if self._scores else max_tokens, structured=constraint(request, service),
            logprobs=request.logprobs, prompt_logprobs=max((k for k in about_prompt if k is not None), default=None))
        for given in [request.prompt] if isinstance(request.prompt, str) else request.prompt[: service.server.max_prompts]:
            if isinstance(given, str):
                check_length(given, request.truncate_prompt_tokens, service)
        prompts = read_prompts(
            request.prompt, self._tokenizer, request.add_special_tokens is not False, service.server.max_prompts)
        prompts = truncated(prompts, request.truncate_prompt_tokens, params.max_tokens, service)
        self.asks = make_asks(
            prompts, params, service, key_salt, explicit_max=request.max_tokens is not None, fields=request,
            scored=params.n)
        self.timeout, self.streams = check_timeout(request.timeout), bool(request.stream)
        self._texts, self._ids = prompts.texts, prompts.ids
        self._names = TokenNames(self._tokenizer, bool(request.return_tokens_as_token_ids))
        self._choices = [_Choice() for _ in range(params.n * len(self._ids))]
        self._prompt_logprobs: dict[int, list[PositionLogprobs | None]] = {}
        self._echoes: dict[int, _Echo] = {}
        self._counter = Counter(sum(map(len, self._ids)), service.server.enable_prompt_tokens_details)
        self._identity = new_identity("cmpl", request.request_id, model)
        self._chunks = Chunks(self._identity, "text_completion", self._counter, *usage_wishes(request, service.server))
        self._is_plain = request.logprobs is None and not request.return_token_ids

    def events(self, news: News) -> bytes:
        """The chunks of some news."""
        return b"".join(self._chunk(*piece) for piece in self._pieces(news))

    def ending(self) -> bytes:
        """Usage, where asked for, and the mark of the end."""
        return self._chunks.last() + DONE

    def failure(self, error: ApiError) -> bytes:
        """An error, and the mark of the end."""
        return event(error.body()) + DONE

    def fold(self, news: News) -> None:
        """Take pieces into the choices."""
        for index, piece in self._pieces(news):
            choice = self._choices[index]
            choice.texts.append(piece.text)
            choice.token_ids += piece.token_ids
            if choice.logprobs is None:
                choice.logprobs = piece.logprobs
            elif piece.logprobs is not None:
                choice.logprobs.extend(piece.logprobs)
            if piece.finish_reason is not None:
                choice.finish_reason, choice.stop_reason = piece.finish_reason, piece.stop_reason

    def answer(self) -> bytes:
        """The whole answer."""
        asked, n = self._request.prompt_logprobs, self._params.n
        scores = [] if asked is None else [
            prompt_entries(self._prompt_logprobs[number], ids, asked) for number, ids in enumerate(self._ids)]
        choices = [self._whole(index, choice, scores[index // n] if scores else None)
                   for index, choice in enumerate(self._choices)]
        response = CompletionResponse(id=self._identity.id, created=self._identity.created, model=self._identity.model,
                                      choices=choices, usage=self._counter.usage())
        return msgspec.json.encode(response)

    def _pieces(self, news: News) -> Iterator[tuple[int, Piece]]:
        for number, step in news:
            self._counter.take(step)
            if self._scores:  # the token that the engine cannot do without
                self._counter.completion_tokens = 0
            if step.prompt_logprobs is not None:
                self._prompt_logprobs[number] = step.prompt_logprobs
            for delta in step.deltas:
                index = number * self._params.n + delta.index
                yield index, self._piece(number, self._choices[index], delta)

    def _piece(self, number: int, choice: _Choice, delta: Delta) -> Piece:
        piece = Piece(delta.text, delta.token_ids, None, delta.finish_reason, delta.stop_reason)
        if self._scores:
            piece.text, piece.token_ids = "", []
            piece.finish_reason, piece.stop_reason = delta.finish_reason and "length", None
        echo = None
        if self._request.echo and not choice.begun:
            echo = self._echo(number)
            piece.text = echo.text + piece.text
        if (top := self._request.logprobs) is not None:
            if choice.offsets is None:
                stream = self._tokenizer.stream(
                    self._params.skip_special_tokens, self._params.spaces_between_special_tokens, self._ids[number])
                choice.offsets = Offsets(stream, 0 if echo is None else len(echo.text))
            piece.logprobs = CompletionLogprobs()
            if echo is not None and echo.logprobs is not None:
                piece.logprobs.extend(echo.logprobs)
            if not self._scores:
                offsets = choice.offsets.take(delta.token_ids)
                piece.logprobs.extend(self._names.completion(delta.logprobs or [], delta.token_ids, top, offsets))
        choice.begun = True
        return piece

    def _echo(self, number: int) -> _Echo:
        """A prompt's echo, which is the same for all of its choices."""
        echo = self._echoes.get(number)
        if echo is None:
            ids = self._ids[number]
            echo = self._echoes[number] = _Echo(self._texts[number], ids, self._params, self._tokenizer)
            if (top := self._request.logprobs) is not None:
                echo.logprobs = self._names.completion(self._prompt_logprobs[number], ids, top, echo.offsets)
        return echo

    def _chunk(self, index: int, piece: Piece) -> bytes:
        number = index // self._params.n
        body = b'"text":' + quote(piece.text)
        if self._is_plain and piece.finish_reason is None:
            return self._chunks.plain(index, body) if piece.text or self._chunks.continuous else b""
        extra: dict[str, object] = {}
        if self._request.return_token_ids:
            extra["token_ids"] = piece.token_ids
            if not self._choices[index].told:
                extra["prompt_token_ids"] = self._ids[number]
                self._choices[index].told = True
        return self._chunks.full(index, body, piece.finish_reason, piece.stop_reason, piece.logprobs, extra)

    def _whole(self, index: int, choice: _Choice, scores: PromptLogprobs | None) -> CompletionChoice:
        number, request = index // self._params.n, self._request
        return CompletionChoice(
            index=index, text="".join(choice.texts), logprobs=choice.logprobs, finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason, token_ids=choice.token_ids if request.return_token_ids else None,
            prompt_token_ids=self._ids[number] if request.return_token_ids else None, prompt_logprobs=scores)


def default_max_tokens(request: ParamFields) -> int:
    """max_tokens where the client names none: few, but as many as it wants at least."""
    return max(DEFAULT_MAX_TOKENS, request.min_tokens or 0)


def read_prompts(prompt: str | list[str | int | list[int]], tokenizer: Tokenizer, add_special_tokens: bool, most: int) -> Prompts:
    """All forms of a prompt as lists of ids, with their texts where there are any.

    Raises:
        RequestError: a mixture, or more than ``most`` prompts, which are then not looked at.
    """
    given = [prompt] if isinstance(prompt, str) else prompt
    if not given:
        raise RequestError("prompt must not be empty, got [].", "prompt")
    kinds = {type(item) for item in given}
    if kinds != {int} and len(given) > most:
        raise RequestError(f"a request may have {most} prompts, got {len(given)}.", "prompt")
    if kinds == {str}:
        return Prompts(list(given), tokenizer.encode_batch(given, add_special_tokens))  # type: ignore[arg-type]
    if kinds == {int}:
        return Prompts([None], [given])  # type: ignore[list-item]
    if kinds == {list}:
        return Prompts([None] * len(given), given)  # type: ignore[arg-type]
    raise RequestError("prompt must be a text, ids, or a list of only texts or only lists of ids.", "prompt")


async def create_completion(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """POST /v1/completions."""
    await serve(service, scope, receive, send, CompletionRequest, CompletionExchange)


ROUTES = (("POST", "/v1/completions", create_completion),)
