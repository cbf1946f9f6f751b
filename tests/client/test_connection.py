"""The client against a stand-in server: kept connections, refusals, cuts, time limits, addresses."""

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from stand_in import StandIn, chunked, error, plain

from octavo.client.connection import Address, Client, Refusal, Unreachable
from octavo.client.wire import ConnectionFailed
from octavo.errors import ConfigError


def use(server: StandIn, work: Callable[[Client], Awaitable[Any]], **options: Any) -> Any:
    """Run ``work`` with a client of the server."""
    async def main() -> Any:
        client = Client(Address.parse(server.url), **options)
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(main())


async def collect(client: Client, path: str = "/v1/completions", body: bytes = b'{"prompt": "a", "stream": true}') -> list[bytes]:
    return [payload async for payloads in client.events(path, body) for payload in payloads]


@pytest.mark.parametrize(("url", "expected"), [
    ("http://localhost:8000/v1", ("localhost", 8000, False, "", "localhost:8000")),
    ("http://localhost:8000/v1/", ("localhost", 8000, False, "", "localhost:8000")),
    ("https://example.org/api/v1", ("example.org", 443, True, "/api", "example.org")),
    ("http://[::1]:80", ("::1", 80, False, "", "[::1]")),
    ("http://h:8000/", ("h", 8000, False, "", "h:8000")),
])
def test_addresses(url: str, expected: tuple[Any, ...]) -> None:
    address = Address.parse(url)
    assert (address.host, address.port, address.tls, address.path, address.authority) == expected


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://h", "http://", "http://h:99999", "http://h/?a=b", "http://u:p@h",
                                 "http://h/\r\nX: 1", "http://h/é", ""])
def test_a_bad_address_is_named(url: str) -> None:
    with pytest.raises(ConfigError, match="base_url"):
        Address.parse(url, "base_url")


@pytest.mark.parametrize("split", [0, 1, 7])
def test_events_come_whole_however_they_are_cut(server: StandIn, split: int) -> None:
    server.split = split
    found = use(server, collect)
    assert len(found) == 5 and b'"w0 "' in found[0] and b"DONE" not in b"".join(found)
    sent = server.seen[0]
    assert (sent.method, sent.path, sent.body) == ("POST", "/v1/completions", {"prompt": "a", "stream": True})
    assert sent.headers["host"] == f"127.0.0.1:{server.port}" and sent.headers["accept-encoding"] == "identity"


def test_a_connection_is_kept(server: StandIn) -> None:
    async def work(client: Client) -> None:
        for _ in range(3):
            await collect(client)
            assert (await client.request("GET", "/v1/models")).status == 200

    use(server, work)
    assert {seen.connection for seen in server.seen} == {1}


def test_a_connection_that_the_server_closed_is_replaced(server: StandIn) -> None:
    async def work(client: Client) -> None:
        server.keep_alive = False  # without saying so, as a server that is about to restart
        server.override = lambda seen: plain(200, b"{}") if seen.path == "/quiet" else None
        await client.request("GET", "/quiet")
        await client.request("GET", "/quiet")
        await client.request("GET", "/quiet")
        assert client.opened == 3

    use(server, work)
    assert len(server.seen) == 3, "a request was sent twice"


def test_two_requests_at_once_use_two_connections(server: StandIn) -> None:
    async def work(client: Client) -> None:
        await asyncio.gather(*(collect(client) for _ in range(5)))
        assert client.opened == 5 or len({seen.connection for seen in server.seen}) == client.opened

    use(server, work)
    assert len(server.seen) == 5


def test_an_answer_left_early_closes_its_connection(server: StandIn) -> None:
    server.release = lambda seen: asyncio.Event()  # never set: the first bytes only
    server.split = 600

    async def work(client: Client) -> None:
        async with aclosing(client.events("/v1/completions", b'{"prompt": "a", "stream": true}')) as events:
            async for _ in events:
                break
        assert not client._idle

    use(server, work)


@pytest.mark.parametrize(("answer", "message", "code"), [
    (error(401, "wrong key", "invalid_api_key"), "answered 401: wrong key", "invalid_api_key"),
    (error(404, "no such\nmodel"), "answered 404: no such model", None),
    (plain(500, b"<html>oops</html>"), "answered 500: <html>oops</html>", None),
    (plain(503, b""), "answered 503: no reason given", None),
    (plain(400, b'{"detail": "x"}'), 'answered 400: {"detail": "x"}', None),
    (plain(302, b"", more="Location: /x\r\n"), "answered 302", None),
    (plain(400, b"[" * 100000), "answered 400", None),
])
def test_a_refusal_is_one_line(server: StandIn, answer: bytes, message: str, code: str | None) -> None:
    server.override = lambda seen: answer
    with pytest.raises(Refusal) as caught:
        use(server, collect)
    assert message in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert caught.value.code == code


@pytest.mark.parametrize(("answer", "message"), [
    (b"", "closed the connection before it answered"),
    (b"HTTP/1.1 200 OK\r\nContent-Le", "before it answered|middle"),
    (b"hello\r\n\r\n", "not HTTP"),
    (chunked([b"data: {}\n\n"]), r"without \[DONE\]"),
    (chunked([b"data: [DONE]\n\n"], "application/json"), "content type 'application/json'"),
    (chunked([b"data: {}\n\n"])[:-7], "middle of its answer"),
    (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 0\r\n\r\n", "gzip"),
])
def test_a_broken_answer_says_how(server: StandIn, answer: bytes, message: str) -> None:
    server.override = lambda seen: answer
    with pytest.raises(ConnectionFailed, match=message):
        use(server, collect)


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(Unreachable, match=f"cannot reach http://127.0.0.1:{port}: .*refused"):
        asyncio.run(Client(Address.parse(f"http://127.0.0.1:{port}")).request("GET", "/health"))


def test_a_silent_server_is_not_waited_for(server: StandIn) -> None:
    server.split, server.release = 10, lambda seen: asyncio.Event()
    with pytest.raises(ConnectionFailed, match=r"longer than 0\.05 s"):
        use(server, collect, timeout=0.05)


def test_proxies_are_not_used(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert len(use(server, collect)) == 5


def test_keys_and_headers(server: StandIn) -> None:
    use(server, collect, api_key="s3cret", headers={"X-Team": "a b"})
    assert server.seen[0].headers["authorization"] == "Bearer s3cret" and server.seen[0].headers["x-team"] == "a b"


@pytest.mark.parametrize("options", [{"headers": {"X": "a\r\nY: b"}}, {"headers": {"a b": "c"}}, {"headers": {"X": "\u4e00"}}])
def test_a_header_that_would_be_two_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="header"):
        Client(Address.parse("http://h"), **options)


def test_a_bad_key_is_not_shown() -> None:
    with pytest.raises(ConfigError, match="api_key") as caught:
        Client(Address.parse("http://h"), api_key="s3cret\nX: y")
    assert "s3cret" not in str(caught.value)


def test_an_answer_that_is_no_json(server: StandIn) -> None:
    server.override = lambda seen: plain(200, b"nope")

    async def work(client: Client) -> None:
        (await client.request("GET", "/v1/models")).json()

    with pytest.raises(ConnectionFailed, match="no JSON"):
        use(server, work)


def test_retry_after() -> None:
    from octavo.client.connection import Answer

    assert [Answer(503, {"retry-after": text}, b"").retry_after for text in ("3", "soon", "", "-1", "9" * 5000)] == [
        3.0, None, None, None, None]


def test_https() -> None:
    """The certificate is checked, and the name in it."""
    certificate = Path(__file__).parents[1] / "data" / "localhost.pem"  # self-signed, with its key, until 2126

    async def main() -> None:
        server = StandIn()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=context)
        port = listening.sockets[0].getsockname()[1]
        stranger = Client(Address.parse(f"https://localhost:{port}"))
        with pytest.raises(Unreachable, match=r"certificate|CERTIFICATE"):
            await stranger.request("GET", "/health")
        client = Client(Address.parse(f"https://localhost:{port}"))
        assert client._tls is not None
        client._tls.load_verify_locations(certificate)
        assert (await client.request("GET", "/health")).status == 200
        assert len(await collect(client)) == 5 and client.opened == 1
        await client.close()
        listening.close()

    asyncio.run(main())
