"""octavo.server.app: the table of routes, what stands before it, and what answers while there is no model."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from fake_service import make_service, texts

from octavo.server.app import build_app
from octavo.server.auth import Keys
from octavo.server.page import page
from octavo.server.probes import Health

KEY = "sk-a-key"
GENERATING = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages", "/generate")
POSTS = (*GENERATING, "/v1/messages/count_tokens", "/tokenize", "/detokenize")
GETS = ("/v1/models", "/v1/models/{model}", "/metrics", "/openapi.json", "/version", "/load", "/", "/health", "/ping", "/ready",
        "/readyz", "/livez")
NEEDS_NO_KEY = ("/", "/health", "/ping", "/ready", "/readyz", "/livez")
NEEDS_NO_MODEL = (*NEEDS_NO_KEY, "/version", "/load", "/metrics")
ABSENT = ("/v1/embeddings", "/v1/rerank", "/v1/audio/speech", "/v1/load_lora_adapter", "/inference/v1/generate", "/invocations",
          "/docs", "/health/generate", "/v1", "/v1/completions/", "/V1/completions", "/page.html", "/metrics/", "/start_profile")


@dataclass
class Engine:
    """What is known of an engine."""

    phase: str = "ready"
    progress: float = 1.0

    @property
    def ready(self) -> bool:
        return self.phase == "ready"

    def heartbeat_age(self) -> float:
        return 0.0

    def step_age(self) -> float:
        return 0.0


@dataclass
class Metrics:
    """Answers, and remembers what it was told."""

    seen: list[tuple[str, int]] = field(default_factory=list)

    async def num_open(self) -> int:
        return 3

    async def serve(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"octavo:up 1\n"})

    def http(self, scope: Any, status: int, seconds: float) -> None:
        self.seen.append((scope["path"], status))


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


def ask(path: str, method: str = "GET", body: Any = None, *, phase: str = "ready", keys: tuple[str, ...] = (), key: str = "",
        headers: tuple[tuple[bytes, bytes], ...] = (), draining: bool = False, metrics: Metrics | None = None) -> Answer:
    """One request to a fresh application."""

    async def run() -> Answer:
        service, _ = make_service(texts("Paris"))
        health = Health(Engine(phase), 120.0, has_text=True, draining=draining)
        if draining:
            service.admission.closed = "The server is shutting down."
        app = build_app(service, health, metrics or Metrics(), Keys(keys))  # type: ignore[arg-type]
        sent: list[Any] = []
        given = False

        async def receive() -> Any:
            nonlocal given
            if given:
                await asyncio.Event().wait()
            given = True
            return {"type": "http.request", "body": b"" if body is None else json.dumps(body).encode(), "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        authorization = ((b"authorization", f"Bearer {key}".encode()),) if key else ()
        async with asyncio.timeout(20.0):
            await app({"type": "http", "method": method, "path": path.replace("{model}", "some/model"), "query_string": b"",
                       "headers": [*headers, *authorization], "http_version": "1.1", "client": ("127.0.0.1", 1),
                       "root_path": ""}, receive, send)
        service.close()
        return Answer(sent[0]["status"], {name.decode().lower(): value.decode() for name, value in sent[0]["headers"]},
                      b"".join(message.get("body", b"") for message in sent[1:]))

    return asyncio.run(run())


@pytest.mark.parametrize("path", GETS)
def test_what_is_there_to_get(path: str) -> None:
    answer = ask(path)
    assert answer.status == 200, answer
    assert ask(path, "HEAD").status == 200
    wrong = ask(path, "DELETE")
    assert wrong.status == 405 and {"GET", "HEAD"} <= set(wrong.headers["allow"].replace(" ", "").split(","))


@pytest.mark.parametrize("path", POSTS)
def test_what_is_there_to_post_to(path: str) -> None:
    answer = ask(path, "POST", {"nothing": 1})
    assert answer.status == 400 and answer.error["message"]
    wrong = ask(path, "GET")
    assert wrong.status == 405 and wrong.headers["allow"] == "POST"


def test_a_completion_goes_all_the_way() -> None:
    metrics = Metrics()
    answer = ask("/v1/completions", "POST", {"prompt": "The capital of France is", "max_tokens": 5}, metrics=metrics)
    assert answer.status == 200 and json.loads(answer.body)["choices"][0]["text"]
    assert metrics.seen == [("/v1/completions", 200)]


@pytest.mark.parametrize("path", ABSENT)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_what_is_not_there(path: str, method: str) -> None:
    answer = ask(path, method, {})
    assert answer.status == 404 and answer.error["code"] == "unknown_route" and "allow" not in answer.headers


@pytest.mark.parametrize("phase", ["starting", "loading", "down"])
def test_while_there_is_no_engine(phase: str) -> None:
    for path in POSTS:
        answer = ask(path, "POST", {"prompt": "a"}, phase=phase)
        assert answer.status == 503 and int(answer.headers["retry-after"]) >= 1, path
        assert answer.error["type"] == "overloaded_error" and phase in answer.error["message"]
    for path in GETS:
        answer = ask(path, phase=phase)
        assert answer.status == (200 if path in NEEDS_NO_MODEL and path not in ("/health", "/ping", "/ready", "/readyz") else 503)


def test_a_server_that_ends_takes_nothing_new_and_is_healthy() -> None:
    for path in GENERATING:
        answer = ask(path, "POST", {"prompt": "a"}, draining=True)
        assert answer.status == 503 and "shutting down" in answer.error["message"]
    assert [ask(path, draining=True).status for path in ("/health", "/livez", "/ready", "/v1/models")] == [200, 200, 503, 200]


def test_every_route_needs_a_key_but_for_the_probes_and_the_page() -> None:
    for path in (*GETS, *POSTS, *ABSENT):
        method = "POST" if path in POSTS else "GET"
        answer = ask(path, method, {} if method == "POST" else None, keys=(KEY,))
        if path in NEEDS_NO_KEY:
            assert answer.status == 200, path
        else:
            assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer", path
            assert answer.error["code" if "messages" not in path else "type"] in ("invalid_api_key", "authentication_error")
        assert ask(path, method, {} if method == "POST" else None, keys=(KEY,), key=KEY).status != 401, path


def test_a_key_comes_before_everything_that_could_tell_something() -> None:
    assert ask("/v1/completions", "DELETE", keys=(KEY,)).status == 401
    assert ask("/v1/completions", "POST", {}, keys=(KEY,), phase="loading").status == 401


def test_the_page_is_sent_once() -> None:
    answer = ask("/")
    assert answer.body == page()[0] and answer.headers["content-type"].startswith("text/html")
    again = ask("/", headers=((b"if-none-match", answer.headers["etag"].encode()),))
    assert again.status == 304 and not again.body


def test_the_document_lists_these_routes_and_no_others() -> None:
    paths = json.loads(ask("/openapi.json").body)["paths"]
    listed = {(path, method.upper()) for path, ways in paths.items() for method in ways}
    assert {path for path, method in listed if method == "POST"} - {"/ping"} == set(POSTS)
    assert {path for path, method in listed if method == "GET"} <= {*GETS, "/v1/responses/{response_id}"}
