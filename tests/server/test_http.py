"""The middleware and its helpers over the real stack, and by themselves where that is more exact."""

import asyncio
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.types import Message
from wire import SECRET, Answer, Running, logged, serving, until

from octavo.server.auth import Keys
from octavo.server.config import ServerConfig
from octavo.server.errors import ApiError
from octavo.server.http import ClientDisconnected, Cors, Gate, cutter, key_salt, read_json_body, run_until_disconnect

KEY = f"Authorization: Bearer {SECRET}".encode()
PAGE = b"Origin: https://page.example"
PREFLIGHT = (PAGE, b"Access-Control-Request-Method: POST")


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    with serving(Keys([SECRET, "other"])) as running:
        yield running


@pytest.fixture(scope="module")
def free() -> Iterator[Running]:
    with serving() as running:
        yield running


def raw(method: str, path: str, *headers: bytes, body: bytes = b"") -> bytes:
    length = [b"Content-Length: %d" % len(body)] if method == "POST" else []
    return b"\r\n".join([f"{method} {path} HTTP/1.1".encode("latin-1"), b"Host: a", *length, *headers]) + b"\r\n\r\n" + body


# Keys


@pytest.mark.parametrize("path", [
    "/health", "/ping", "/ready", "/readyz", "/livez", "/", "/%68ealth", "/health?a=b", "http://a/health"])
def test_probes_and_the_page_need_no_key(locked: Running, path: str) -> None:
    assert locked.ask(raw("GET", path)).status in (200, 404)


@pytest.mark.parametrize("path", [
    "/echo", "/v1/models", "/metrics", "/nowhere", "//", "//health", "/health/", "/Health", "/health%2f", "/health%20",
    "/health;x", "/health/../echo", "/%2e/health", "/./health", "/health%00", "/health#x/..%2f..", "/%2Fhealth", "/x/../health",
    "*", "/healthz", "http://health/echo", "//health/echo", "/\\health", "/ping%0a"])
def test_nothing_else_is_open_however_it_is_spelt(locked: Running, path: str) -> None:
    answer = locked.ask(raw("GET", path))
    if answer.status == 200:
        assert path == "/health#x/..%2f.." and answer.json == {"status": "ok"}, "a fragment is no part of the path"
        return
    assert answer.status == 401 and answer.headers["www-authenticate"] == "Bearer"
    assert answer.error()["type"] == "authentication_error" and answer.error()["code"] == "invalid_api_key"


@pytest.mark.parametrize("header", [KEY, KEY.replace(b"Bearer", b"bearer"), f"x-api-key: {SECRET}".encode(), b"X-API-Key: other"])
def test_a_key_opens_every_route(locked: Running, header: bytes) -> None:
    assert locked.ask(raw("POST", "/echo", header, body=b"{}")).status == 200
    assert locked.ask(raw("GET", "/nowhere", header)).error()["code"] == "unknown_route"


@pytest.mark.parametrize("header", [
    KEY + b"x", b"Authorization: Basic abc", b"x-api-key: wrong", b"Authorization:", b"Cookie: a"])
def test_another_one_does_not_and_is_not_repeated(locked: Running, header: bytes) -> None:
    with logged("octavo.server.http") as records:
        answer = locked.ask(raw("POST", "/echo", header, body=b"{}"))
        until(lambda: records)
    assert answer.status == 401 and SECRET not in str(answer.headers)
    assert answer.error()["message"]
    assert SECRET not in str([record.getMessage() for record in records])


def test_anthropic_paths_have_their_own_shape(locked: Running) -> None:
    answer = locked.ask(raw("POST", "/v1/messages", body=b"{}"))
    assert answer.status == 401 and answer.json["type"] == "error" and answer.json["error"]["type"] == "authentication_error"


def test_a_refused_upload_leaves_the_connection_usable(locked: Running) -> None:
    with locked.connect() as client:
        client.send(raw("POST", "/echo", body=b"x" * 3_000_000))
        assert client.answer().status == 401
        client.send(raw("POST", "/echo", KEY, body=b"{}"))
        assert client.answer().status == 200


def test_each_key_has_a_salt(locked: Running) -> None:
    salts = []
    for header in (KEY, b"x-api-key: other", f"x-api-key: {SECRET}".encode()):
        locked.ask(raw("POST", "/echo", header, body=b"{}"))
        salts.append(key_salt(locked.app.scopes[-1]))
    assert salts[0] == salts[2] != salts[1] and all(salts) and SECRET not in salts[0]


def test_without_keys_everything_is_open_and_unsalted(free: Running) -> None:
    assert free.ask(raw("POST", "/echo", body=b"{}")).status == 200
    assert key_salt(free.app.scopes[-1]) == ""
    assert cutter(free.app.scopes[-1]) is not None and cutter({}) is None


def test_metrics_can_be_left_open() -> None:
    with serving(Keys([SECRET]), metrics_auth=False) as running:
        assert running.ask(raw("GET", "/metrics")).status == 404
        assert running.ask(raw("GET", "/metrics/")).status == 401


def test_a_root_path_is_taken_off_and_opens_nothing() -> None:
    with serving(Keys([SECRET]), root_path="/api/v2") as running:
        for path in ("/health", "/api/v2/health"):
            assert running.ask(raw("GET", path)).status == 200
        for path in ("/api/v2x/health", "/api/v2//health", "/api/v2/api/v2/health", "/api/v2/echo", "/api", "/api/health"):
            assert running.ask(raw("GET", path)).status == 401, path
        answer = running.ask(raw("POST", "/api/v2/echo", KEY, body=b"{}"))
        assert answer.json["path"] == "/echo"
        assert running.ask(raw("GET", "/api/v2", KEY)).status == 404


# Routes


@pytest.mark.parametrize("path", ["/nowhere", "/echo/", "/v1/embeddings", "/" + "a" * 5000, "/%00%0d%0a", "/%ff"])
def test_an_unknown_route_is_a_typed_404(free: Running, path: str) -> None:
    answer = free.ask(raw("GET", path))
    error = answer.error()
    assert answer.status == 404 and error["code"] == "unknown_route" and error["type"] == "invalid_request_error"
    assert len(error["message"]) < 300


def test_a_wrong_method_is_a_typed_405(free: Running) -> None:
    answer = free.ask(raw("GET", "/echo"))
    assert answer.status == 405 and answer.headers["allow"] == "POST" and answer.error()["code"] is None
    for method in ("DELETE", "PROPFIND", "TRACE", "OPTIONS"):
        answer = free.ask(raw(method, "/health"))
        assert answer.status == 405 and set(answer.headers["allow"].split(", ")) == {"GET", "HEAD"}


@pytest.mark.parametrize(("what", "status", "header"), [
    ("request", 400, None), ("capacity", 503, ("retry-after", "3")), ("time", 504, ("x-should-retry", "false")),
    ("bug", 500, None)])
def test_exceptions_of_routes(free: Running, what: str, status: int, header: tuple[str, str] | None) -> None:
    answer = free.ask(raw("GET", f"/raise/{what}"))
    assert answer.status == status and answer.error()["message"]
    assert header is None or answer.headers[header[0]] == header[1]
    assert answer.error()["param"] == ("n" if what == "request" else None)


# Request ids


@pytest.mark.parametrize("given", [b"abc-123", b"!" * 128, b"a:b/c{}"])
def test_a_clients_id_comes_back(free: Running, given: bytes) -> None:
    assert free.ask(raw("GET", "/health", b"X-Request-Id: " + given)).headers["x-request-id"] == given.decode()
    assert free.ask(raw("GET", "/nowhere", b"X-Request-Id: " + given)).headers["x-request-id"] == given.decode()


@pytest.mark.parametrize("given", [b"", b"a b", b"a\tb", b"x" * 129, b"\xe9"])
def test_an_id_that_is_none_is_replaced(free: Running, given: bytes) -> None:
    answers = [free.ask(raw("GET", "/health", b"X-Request-Id: " + given)) for _ in range(2)]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert all(len(name) == 32 for name in ids) and ids[0] != ids[1]


def test_ids_can_be_left_out() -> None:
    with serving(enable_request_id_headers=False) as running:
        assert "x-request-id" not in running.ask(raw("GET", "/health", b"X-Request-Id: a")).headers
        running.ask(raw("POST", "/echo", b"X-Request-Id: a", body=b"{}"))
        assert running.app.scopes[-1]["state"]["request_id"] == "a"


# Browsers


def test_a_page_may_ask_without_a_key_whether_it_may_call(locked: Running) -> None:
    asked = "authorization, x-stainless-lang, x-stainless-retry-count"
    answer = locked.ask(raw("OPTIONS", "/echo", *PREFLIGHT, b"Access-Control-Request-Headers: " + asked.encode()))
    assert answer.status == 200 and answer.headers["access-control-allow-origin"] == "*"
    assert answer.headers["access-control-allow-headers"] == asked and "POST" in answer.headers["access-control-allow-methods"]
    assert locked.ask(raw("OPTIONS", "/echo")).status == 405  # no preflight, and no key needed either


@pytest.mark.parametrize(("method", "path", "status"), [("POST", "/echo", 401), ("GET", "/health", 200), ("GET", "/x", 401)])
def test_every_answer_can_be_read_by_a_page(locked: Running, method: str, path: str, status: int) -> None:
    answer = locked.ask(raw(method, path, PAGE))
    assert answer.status == status and answer.headers["access-control-allow-origin"] == "*"
    assert "x-request-id" in answer.headers["access-control-expose-headers"]
    assert "access-control-allow-origin" not in locked.ask(raw(method, path)).headers


def test_origins_methods_and_headers_can_be_narrowed() -> None:
    cors = Cors(["https://a", "https://b"], ["GET"], ["x-one"], credentials=True)
    found = dict(cors.headers(b"https://b"))
    assert found[b"access-control-allow-origin"] == b"https://b" and found[b"access-control-allow-credentials"] == b"true"
    assert cors.headers(b"https://c") == [(b"vary", b"Origin")]
    found = dict(cors.preflight(b"x-two"))
    assert found[b"access-control-allow-methods"] == b"GET" and found[b"access-control-allow-headers"] == b"x-one"
    assert b"access-control-allow-headers" not in dict(Cors().preflight(None))
    assert dict(Cors(credentials=True).headers(b"https://c"))[b"access-control-allow-origin"] == b"https://c"


# Bodies


def body_status(running: Running, *headers: bytes) -> Answer:
    return running.ask(raw("POST", "/echo", *headers, body=b"{}"))


@pytest.mark.parametrize("kind", [
    b"application/json", b"application/json; charset=utf-8", b"APPLICATION/JSON;charset=\"UTF-8\"", b"application/json; x=y",
    b"application/json;"])
def test_json_under_its_spellings(free: Running, kind: bytes) -> None:
    assert body_status(free, b"Content-Type: " + kind).status == 200
    assert body_status(free).status == 200


@pytest.mark.parametrize("header", [
    b"Content-Type: text/plain", b"Content-Type: application/x-www-form-urlencoded", b"Content-Type: application/jsonp",
    b"Content-Type: multipart/form-data; boundary=x", b"Content-Type: application/json; charset=latin-1", b"Content-Type:",
    b"Content-Type: application/json, text/plain", b"Content-Encoding: gzip", b"Content-Encoding: br",
    b"Content-Encoding: identity, gzip"])
def test_everything_else_is_a_typed_415(free: Running, header: bytes) -> None:
    answer = body_status(free, header)
    assert answer.status == 415 and answer.error()["type"] == "invalid_request_error"
    assert body_status(free, b"Content-Encoding: identity").status == 200


def receiving(*messages: Message) -> Any:
    left = list(messages)

    async def receive() -> Message:
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    return receive


GONE: Message = {"type": "http.disconnect"}


def part(body: bytes, more: bool) -> Message:
    return {"type": "http.request", "body": body, "more_body": more}


def test_reading_a_body_by_itself() -> None:
    scope, limits = {"headers": []}, ServerConfig(max_body_bytes=10)
    assert asyncio.run(read_json_body(scope, receiving(part(b"a", True), part(b"b", False)), limits, lambda size: None)) == b"ab"
    assert asyncio.run(read_json_body(scope, receiving({"type": "http.request"}), limits, lambda size: None)) == b""
    with pytest.raises(ApiError) as caught:
        asyncio.run(read_json_body(scope, receiving(part(b"x" * 6, True), part(b"x" * 5, True)), limits, lambda size: None))
    assert caught.value.status == 413
    with pytest.raises(ClientDisconnected):
        asyncio.run(read_json_body(scope, receiving(part(b"a", True), GONE), limits, lambda size: None))


# Clients that leave


def test_work_is_cancelled_within_a_turn_of_the_loop_after_the_client_left() -> None:
    async def main() -> None:
        left, turns, cleaned = asyncio.Event(), 0, []

        async def receive() -> Message:
            await left.wait()
            return GONE

        async def work() -> None:
            nonlocal turns
            try:
                while True:
                    await asyncio.sleep(0)
                    turns += left.is_set()
            finally:
                cleaned.append(turns)

        asyncio.get_running_loop().call_later(0.01, left.set)
        with pytest.raises(ClientDisconnected):
            await run_until_disconnect(receive, work())
        assert cleaned and cleaned[0] <= 3
        task = asyncio.current_task()
        assert task is not None and task.cancelling() == 0
        await asyncio.sleep(0)  # nothing is left pending
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_results_errors_and_foreign_cancellation_pass() -> None:
    async def value() -> int:
        await asyncio.sleep(0)
        return 7

    async def error() -> None:
        raise ValueError("own")

    async def main() -> None:
        assert await run_until_disconnect(receiving(), value()) == 7
        assert await run_until_disconnect(receiving({**GONE, "complete": True}), value()) == 7
        with pytest.raises(ValueError, match="own"):
            await run_until_disconnect(receiving(part(b"", False)), error())
        task = asyncio.create_task(run_until_disconnect(receiving(), asyncio.sleep(60)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await run_until_disconnect(receiving(), asyncio.sleep(60))
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1, "no watcher is left"

    asyncio.run(main())


# The log


def test_one_line_per_request_that_nobody_can_break(free: Running) -> None:
    with logged("octavo.server.http") as records:
        free.ask(raw("POST", "/echo?secret=1", b"X-Request-Id: my-id", body=b'{"prompt":"private"}'))
        free.ask(raw("GET", "/a%0d%0aINFO%20forged%1b[31m" + "b" * 500))
        free.ask(raw("GET", "/health"))
        until(lambda: len(records) == 3)
    one, two, three = [record.getMessage() for record in records]
    assert [record.levelno for record in records] == [logging.INFO, logging.INFO, logging.DEBUG]
    assert one.startswith("POST /echo 200 ") and one.endswith("id my-id") and "127.0.0.1" in one
    assert two.startswith("GET /a\\r\\nINFO forged\\x1b[31m") and len(two) < 400
    assert not any(text in one + two + three for text in ("private", "secret"))


def test_the_line_can_be_silenced_and_requests_observed() -> None:
    seen: list[tuple[str, int]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/gone":
            raise ClientDisconnected
        await send({"type": "http.response.start", "status": 204, "headers": []})

    async def send(message: Message) -> None:
        pass

    async def main() -> None:
        gate = Gate(app, ServerConfig(disable_uvicorn_access_log=True), Keys(),
                    lambda scope, status, seconds: seen.append((scope["path"], status)))
        for path in ("/x", "/gone"):
            await gate({"type": "http", "path": path, "method": "GET", "headers": []}, receiving(), send)
        await gate({"type": "websocket", "path": "/x", "headers": []}, receiving(), send)

    with logged("octavo.server.http", level=logging.INFO) as records:
        asyncio.run(main())
    assert seen == [("/x", 204), ("/gone", 499)] and not records


def test_an_answer_that_breaks_off_under_another_server_is_raised() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise ValueError("late")

    async def send(message: Message) -> None:
        pass

    with pytest.raises(ValueError, match="late"):
        scope = {"type": "http", "path": "/", "method": "GET", "headers": []}
        asyncio.run(Gate(app, ServerConfig(), Keys())(scope, receiving(), send))
