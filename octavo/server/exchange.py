"""One request of a generating API from its body to its last byte: read, open, pass the news on, end.

Owns the order of these and what happens to errors on the way; it does not know any API: that is the Exchange. Invariants:
what fails before the first byte is raised, for the app to give it a status; what fails after it becomes the stream's last
event; a client that goes away ends its request.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from octavo.engine.update import BAD_GRAMMAR
from octavo.errors import OctavoError, RequestError
from octavo.log import get_logger
from octavo.server.admission import Ticket
from octavo.server.errors import ApiError, to_api_error
from octavo.server.http import cutter, key_salt, read_json_body, run_until_disconnect
from octavo.server.service import OFF_LOOP_CHARS, Ask, Service
from octavo.server.sse import EventStream, send_json
from octavo.server.stream import Stream
from octavo.server.strict import decode
from octavo.text.deltas import Step

logger = get_logger(__name__)

FAILED = "The request failed."
COMPILED = ("tools", "response_format", "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
            "text", "output_config")
"""Fields for which something is compiled, so that even a short request may take a while to begin."""
OFF_LOOP_LOGPROBS = 2_000
"""So many logprobs are written in a thread: they take milliseconds."""
_writer = ThreadPoolExecutor(1, thread_name_prefix="octavo-answer")  # of Python's; more of them would only wait for each other
K = TypeVar("K", bound=msgspec.Struct)
T = TypeVar("T")
News = list[tuple[int, Step]]


class Exchange(Protocol):
    """One API's part of a request. ``events`` and ``fold`` see the same news; one of the two is used.

    Attributes:
        asks: what to generate. timeout: seconds, as the request says. streams: the answer comes piece by piece.
        media_type: of a stream.
    """

    asks: list[Ask]
    timeout: float | None
    streams: bool
    media_type: str

    def events(self, news: News) -> bytes:
        """The next piece of the stream; may be empty."""

    def ending(self) -> bytes:
        """The last piece."""

    def failure(self, error: ApiError) -> bytes:
        """The last piece of a stream that goes wrong."""

    def fold(self, news: News) -> None:
        """Take the news into the whole answer."""

    def answer(self) -> bytes:
        """The whole answer, JSON."""


Begin = Callable[[Service, K, str], Exchange]


async def serve(service: Service, scope: Scope, receive: Receive, send: Send, kind: type[K], begin: Begin[K]) -> None:
    """Answer one HTTP request.

    Args:
        kind: of its body. begin: (service, body, salt of the client's key) -> Exchange; may run in a thread.

    Raises:
        OctavoError: before anything was sent. ClientDisconnected: the client left.
    """
    with service.admission.enter() as ticket:
        body = await read_json_body(scope, receive, service.server, ticket.hold)
        await run_until_disconnect(receive, _answer(service, scope, send, kind, begin, ticket, body))


async def look_up(service: Service, scope: Scope, receive: Receive, send: Send, kind: type[K],
                  work: Callable[[Service, K], bytes]) -> None:
    """Answer an HTTP request for which nothing is generated; it counts as one that is inside all the same.

    Args:
        kind: of its body. work: makes the answer's body; may run in a thread.
    """
    with service.admission.enter() as ticket:
        body = await read_json_body(scope, receive, service.server, ticket.hold)
        request = decode(body, kind, max_depth=service.server.max_json_depth)
        found = service.off_loop(_weight(request, body), work, service, request, lookup=True)
        await send_json(send, await run_until_disconnect(receive, found))


def _weight(request: msgspec.Struct, body: bytes) -> int:
    """How long the text work of a request takes, in characters; compiling a grammar counts as long."""
    return OFF_LOOP_CHARS if any(getattr(request, name, None) is not None for name in COMPILED) else len(body)


async def _answer(service: Service, scope: Scope, send: Send, kind: type[K], begin: Begin[K], ticket: Ticket,
                  body: bytes) -> None:
    request = decode(body, kind, max_depth=service.server.max_json_depth)
    exchange = await service.off_loop(_weight(request, body), begin, service, request, key_salt(scope))
    await _run(service, ticket, exchange, cutter(scope), send)


async def _run(service: Service, ticket: Ticket, exchange: Exchange, cut: Callable[[], None] | None, send: Send) -> None:
    params, total = exchange.asks[0].params, 0
    weighs = params.logprobs is not None or params.prompt_logprobs is not None
    async with await service.open(ticket, exchange.asks, timeout=exchange.timeout, cut=cut) as stream:
        if not exchange.streams:
            async for news in stream:
                check(news)
                total += (size := _logprobs_in(news) if weighs else 0)
                await _apart(stream, size, exchange.fold, news)
            await send_json(send, await _apart(stream, total, exchange.answer))
            return
        out, data = EventStream(send, exchange.media_type), b""
        try:
            async for news in stream:
                check(news)
                total += (size := _logprobs_in(news) if weighs else 0)
                data = await _apart(stream, size, exchange.events, news)
                if data and stream.open:  # the last news leave together with the ending
                    await out.write(data)
            data += await _apart(stream, total, exchange.ending)
        except Exception as error:
            if not out.begun:
                raise
            if not isinstance(error, OctavoError):
                logger.exception("a stream broke")
            data = exchange.failure(to_api_error(error))
        await out.write(data, more=False)


async def _apart(stream: Stream, size: int, work: Callable[..., T], *args: object) -> T:
    """Run what makes an answer: in a thread when it is long. There, unlike in the service's, it is never refused."""
    if size < OFF_LOOP_LOGPROBS:
        return work(*args)
    stream.writing = True
    try:
        return await asyncio.get_running_loop().run_in_executor(_writer, work, *args)
    finally:
        stream.writing, stream.since = False, time.monotonic()


def _logprobs_in(news: News) -> int:
    """How many logprobs some news bring: many of them are long work, for a thread."""
    lists = [positions for _, step in news for positions in (step.prompt_logprobs, *(delta.logprobs for delta in step.deltas))]
    return sum(len(position or ()) for positions in lists for position in positions or ())


def check(news: News) -> None:
    """Raise ApiError if a continuation failed; what the engine says about it is for the log."""
    for _, step in news:
        for delta in step.deltas:
            if delta.finish_reason == "error" and (step.error or "").startswith(BAD_GRAMMAR):
                raise RequestError(step.error or "")  # a grammar that passed the check, and led into a thicket later
            if delta.finish_reason in ("error", "abort"):
                logger.error("a request ended with %s: %s", delta.finish_reason, step.error)
                raise ApiError(500, FAILED)
