"""/v1/responses: one turn of a conversation in the shape of OpenAI's Responses, of which nothing is kept.

Owns both forms of the answer; what a request says is responses_input's, how an answer is written responses_output's. Invariant:
the whole answer is the response of the stream's last event.
"""

import secrets
import time

import msgspec
from starlette.types import Receive, Scope, Send

from octavo.server.blocks import Block, Blocks, Change
from octavo.server.chunks import Identity
from octavo.server.dialect import serve_dialect
from octavo.server.errors import ApiError
from octavo.server.exchange import News
from octavo.server.logprobs import TokenLogprob, TokenNames
from octavo.server.models import check_model
from octavo.server.responses_input import (
    NAMES,
    ResponsesRequest,
    check_request,
    conversation,
    sampling_fields,
    top_logprobs,
)
from octavo.server.responses_output import (
    Events,
    IncompleteDetails,
    InputTokensDetails,
    Items,
    OutputTokensDetails,
    Response,
    ResponseError,
    ResponseUsage,
)
from octavo.server.service import Service
from octavo.server.sse import EVENT_STREAM
from octavo.server.turn import Piece, Turn


class ResponsesExchange:
    """One request under way; see Exchange."""

    media_type = EVENT_STREAM

    def __init__(self, service: Service, request: ResponsesRequest, key_salt: str) -> None:
        model = check_model(service, request.model)
        check_request(request)
        self._request, self._top = request, top_logprobs(request)
        self._turn = turn = Turn(service, sampling_fields(request), conversation(request), key_salt,
                                 max_tokens=request.max_output_tokens, logprobs=self._top)
        self.asks, self.timeout, self.streams = turn.asks, turn.timeout, bool(request.stream)
        self._names = TokenNames(turn.tokenizer, False)
        self._identity = Identity(f"resp_{request.request_id or secrets.token_hex(16)}", int(time.time()), model)
        self._blocks, self._items = Blocks(), Items()
        self._events = Events(self._items)
        self._finish_reason: str | None = None
        self._begun = False
        self._reasoning_tokens = self._unplaced_tokens = 0
        self._unplaced: list[TokenLogprob] = []

    def events(self, news: News) -> bytes:
        """The events of some news."""
        data = []
        if not self._begun:
            self._begun = True
            response = self._response("in_progress")
            data = [self._events.event(f"response.{name}", response=response) for name in ("created", "in_progress")]
        for piece in self._turn.pieces(news):
            data += [self._events.change(change) for change in self._take(piece)]
        return b"".join(data)

    def ending(self) -> bytes:
        """The event with the whole response."""
        response = self._final()
        return self._events.event(f"response.{response.status}", response=response)

    def failure(self, error: ApiError) -> bytes:
        """The response as far as it came, and the error: clients look for the one or for the other."""
        response = self._response("failed")
        response.error = ResponseError(error.message)
        return self._events.event("response.failed", response=response) + self._events.event(
            "error", code=error.code or error.type, message=error.message, param=error.param)

    def fold(self, news: News) -> None:
        """Take pieces into the blocks."""
        for piece in self._turn.pieces(news):
            self._take(piece)

    def answer(self) -> bytes:
        """The whole response."""
        return msgspec.json.encode(self._final())

    def _take(self, piece: Piece) -> list[Change]:
        changes = self._blocks.take(piece)
        last = self._blocks.last
        # Marks around reasoning are of no block; they count as reasoning.
        self._unplaced_tokens += len(piece.token_ids)
        if last is not None:
            self._reasoning_tokens += self._unplaced_tokens if last.kind == "reasoning" else 0
            self._unplaced_tokens = 0
        if self._top is not None:
            self._place_logprobs(piece, changes, last)
        if piece.finish_reason is not None:
            self._finish_reason = piece.finish_reason
        return changes

    def _place_logprobs(self, piece: Piece, changes: list[Change], last: Block | None) -> None:
        """Give the logprobs of a piece's tokens to the text that these tokens write, if it is one."""
        self._unplaced += self._names.chat(piece.logprobs or [], piece.token_ids, self._top or 0).content
        told = next((change for change in changes if change.what == "more" and change.block.kind == "text"), None)
        if told is None and changes and changes[-1].block.kind == "text" and piece.finish_reason is not None:
            told = Change("more", changes[-1].block)  # the end token, which has no text
            changes.insert(-1, told)
        if told is not None:
            told.logprobs = self._unplaced
            told.block.logprobs += self._unplaced
        if changes or (last is not None and last.kind != "text"):
            self._unplaced = []

    def _final(self) -> Response:
        if self._finish_reason != "length":
            return self._response("completed")
        response = self._response("incomplete")
        response.incomplete_details = IncompleteDetails("max_output_tokens")
        return response

    def _response(self, status: str) -> Response:
        request, params, known = self._request, self._turn.params, self._identity
        begun, counter = status == "in_progress", self._turn.counter
        usage = ResponseUsage(
            input_tokens=counter.prompt_tokens, input_tokens_details=InputTokensDetails(counter.cached_tokens),
            output_tokens=counter.completion_tokens, output_tokens_details=OutputTokensDetails(self._reasoning_tokens),
            total_tokens=counter.prompt_tokens + counter.completion_tokens)
        wanted = None if request.text is None else request.text.format
        form = {} if wanted is None else msgspec.structs.asdict(wanted)
        effort = None if request.reasoning is None else request.reasoning.effort
        return Response(
            id=known.id, created_at=known.created, completed_at=int(time.time()) if status == "completed" else None,
            status=status, model=known.model, usage=None if begun else usage,
            output=[] if begun else [self._items.item(block, final=True) for block in self._blocks.row],
            instructions=request.instructions, max_output_tokens=request.max_output_tokens, metadata=request.metadata or {},
            parallel_tool_calls=request.parallel_tool_calls is not False, prompt_cache_key=request.prompt_cache_key,
            reasoning={"effort": effort, "summary": None}, safety_identifier=request.safety_identifier,
            temperature=params.temperature, tools=request.tools or [], top_logprobs=self._top or 0, top_p=params.top_p,
            text={"format": {name: value for name, value in form.items() if value is not None} or {"type": "text"}},
            tool_choice="auto" if request.tool_choice is None else request.tool_choice, user=request.user)


async def create_response(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """POST /v1/responses."""
    await serve_dialect(service, scope, receive, send, ResponsesRequest, ResponsesExchange, lambda request: NAMES)


async def get_response(service: Service, scope: Scope, receive: Receive, send: Send) -> None:
    """GET /v1/responses/{id}: it is not there."""
    raise ApiError(404, "There is no such response: this server keeps none.")


ROUTES = (("POST", "/v1/responses", create_response), ("GET", "/v1/responses/{response_id}", get_response))
