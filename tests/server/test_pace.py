"""octavo.server.pace: what comes together begins a few at a time, and what comes alone begins at once."""

import asyncio
import functools

from octavo.server.pace import PER_TURN, Pace


def test_what_comes_alone_begins_at_once() -> None:
    async def main() -> None:
        pace, begun = Pace(), []
        for number in range(3 * PER_TURN):
            pace.begin(asyncio.get_running_loop(), functools.partial(begun.append, number))
            assert begun[-1] == number
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert not pace._turning  # an idle loop has nothing to do

    asyncio.run(main())


def test_of_what_comes_together_a_few_begin_in_each_turn_in_order() -> None:
    async def main() -> None:
        loop, pace, begun = asyncio.get_running_loop(), Pace(), list[int]()
        for number in range(5 * PER_TURN):
            pace.begin(loop, functools.partial(begun.append, number))
        assert begun == list(range(PER_TURN))
        turns = 0
        while len(begun) < 5 * PER_TURN:
            before = len(begun)
            await asyncio.sleep(0)
            turns += 1
            assert len(begun) - before <= PER_TURN
            if turns == 2:  # who comes later stands behind
                pace.begin(loop, functools.partial(begun.append, -1))
        assert turns >= 4
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert begun == [*range(5 * PER_TURN), -1] and not pace._turning

    asyncio.run(main())
