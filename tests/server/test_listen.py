"""octavo.server.listen: sockets that take clients, and every mistake as a ConfigError that names its option."""

import asyncio
import os
import socket
import stat
from pathlib import Path

import pytest
import uvloop

from octavo.errors import ConfigError
from octavo.server.config import ServerConfig
from octavo.server.listen import DOORS, SEND_BUFFER, address, doors, listen


def reach(sock: socket.socket) -> None:
    """A client connects, and is accepted."""
    with socket.socket(sock.family) as client:
        client.settimeout(5.0)
        client.connect(sock.getsockname())
        sock.setblocking(True)
        sock.settimeout(5.0)
        sock.accept()[0].close()


@pytest.mark.parametrize(("host", "shown"), [
    ("127.0.0.1", "127.0.0.1"), ("localhost", "localhost"), ("0.0.0.0", "127.0.0.1"), ("::1", "[::1]"), ("::", "[::1]")])
def test_a_free_port_is_found_and_told(host: str, shown: str) -> None:
    config = ServerConfig(host=host, port=0)
    try:
        sock = listen(config)
    except ConfigError:
        assert ":" in host and not Path("/proc/net/if_inet6").exists()
        return
    with sock:
        assert not sock.getblocking()
        assert address(config, sock) == f"http://{shown}:{sock.getsockname()[1]}"
        reach(sock)


def test_tls_is_https(tmp_path: Path) -> None:
    for name in ("key", "cert"):
        (tmp_path / name).touch()
    config = ServerConfig(port=0, ssl_keyfile=str(tmp_path / "key"), ssl_certfile=str(tmp_path / "cert"))
    with listen(config) as sock:
        assert address(config, sock).startswith("https://127.0.0.1:")


def test_the_kernel_keeps_little_for_a_client_that_does_not_read() -> None:
    """What it accepts counts for what the limits for slow readers promise; left alone it would take megabytes."""
    with listen(ServerConfig(port=0)) as sock:
        sock.setblocking(True)
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(sock.getsockname())
            server, _ = sock.accept()
            with server:
                server.setblocking(False)
                sent = 0
                try:
                    while sent < 16 << 20:
                        sent += server.send(b"x" * 65536)
                except BlockingIOError:
                    pass
                assert sent < 4 * SEND_BUFFER


def test_a_port_in_use_is_named() -> None:
    with listen(ServerConfig(port=0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1 is in use") as info:
            listen(ServerConfig(port=port))
        assert info.value.param == "port"
    listen(ServerConfig(port=port)).close()  # and free again at once


@pytest.mark.parametrize("host", ["256.1.1.1", "no host", "a" * 300, "192.0.2.1"])
def test_a_host_that_is_none_of_ours_is_named(host: str) -> None:
    with pytest.raises(ConfigError) as info:
        listen(ServerConfig(host=host, port=0))
    assert info.value.param == "host"


def test_a_unix_socket(tmp_path: Path) -> None:
    config = ServerConfig(uds=str(tmp_path / "octavo"))
    with listen(config) as sock:
        assert address(config, sock) == f"unix:{tmp_path / 'octavo'}"
        assert stat.S_ISSOCK(os.lstat(tmp_path / "octavo").st_mode)
        reach(sock)


def test_a_unix_socket_that_was_left_behind_is_replaced(tmp_path: Path) -> None:
    config = ServerConfig(uds=str(tmp_path / "octavo"))
    listen(config).close()
    assert (tmp_path / "octavo").exists()
    with listen(config) as sock:
        reach(sock)


def test_a_unix_socket_that_answers_is_left_alone(tmp_path: Path) -> None:
    config = ServerConfig(uds=str(tmp_path / "octavo"))
    with listen(config) as sock:
        with pytest.raises(ConfigError, match="in use") as info:
            listen(config)
        assert info.value.param == "uds"
        reach(sock)


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("/etc/passwd")])
def test_what_is_no_socket_is_never_removed(tmp_path: Path, make: object) -> None:
    path = tmp_path / "precious"
    make(path)  # type: ignore[operator]
    with pytest.raises(ConfigError):
        listen(ServerConfig(uds=str(path)))
    assert os.path.lexists(path)


@pytest.mark.parametrize("path", ["/nowhere/at/all", "/" + "x" * 200])
def test_a_path_that_cannot_be_is_named(path: str) -> None:
    with pytest.raises(ConfigError) as info:
        listen(ServerConfig(uds=path))
    assert info.value.param == "uds"


def test_clients_who_come_at_once_are_let_in_together() -> None:
    """The loop takes one connection in a turn for each socket that it listens on, however many wait."""
    clients = 3 * DOORS

    async def turns() -> int:
        loop, arrived, count = asyncio.get_running_loop(), list[asyncio.BaseTransport](), 0

        class Guest(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                arrived.append(transport)

        sock = listen(ServerConfig(port=0))
        waiting = [socket.create_connection(sock.getsockname(), timeout=5.0) for _ in range(clients)]
        servers = [await loop.create_server(Guest, sock=door) for door in doors(sock)]
        while len(arrived) < clients:
            count += 1
            await asyncio.sleep(0)
        for open_ in (*arrived, *servers, *waiting):
            open_.close()
        await asyncio.sleep(0)
        return count

    assert uvloop.run(turns()) < clients // 2
