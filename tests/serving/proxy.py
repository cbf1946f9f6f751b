"""A reverse proxy for tests, of the usual kind: what one replica does not take, because it ends or is gone, gets the other."""

import asyncio
import time

PATIENCE = 30.0


class Proxy:
    """``async with`` it.

    Attributes:
        ports: of the replicas. port: its own. elsewhere: how often a replica did not take a request.
    """

    def __init__(self) -> None:
        self.ports: list[int] = []
        self.elsewhere = self._turn = 0

    async def __aenter__(self) -> "Proxy":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        end = time.monotonic() + PATIENCE
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            size = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
            request = head + await reader.readexactly(size)
            while time.monotonic() < end:
                self._turn += 1
                if await self._pass(self.ports[self._turn % len(self.ports)], request, writer):
                    break
                self.elsewhere += 1
                await asyncio.sleep(0.01)
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _pass(self, port: int, request: bytes, writer: asyncio.StreamWriter) -> bool:
        """Whether a replica has taken the request; what it says then is passed on as it comes, and its end too."""
        try:
            reader, upstream = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return False
        try:
            upstream.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            if head.startswith(b"HTTP/1.1 503 "):
                return False
        except (OSError, asyncio.IncompleteReadError):  # it ended before it had taken the connection
            return False
        else:
            writer.write(head)
            while piece := await reader.read(65536):
                writer.write(piece)
                await writer.drain()
            return True
        finally:
            upstream.close()
