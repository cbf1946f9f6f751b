"""``python prober.py PORT PAUSE``: ask /livez again and again until standard input ends, then print the seconds that each took.

A process of its own: a client that is busy with hundreds of others would measure itself. The first answer is told by an
empty line.
"""

import json
import select
import socket
import sys
import time


def ask(port: int) -> float:
    """Seconds from the connection to the end of the answer; AssertionError for any but 200."""
    began, said = time.monotonic(), b""
    with socket.create_connection(("127.0.0.1", port), 30.0) as sock:
        sock.sendall(b"GET /livez HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n")
        while piece := sock.recv(4096):
            said += piece
    assert said.startswith(b"HTTP/1.1 200 "), said
    return time.monotonic() - began


if __name__ == "__main__":
    port, pause = int(sys.argv[1]), float(sys.argv[2])
    lags = [ask(port)]
    print(flush=True)
    while not select.select([sys.stdin], [], [], pause)[0]:
        lags.append(ask(port))
    print(json.dumps(lags))
