"""octavo.server.exchange: the order of a request, and what happens to errors on the way."""

import asyncio
import threading
from collections import defaultdict
from typing import Any

import msgspec
import pytest
from fake_service import ask, make_service, send_request, texts

from octavo.errors import CapacityError
from octavo.server.completions import CompletionExchange
from octavo.server.errors import ApiError
from octavo.server.exchange import FAILED, check, serve
from octavo.server.service import Ask
from octavo.text.deltas import Delta, Step


class Body(msgspec.Struct, forbid_unknown_fields=True):
    """A request."""

    stream: bool = False


class Words:
    """An Exchange that can break at any place."""

    media_type = "text/plain"

    def __init__(self, service: Any, body: Body, key_salt: str) -> None:
        self.asks = [Ask([5, 6], service.intake.default_params(4))]
        self.timeout, self.streams, self.text, self.salt = None, body.stream, "", key_salt
        self.breaks_at = -1

    def events(self, news: Any) -> bytes:
        self.fold(news)
        return self.text.encode()

    def ending(self) -> bytes:
        return b"."

    def failure(self, error: ApiError) -> bytes:
        return f"!{error.status} {error.message}".encode()

    def fold(self, news: Any) -> None:
        if len(self.text) == self.breaks_at:
            raise ZeroDivisionError("secret")
        self.text = "".join(delta.text for _, step in news for delta in step.deltas)

    def answer(self) -> bytes:
        return self.text.encode()


async def converse(body: bytes, *, breaks_at: int = -1, full: bool = False, salt: str = "") -> tuple[list[Any], list[Words], Any]:
    options = {"max_queued_requests": 1} if full else {}
    service, link = make_service(texts("a" * 9, end=False), server=options)
    if full:
        service.admission.enter().wait(1)
    made: list[Words] = []

    def begin(*given: Any) -> Words:
        made.append(Words(*given))
        made[0].breaks_at = breaks_at
        return made[0]

    messages: list[Any] = []
    parts = [{"type": "http.request", "body": body}]

    async def receive() -> Any:
        if parts:
            return parts.pop()
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {"type": "http", "path": "/", "headers": [], "state": {"cache_salt": salt}}
    try:
        await serve(service, scope, receive, send, Body, begin)
    finally:
        await asyncio.gather(*link.tasks)
        assert not service._streams and service.num_open == int(full)
        service.close()
    return messages, made, link


def test_whole_and_streamed() -> None:
    whole, made, _ = asyncio.run(converse(b"{}", salt="k"))
    assert [message["type"][14:] for message in whole] == ["start", "body"] and made[0].salt == "k"
    streamed, _, _ = asyncio.run(converse(b'{"stream": true}'))
    assert [message.get("body") for message in streamed] == [None, b"a", b"a", b"a", b"a."]
    assert [message.get("more_body") for message in streamed[1:]] == [True, True, True, False]


def test_what_fails_before_the_first_byte_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        asyncio.run(converse(b'{"stream": true}', breaks_at=0))
    with pytest.raises(ZeroDivisionError):
        asyncio.run(converse(b"{}", breaks_at=1))
    with pytest.raises(CapacityError):
        asyncio.run(converse(b"{}", full=True))


def test_what_fails_after_it_is_the_last_event() -> None:
    messages, _, link = asyncio.run(converse(b'{"stream": true}', breaks_at=1))
    assert messages[-1]["body"].startswith(b"!500") and b"secret" not in messages[-1]["body"]
    assert messages[-1]["more_body"] is False and len(link.aborted) == 1


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_the_engines_own_words_stay_here(reason: Any) -> None:
    with pytest.raises(ApiError) as caught:
        check([(0, Step([Delta(0, "", [], finish_reason=reason)], error="at 0x7f00: out of memory"))])
    assert (caught.value.status, caught.value.message) == (500, FAILED)


@pytest.mark.parametrize("stream", [False, True])
def test_what_takes_long_to_write_is_written_in_a_thread(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every piece of work is asked for the thread in which it runs."""
    where: dict[str, list[bool]] = defaultdict(list)

    def look(name: str, real: Any) -> Any:
        def seen(*given: Any) -> Any:
            where[name].append(threading.current_thread() is not threading.main_thread())
            return real(*given)

        return seen

    for name in ("fold", "events", "ending", "answer"):
        monkeypatch.setattr(CompletionExchange, name, look(name, getattr(CompletionExchange, name)))
    for count in (50, 5000):
        where.clear()
        body = {"prompt": [5] * count, "echo": True, "logprobs": 0, "max_tokens": 3, "stream": stream}
        assert ask(texts("a" * 9), "/v1/completions", body, max_model_len=8192).status == 200
        first, *rest = where["events" if stream else "fold"]
        assert first is (count == 5000) and rest and not any(rest)  # the echo comes with the first news
        assert where["ending" if stream else "answer"] == [count == 5000]


def test_who_waits_for_that_thread_is_no_slow_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    played, real = threading.Event(), CompletionExchange.fold

    def fold(*given: Any) -> None:
        assert threading.current_thread() is threading.main_thread() or played.wait(30.0)
        real(*given)

    monkeypatch.setattr(CompletionExchange, "fold", fold)

    async def run() -> None:
        service, link = make_service(texts("a" * 9), server={"send_timeout": 1e-6}, max_model_len=8192)
        body = {"prompt": [5] * 5000, "echo": True, "logprobs": 0, "max_tokens": 9}
        asked = asyncio.create_task(send_request(service, "/v1/completions", body))
        while not link.tasks:
            await asyncio.sleep(0.001)
        await asyncio.gather(*link.tasks)
        played.set()
        assert (await asked).status == 200 and service.num_dropped == 0
        service.close()

    asyncio.run(run())


def test_each_api_process_has_its_part_of_the_queue() -> None:
    async def run() -> None:
        service, _ = make_service(texts("a"), server={
            "api_server_count": 3, "max_queued_requests": 4, "max_queued_tokens": 100, "max_held_bytes": 3000})
        door = service.admission
        assert (door.max_requests, door.max_tokens, door.max_bytes) == (2, 34, 1000)
        service.close()

    asyncio.run(run())
