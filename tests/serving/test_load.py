"""Load in sizes that two processors carry in seconds; scripts/soak_server.py runs the same in earnest."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import loads
import pytest
from badness import LIGHT, check, send
from crowd import until
from proxy import Proxy
from served import BLOCKS, Served
from web import completion, leave

LONG = 1200
MANY = [f"Prompt {number}" for number in range(64)]


def stream(number: int) -> dict[str, Any]:
    return completion(f"Client {number}", stream=True, max_tokens=LONG if number % 10 else 100)


def whole(number: int) -> dict[str, Any]:
    return completion(f"Client {number}", max_tokens=LONG if number % 10 else 100)


def prefill(number: int) -> dict[str, Any]:
    return completion([3 + (number + 7 * n) % 300 for n in range(2000 if number % 10 else 100)], max_tokens=8)


def several(number: int) -> dict[str, Any]:
    return completion(f"Client {number}", n=8, seed=number, temperature=1.0, max_tokens=100 if number % 10 else 20)


def lists(number: int) -> dict[str, Any]:
    return completion([f"{prompt} of {number}" for prompt in MANY], max_tokens=40 if number % 10 else 8, stream=number % 2 == 0)


def test_l01_clients_that_ask_again_and_again(server: Served) -> None:
    figures = asyncio.run(loads.closed_loop(server, 3.0, 128))
    assert figures["requests"] > 100 and figures["livez p99 ms"] < 1000.0  # 100 where nothing else runs; see the soak
    server.settle()


def test_l02_a_burst_is_refused_early_and_politely(model: Path) -> None:
    with Served(model, "--max-queued-requests", "48") as served:
        asyncio.run(loads.burst(served, 300, 48))
        served.settle()
        asyncio.run(loads.patient(served, 120))
        served.settle()
        served.check_descriptors()


@pytest.mark.parametrize("make", [stream, prefill, whole, several, lists])
def test_l03_to_l06_who_leaves_leaves_nothing(server: Served, make: Callable[[int], dict[str, Any]]) -> None:
    asyncio.run(loads.storm(server, make, 20 if make is lists else 60, 2, 1.0))
    server.settle()


@pytest.mark.parametrize("make", [stream, whole, several])
def test_l03_blocks_are_free_at_once(server: Served, make: Callable[[int], dict[str, Any]]) -> None:
    asyncio.run(loads.freed(server, lambda number: make(10 * number + 1) | {"max_tokens": LONG}, 10, 0.5))


def test_l04_nothing_is_computed_for_who_has_left(model: Path) -> None:
    """A prompt of eight steps, each slow, whose client leaves in the first ones."""
    with Served(model, faults="slow_step:0.1") as served:
        async def run() -> None:
            for streams in (False, True):
                before = served.look()
                body = completion([3 + (streams + 7 * n) % 300 for n in range(2000)], stream=streams, max_tokens=8)
                leaving = asyncio.create_task(leave(served.port, body, after=0.25))
                await leaving
                await until(lambda: not served.busy(), 3.0, "an idle server")
                assert served.look()["prompt_tokens"] - before["prompt_tokens"] <= 2000 - 256

        asyncio.run(run())


def test_l07_what_is_left_and_asked_again_is_the_same(server: Served) -> None:
    asyncio.run(loads.fuzz(server, 12))
    server.settle()


def test_l08_bad_requests_among_good_ones(server: Served) -> None:
    figures = asyncio.run(loads.poison(server, 4.0, 12))
    assert figures["good"] > 20 and figures["bad"] > 0
    server.settle()


def test_l10_every_request_brings_a_new_schema(server: Served) -> None:
    asyncio.run(loads.schemas(server, 300, 8))
    server.settle()


def test_l12_connections_come_and_go(server: Served) -> None:
    asyncio.run(loads.churn(server, 400))
    server.settle()
    server.check_descriptors()


def test_l13_replicas_are_renewed_one_by_one_and_no_call_fails(model: Path) -> None:
    replicas = [Served(model), Served(model)]

    async def run() -> None:
        async with Proxy() as proxy:
            figures = await loads.rolling(proxy, replicas, lambda: Served(model), 16)
            assert figures["calls"] > 60 and figures["turned away and taken elsewhere"] > 0

    try:
        asyncio.run(run())
        for served in replicas:
            served.settle()
    finally:
        for served in replicas:
            served.close()


def test_l15_an_answer_does_not_depend_on_company_cache_chunks_room_or_restarts(server: Served, model: Path) -> None:
    bodies = loads.mixed(24)
    expected = asyncio.run(loads.same_bits(server, bodies))
    for options, blocks in ((("--max-num-batched-tokens", "48"), BLOCKS), (("--max-model-len", "400"), 40)):
        with Served(model, *options, blocks=blocks) as other:
            asyncio.run(loads.same_bits(other, bodies, expected))
            assert (other.look()["preempted"] > 0) is (blocks < BLOCKS)


@pytest.mark.parametrize("variables", [{"PYTHONOPTIMIZE": "1"}, {"PYTHONDEVMODE": "1", "PYTHONMALLOC": "malloc"}])
def test_l16_no_check_is_an_assertion_and_nothing_is_left_lying_about(model: Path, variables: dict[str, str]) -> None:
    """Every bad request again, with assertions left out; and in Python's mode for developers, whose log stays clean."""
    with Served(model, environment=variables) as served:
        async def run() -> None:
            for start in range(0, len(LIGHT), 16):
                cases = LIGHT[start : start + 16]
                for case, reply in zip(cases, await asyncio.gather(*(send(served.port, case) for case in cases)), strict=True):
                    check(case | {"t": 20.0}, reply)

        asyncio.run(run())
        served.settle()
        assert served.end() == 0
        assert not re.search(r"\w+Warning|never awaited|unclosed|AssertionError", served.log()), served.log()[-3000:]
