"""Bad requests of every class against a real server: each gets its own answer, and nobody else notices."""

import asyncio
from typing import Any

import pytest
from badness import CASES, HEAVY, LIGHT, check, send
from crowd import alone, probed
from served import Served
from web import Reply, call, completion

BATCH = 12
"""Cases of one test; the server is looked at after each of them."""


def test_there_are_enough_of_every_kind() -> None:
    assert len(CASES) >= 120 and len({case["id"] for case in CASES}) == len(CASES)
    paths = {case.get("p", "/v1/completions").partition("?")[0] for case in CASES}
    assert paths >= {"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
                     "/v1/models", "/tokenize", "/detokenize", "/generate", "/health", "/metrics", "/version"}


@pytest.mark.parametrize("start", range(0, len(CASES), BATCH))
def test_each_gets_its_answer_and_nothing_else_happens(server: Served, start: int) -> None:
    for case in CASES[start : start + BATCH]:
        check(case, asyncio.run(send(server.port, case)))
        server.settle()


def test_what_takes_long_lets_others_through(server: Served) -> None:
    """Megabytes to be tokenised are no reason for a stream, or a probe, to stand still."""
    for case in CASES:
        if case["id"] in HEAVY:
            reply, lags = asyncio.run(probed(server, send(server.port, case)))
            check(case, reply)
            assert lags[-1] < 1.0 and lags[len(lags) * 9 // 10] < 0.2, (case["id"], lags[-5:])
    server.settle()


def test_all_at_once_beside_good_requests(server: Served) -> None:
    """Good requests, streamed and whole, keep every bit of their answers while everything bad is said around them."""
    good = [completion(f"Say {number}", max_tokens=64, stream=number % 2 == 0) for number in range(8)]
    expected = asyncio.run(alone(server, good))
    async def run() -> tuple[list[Reply], list[Reply]]:
        gate = asyncio.Semaphore(16)

        async def bad(case: dict[str, Any]) -> Reply:
            async with gate:
                return await send(server.port, case)

        answers = asyncio.gather(*(call(server.port, body=body) for body in good * 3))
        replies = await asyncio.gather(*map(bad, LIGHT))
        return list(replies), list(await answers)

    (replies, answers), lags = asyncio.run(probed(server, run()))
    for case, reply in zip(LIGHT, replies, strict=True):
        check(case | {"t": 20.0}, reply)
    assert all(answer.ended_well for answer in answers)
    assert [answer.token_ids for answer in answers] == expected * 3
    assert lags[len(lags) * 9 // 10] < 0.5, lags
    server.settle()
