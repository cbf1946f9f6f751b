"""Many clients at once: what tests of faults and of load have in common."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from served import Served
from web import Reply, call, completion

PROBER = Path(__file__).with_name("prober.py")
T = TypeVar("T")


async def until(condition: Callable[[], Any], seconds: float, what: str = "this") -> None:
    """Wait for a condition without stopping the clients."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what} has not come about in {seconds:g} s"
        await asyncio.sleep(0.005)


class Crowd:
    """Clients that ask all at once, each something else; made inside the event loop.

    Args:
        fields: of the bodies. streams: which of them stream.

    Attributes:
        talking: numbers of the streams that have said something.
    """

    def __init__(self, served: Served, count: int, streams: Callable[[int], bool] = lambda number: True, **fields: Any) -> None:
        self.served, self.bodies = served, self.bodies_of(count, streams, **fields)
        self.talking: set[int] = set()
        self._tasks = [asyncio.create_task(self._one(number, body)) for number, body in enumerate(self.bodies)]

    @staticmethod
    def bodies_of(count: int, streams: Callable[[int], bool] = lambda number: True, **fields: Any) -> list[dict[str, Any]]:
        """What they ask."""
        return [completion(f"Client {number} says", stream=streams(number), **fields) for number in range(count)]

    async def _one(self, number: int, body: dict[str, Any]) -> Reply:
        return await call(self.served.port, body=body, on_data=lambda reply: self.talking.add(number))

    async def under_way(self, count: int) -> None:
        """Wait until so many streams have said something and none has ended."""
        await until(lambda: len(self.talking) >= count or self.ended, 30.0, "tokens in all streams")
        assert not self.ended, [self._tasks[number].result() for number in self.ended]

    @property
    def ended(self) -> list[int]:
        """Numbers of those that have their answer."""
        return [number for number, task in enumerate(self._tasks) if task.done()]

    async def replies(self) -> list[Reply]:
        """Their answers, when all have ended."""
        return list(await asyncio.gather(*self._tasks))


async def alone(served: Served, bodies: Sequence[dict[str, Any]]) -> list[list[list[int]]]:
    """The token ids of each request, asked one after the other."""
    return [(await call(served.port, body=body)).token_ids for body in bodies]


async def status(served: Served, path: str) -> int:
    """Of a probe."""
    return (await call(served.port, path, method="GET", key=None, patience=5.0)).status


async def probed(served: Served, work: Awaitable[T], pause: float = 0.01) -> tuple[T, list[float]]:
    """What some work gives, and in order of length how many seconds /livez took meanwhile; see prober.py."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROBER), str(served.port), str(pause), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    await process.stdout.readline()
    try:
        result = await work
    finally:
        said, _ = await process.communicate(b"")  # ends its input
    assert process.returncode == 0
    return result, sorted(json.loads(said))
