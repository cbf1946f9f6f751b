"""Listening: the sockets on which a server is reached, opened before anything else is done.

Owns addresses and their mistakes; it does not know what is served. Invariant: when a socket is returned, clients can
connect, and whatever stood in the way was a ConfigError that names the option.
"""

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from octavo.errors import ConfigError
from octavo.server.config import ServerConfig

BACKLOG = 2048
SEND_BUFFER = 256 << 10
"""Bytes that the kernel may keep for a client that does not read. Left to itself it would take several MiB for each, and none
of the limits for slow readers would be about all that waits for one."""

DOORS = 16
"""How often one socket is listened on. An event loop takes one connection for each in a turn, and a turn under load takes
milliseconds: of a thousand clients who come at once the last would wait for seconds."""


def listen(config: ServerConfig) -> socket.socket:
    """A listening socket for the options host and port, or uds."""
    return _listen_unix(config.uds) if config.uds is not None else _listen_tcp(config.host, config.port)


def doors(sock: socket.socket) -> list[socket.socket]:
    """The listening socket, and copies of it, for an event loop to listen on all of them."""
    return [sock, *(sock.dup() for _ in range(DOORS - 1))]


def address(config: ServerConfig, sock: socket.socket) -> str:
    """Where a person finds the server: a URL, or the path of the Unix socket."""
    if config.uds is not None:
        return f"unix:{config.uds}"
    scheme = "http" if config.ssl_certfile is None else "https"
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(config.host, config.host)
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"


def _listen_tcp(host: str, port: int) -> socket.socket:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"host {host!r} is no address of this machine.", "host") from error
    family, kind, protocol, _, place = found[0]
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)  # what is accepted inherits it
    try:
        sock.bind(place)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise ConfigError(f"port {port} of {host} is in use; choose another one with --port.", "port") from error
        if error.errno == errno.EACCES:
            raise ConfigError(f"port {port} needs privileges that this process has not.", "port") from error
        raise ConfigError(f"cannot listen on {host} port {port}: {error.strerror}.", "host") from error
    sock.setblocking(False)
    return sock


def _listen_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(Path(path))
        sock.bind(path)
        sock.listen(BACKLOG)
    except (OSError, ValueError) as error:
        sock.close()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigError(f"uds {path!r:.200} cannot be listened on: {reason}.", "uds") from error
    sock.setblocking(False)
    return sock


def _remove_stale(path: Path) -> None:
    """Remove the socket of a server that is gone; one that answers is left, and binding to it fails."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
        finally:
            probe.close()
