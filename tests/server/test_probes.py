"""octavo.server.probes: what healthy means in every state of the engine, and what the probes say."""

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import pytest

from octavo import __version__
from octavo.server.probes import HEARTBEAT_LIMIT, Health, Probes


@dataclass
class Engine:
    """What is known of an engine."""

    phase: str = "ready"
    progress: float = 1.0
    beat: float = 0.5
    step: float = 0.0

    @property
    def ready(self) -> bool:
        return self.phase == "ready"

    def heartbeat_age(self) -> float:
        return self.beat

    def step_age(self) -> float:
        return self.step


async def seven() -> int:
    """Requests that wait or run."""
    return 7


async def num_open() -> int:
    return 7


def probe(health: Health, path: str, method: str = "GET") -> tuple[int, Any, dict[bytes, bytes]]:
    """Status, body and headers of an answer."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError("a probe has no body")

    route = next(app for way, known, app in Probes(health, seven).routes() if (way, known) == (method, path))
    asyncio.run(route({"type": "http"}, receive, send))
    body = b"".join(message.get("body", b"") for message in sent)
    return sent[0]["status"], json.loads(body) if body else None, dict(sent[0]["headers"])


def statuses(health: Health) -> dict[str, int]:
    return {path: probe(health, path)[0] for path in ("/health", "/ping", "/livez", "/ready", "/readyz")}


ALL_GOOD = {"/health": 200, "/ping": 200, "/livez": 200, "/ready": 200, "/readyz": 200}
NONE_GOOD = dict.fromkeys(ALL_GOOD, 503)


def test_ready() -> None:
    assert statuses(Health(Engine(), 120.0, has_text=True)) == ALL_GOOD


@pytest.mark.parametrize("phase", ["starting", "fetching", "loading", "preparing"])
def test_loading_is_no_reason_to_be_restarted(phase: str) -> None:
    health = Health(Engine(phase, 0.2), 120.0, has_text=True)
    assert statuses(health) == NONE_GOOD | {"/livez": 200}
    _, body, headers = probe(health, "/health")
    assert body == {"status": "loading", "phase": phase, "progress": 0.2} and headers[b"retry-after"] == b"1"


def test_an_engine_without_a_tokenizer_is_loading() -> None:
    assert statuses(Health(Engine(), 120.0)) == NONE_GOOD | {"/livez": 200}


def test_a_long_silence_while_loading_is_loading() -> None:
    health = Health(Engine("loading", 0.2, beat=1000.0, step=1000.0), 120.0)
    assert probe(health, "/livez")[0] == 200 and probe(health, "/health")[1]["status"] == "loading"


def test_an_engine_that_has_died_is_restarted() -> None:
    engine = Engine()
    health = Health(engine, 120.0, has_text=True)
    assert statuses(health) == ALL_GOOD
    engine.phase, engine.progress = "down", 0.0
    assert statuses(health) == NONE_GOOD | {"/livez": 200}  # it is seen to already
    engine.phase = "loading"
    assert statuses(health) == NONE_GOOD | {"/livez": 200} and probe(health, "/health")[1]["status"] == "restarting"
    engine.phase = "ready"
    assert statuses(health) == ALL_GOOD


@pytest.mark.parametrize(("beat", "step"), [(HEARTBEAT_LIMIT + 0.1, 0.0), (0.5, 120.1)])
def test_an_engine_that_does_not_get_on_hangs(beat: float, step: float) -> None:
    health = Health(Engine(beat=beat, step=step), 120.0, has_text=True)
    assert statuses(health) == NONE_GOOD and probe(health, "/livez")[1]["status"] == "hanging"


def test_what_is_just_in_time_does_not_hang() -> None:
    assert statuses(Health(Engine(beat=HEARTBEAT_LIMIT - 0.1, step=119.0), 120.0, has_text=True)) == ALL_GOOD


def test_draining_is_healthy_and_not_ready() -> None:
    health = Health(Engine(), 120.0, has_text=True, draining=True)
    assert statuses(health) == ALL_GOOD | {"/ready": 503, "/readyz": 503}
    assert probe(health, "/readyz")[1]["status"] == "draining"


def test_small_routes() -> None:
    health = Health(Engine(), 120.0)
    assert probe(health, "/version")[:2] == (200, {"version": __version__})
    assert probe(health, "/load")[:2] == (200, {"server_load": 7})
    assert probe(Health(Engine(), 120.0, has_text=True), "/ping", "POST")[0] == 200
