"""AsyncLLMEngine: answers as of LLM, from a thread; aborts, refusals and the end."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from octavo import LLM, AsyncEngineArgs, AsyncLLMEngine, EngineArgs, RequestOutput, SamplingParams
from octavo.errors import EngineDead, RequestError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[AsyncLLMEngine]:
    engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(model=str(tiny), max_model_len=256, skip_tokenizer_init=True))
    yield engine
    engine.close()


async def last(engine: AsyncLLMEngine, prompt: list[int], params: SamplingParams, name: str | None = None) -> RequestOutput:
    states = [state async for state in engine.generate({"prompt_token_ids": prompt}, params, name)]
    assert [state.finished for state in states] == [False] * (len(states) - 1) + [True]
    return states[-1]


def test_the_arguments_are_those_of_the_engine() -> None:
    assert AsyncEngineArgs is EngineArgs


def test_many_at_once_answer_as_offline(engine: AsyncLLMEngine, tiny: Path) -> None:
    prompts = [[1 + i, 2, 3 + i] for i in range(9)]
    llm = LLM(str(tiny), max_model_len=256, skip_tokenizer_init=True)
    want = [out.outputs[0].token_ids for out in llm.generate(prompt_token_ids=prompts, sampling_params=GREEDY, use_tqdm=False)]
    llm.close()

    async def all_of_them() -> list[RequestOutput]:
        return await asyncio.gather(*(last(engine, prompt, GREEDY) for prompt in prompts))

    assert [out.outputs[0].token_ids for out in asyncio.run(all_of_them())] == want


def test_states_grow(engine: AsyncLLMEngine) -> None:
    async def lengths() -> list[int]:
        return [len(out.outputs[0].token_ids) async for out in engine.generate([5, 6], GREEDY)]

    found = asyncio.run(lengths())
    assert found == sorted(found) and found[-1] == 12


def test_a_refusal_is_the_callers_alone(engine: AsyncLLMEngine) -> None:
    async def both() -> RequestOutput:
        other = asyncio.create_task(last(engine, [7], GREEDY))
        with pytest.raises(RequestError, match="prompt"):
            await last(engine, [10**9], GREEDY)
        return await other

    assert len(asyncio.run(both()).outputs[0].token_ids) == 12


def test_an_id_in_use_is_refused_and_its_owner_goes_on(engine: AsyncLLMEngine) -> None:
    async def both() -> RequestOutput:
        first = engine.generate([1, 2], GREEDY.clone(max_tokens=100), "mine")
        await anext(first)
        with pytest.raises(RequestError, match="mine"):
            await last(engine, [3], GREEDY, "mine")
        return [state async for state in first][-1]

    assert len(asyncio.run(both()).outputs[0].token_ids) == 100


def test_abort_and_leaving_early_free_everything(engine: AsyncLLMEngine) -> None:
    long = GREEDY.clone(max_tokens=200)

    async def ends() -> str | None:
        running = asyncio.create_task(last(engine, [9, 9], long, "long"))
        async for _ in engine.generate([8, 8], long, "left"):
            break
        while "long" not in engine._requests:
            await asyncio.sleep(0.001)
        await engine.abort("long")
        await engine.abort("never was")
        return (await running).outputs[0].finish_reason

    assert asyncio.run(ends()) == "abort"
    assert len(asyncio.run(last(engine, [4], GREEDY)).outputs[0].token_ids) == 12  # and nothing else is left to do
    assert engine.engine.get_num_unfinished_requests() == 0


def test_after_the_end_nothing_waits_for_ever(tiny: Path) -> None:
    engine = AsyncLLMEngine(AsyncEngineArgs(model=str(tiny), max_model_len=256, skip_tokenizer_init=True))

    async def cut() -> None:
        states = engine.generate([1, 2], GREEDY.clone(max_tokens=250))
        await anext(states)
        await asyncio.to_thread(engine.close)
        with pytest.raises(EngineDead):
            async for _ in states:
                pass
        with pytest.raises(EngineDead):
            await last(engine, [1], GREEDY)
        with pytest.raises(EngineDead):
            await engine.check_health()

    asyncio.run(cut())


def test_a_broken_engine_tells_everybody_though_it_cannot_abort(tiny: Path) -> None:
    """One is aborted while a step breaks off and leaves blocks that fit nothing: the other one must hear of the end."""
    engine = AsyncLLMEngine(AsyncEngineArgs(model=str(tiny), max_model_len=256, skip_tokenizer_init=True))
    inner = engine.engine.engine
    state, schedule, long = inner._state, inner._scheduler.schedule, GREEDY.clone(max_tokens=250)

    def broken() -> object:
        if state.num_running < 2:
            return schedule()
        engine._do(lambda: engine._abort("left"))
        for request in state.requests.values():
            state.pool.release(state.table.table(request.sequences[0].row).tolist())
        raise KeyError("planted")

    inner._scheduler.schedule = broken  # type: ignore[method-assign,assignment]

    async def both() -> None:
        async with asyncio.timeout(20):
            left, stays = await asyncio.gather(
                last(engine, [1, 2], long, "left"), last(engine, [1, 3], long, "stays"), return_exceptions=True)
        assert isinstance(left, RequestOutput) and isinstance(stays, EngineDead)

    asyncio.run(both())
    engine.close()
