"""Load runs: what many clients do to a server on purpose, in any size; tests run small ones, the soak large.

Each returns figures and raises AssertionError for a broken promise; what must hold afterwards is Served.settle's to say.
"""

import asyncio
import random
import time
from collections.abc import Callable
from typing import Any

from badness import CASES, check, send
from crowd import alone, probed, until
from proxy import Proxy
from served import ROWS, Served, memory
from web import Reply, call, completion, encode, leave

Figures = dict[str, float]
Body = dict[str, Any]


def percentile(values: list[float], share: float) -> float:
    """The value that this share of all is not above."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def burst(served: Served, calls: int, cap: int) -> Figures:
    """L02: far more calls at once than may wait. Needs a server with ``--max-queued-requests`` cap."""
    replies = await asyncio.gather(*(call(served.port, body=completion(f"Call {n}", max_tokens=200)) for n in range(calls)))
    taken = [reply for reply in replies if reply.status == 200]
    refused = [reply for reply in replies if reply.status == 503]
    assert len(taken) + len(refused) == calls and all(reply.ended_well for reply in taken)
    assert all(int(reply.headers["retry-after"]) >= 1 for reply in refused)
    first = min(reply.seconds for reply in taken)  # nobody's place became free before that
    early = sum(reply.seconds < first for reply in refused)
    assert cap <= len(taken) and len(taken) - (cap + ROWS) <= calls - early, (len(taken), early)
    assert refused and percentile([reply.seconds for reply in refused], 0.99) < max(1.0, calls / 200)
    return {"taken": len(taken), "refused": len(refused), "refused p99 ms": 1e3 * percentile([r.seconds for r in refused], 0.99)}


async def patient(served: Served, calls: int) -> Figures:
    """L02's other half: who is refused and comes back when told to is served."""
    async def one(number: int) -> int:
        for attempt in range(30):
            reply = await call(served.port, body=completion(f"Patient {number}", max_tokens=100))
            if reply.status == 200:
                return attempt
            assert reply.status == 503
            await asyncio.sleep(int(reply.headers["retry-after"]) * random.uniform(0.9, 1.1))
        raise AssertionError("never served")

    tries = await asyncio.gather(*map(one, range(calls)))
    return {"most tries": 1 + max(tries)}


async def storm(served: Served, make: Callable[[int], Body], clients: int, rounds: int, within: float, seed: int = 0) -> Figures:
    """L03 to L06: nine of ten clients leave without a word somewhere within some seconds; the rest get every bit."""
    rng = random.Random(seed)
    bodies = [make(number) for number in range(clients)]
    staying = list(range(0, clients, 10))
    expected = await alone(served, [bodies[number] for number in staying])
    for _ in range(rounds):
        leaving = [leave(served.port, bodies[number], after=rng.uniform(0.0, within), reset=rng.random() < 0.7)
                   for number in range(clients) if number not in staying]
        replies, gone = await asyncio.gather(
            asyncio.gather(*(call(served.port, body=bodies[number]) for number in staying)), asyncio.gather(*leaving))
        assert [reply.token_ids for reply in replies] == expected
        await until(lambda: not served.busy(), 3.0, "an idle server")
    return {"left": len(gone) * rounds, "stayed": len(staying) * rounds}


async def freed(served: Served, make: Callable[[int], Body], times: int, limit: float) -> Figures:
    """L03: how long blocks stay taken after their client has left; the server is idle but for it."""
    waits = []
    for number in range(times):
        left = await leave(served.port, make(number), after=0.05)
        await until(lambda since=left: not served.busy(since), 3.0, "free blocks")
        waits.append(time.monotonic() - left)
    # An engine that becomes idle says so at once, but at most every 50 ms.
    assert percentile(waits, 0.9) < limit, waits
    return {"freed p90 ms": 1e3 * percentile(waits, 0.9)}


async def fuzz(served: Served, traces: int, seed: int = 0) -> Figures:
    """L07: requests that begin alike are left after milliseconds and asked again at once, beside others that stay."""
    stem = [3 + (7 * n) % 300 for n in range(300)]
    lengths = [15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257]
    bodies = [completion([*stem[:length], 40 + number], max_tokens=12) for number, length in enumerate(lengths)]
    anchors = [completion(f"Anchor {number}", max_tokens=60, stream=number % 2 == 0) for number in range(8)]
    expected, steady = await alone(served, bodies), await alone(served, anchors)

    async def again(body: Body, rng: random.Random) -> list[list[int]]:
        for _ in range(rng.randrange(1, 4)):
            await leave(served.port, body | {"max_tokens": 200}, after=rng.uniform(0.005, 0.025))
        return (await call(served.port, body=body)).token_ids

    for trace in range(traces):
        rng = random.Random(1000 * seed + trace)
        anchored, retried = await asyncio.gather(
            asyncio.gather(*(call(served.port, body=body) for body in anchors)),
            asyncio.gather(*(again(body, rng) for body in rng.sample(bodies, len(bodies)))))
        order = random.Random(1000 * seed + trace).sample(range(len(bodies)), len(bodies))
        assert retried == [expected[place] for place in order], f"trace {trace} of seed {seed}"
        assert [reply.token_ids for reply in anchored] == steady, f"trace {trace} of seed {seed}"
    return {"traces": traces, "retries": traces * len(bodies)}


async def poison(served: Served, seconds: float, clients: int, seed: int = 0) -> Figures:
    """L08: good clients, and now and then something of cases.jsonl between them."""
    rng = random.Random(seed)
    good = [completion(f"Good {number}", max_tokens=48, stream=number % 2 == 0) for number in range(16)]
    expected, end = await alone(served, good), time.monotonic() + seconds
    counts = {"good": 0, "bad": 0}
    heavy = {case["id"] for case in CASES if case.get("t", 2) > 2}

    async def client(number: int) -> None:
        while time.monotonic() < end:
            if rng.random() < 0.05:
                case = rng.choice([case for case in CASES if case["id"] not in heavy])
                check(case | {"t": 30.0}, await send(served.port, case))
                counts["bad"] += 1
            else:
                which = rng.randrange(len(good))
                reply = await call(served.port, body=good[which])
                assert reply.ended_well and reply.token_ids == expected[which], reply
                counts["good"] += 1

    await asyncio.gather(*map(client, range(clients)))
    return {name: float(count) for name, count in counts.items()} | {"good per s": counts["good"] / seconds}


async def schemas(served: Served, count: int, clients: int) -> Figures:
    """L10: a new schema or regex with every request; the memory for them has an end, and others hardly notice."""
    plain: list[float] = []
    sizes: list[int] = []
    numbers = iter(range(count))

    async def client(_: int) -> None:
        for number in numbers:
            schema = {"type": "object", "properties": {f"key{number}": {"type": "integer"}}, "additionalProperties": False}
            wanted = {"json": schema} if number % 2 else {"regex": f"[a-z]{{1,{number % 50 + 2}}}-{number}"}
            reply = await call(served.port, body={"prompt": "a", "max_tokens": 4, "structured_outputs": wanted})
            assert reply.status == 200, reply
            if number % max(1, count // 50) == 0:
                sizes.append(sum(map(memory, (served.pid, served.engine_pid))))

    async def bystander() -> None:
        while True:
            plain.append((await call(served.port, body=completion())).seconds)
            await asyncio.sleep(0.05)

    watching = asyncio.create_task(bystander())
    try:
        await asyncio.gather(*map(client, range(clients)))
    finally:
        watching.cancel()
    half = sizes[len(sizes) // 2 :]
    growth = (max(half) - half[0]) / 2**20
    assert growth < 64.0, f"{growth:.0f} MiB more in the second half"
    assert percentile(plain, 0.9) < 2.0
    return {"schemas": count, "growth MiB": growth, "bystander p90 ms": 1e3 * percentile(plain, 0.9)}


async def long_and_short(served: Served, seconds: float, clients: int) -> Figures:
    """L11: one prompt of the greatest length every second beside short ones, whose first tokens must not wait for it."""
    end = time.monotonic() + seconds
    firsts: list[float] = []
    idle: list[float] = []

    async def ask(number: int) -> float:
        began = time.monotonic()
        reply = await call(served.port, body=completion(f"Short {number}", stream=True, max_tokens=8))
        assert reply.ended_well
        return reply.times[0] - began

    async def short(number: int, into: list[float], until_: float) -> None:
        while time.monotonic() < until_:
            into.append(await ask(number))
            await asyncio.sleep(0.5)

    await asyncio.gather(*(short(number, idle, time.monotonic() + min(5.0, seconds)) for number in range(clients)))
    end = time.monotonic() + seconds

    async def long() -> None:
        count = 0
        while time.monotonic() < end:
            body = completion([3 + (count + 7 * n) % 300 for n in range(2000)], max_tokens=4)
            assert (await call(served.port, body=body)).status == 200
            count += 1
            await asyncio.sleep(1.0)

    await asyncio.gather(long(), *(short(number, firsts, end) for number in range(clients)))
    before, after = percentile(idle, 0.99), percentile(firsts, 0.99)
    assert after < max(5.0 * before, 0.5), (before, after)
    return {"idle ttft p99 ms": 1e3 * before, "ttft p99 ms": 1e3 * after}


async def churn(served: Served, connections: int, at_once: int = 50) -> Figures:
    """L12: connections that are dropped before, within and after a request."""
    data = encode("/v1/completions", completion(max_tokens=100, stream=True))
    gate = asyncio.Semaphore(at_once)

    async def one(number: int) -> None:
        async with gate:
            reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
            try:
                match number % 5:
                    case 1:
                        writer.write(data[:60])  # within the head
                    case 2:
                        writer.write(data[:-10])  # within the body
                    case 3:
                        writer.write(data)
                        await reader.read(10)
                    case 4:
                        writer.write(data)
                        await reader.read()
                await asyncio.sleep(0)
            except OSError:
                pass
            finally:
                writer.transport.abort() if number % 2 else writer.close()

    began = time.monotonic()
    await asyncio.gather(*map(one, range(connections)))
    return {"connections per s": connections / (time.monotonic() - began)}


async def closed_loop(served: Served, seconds: float, clients: int, seed: int = 0) -> Figures:
    """L01: clients that ask again and again, half of them with a common beginning, half of them streaming."""
    rng, end = random.Random(seed), time.monotonic() + seconds
    stem = "Once upon a time there was a server that answered every question it was asked. " * 3
    done, gaps = 0, [0.0]

    async def client(number: int) -> None:
        nonlocal done
        while time.monotonic() < end:
            prompt = (stem if rng.random() < 0.5 else "") + f"Question {rng.randrange(1000)}"
            body = completion(prompt, max_tokens=rng.choice((1, 8, 32, 64)), stream=rng.random() < 0.5)
            reply: Reply = await call(served.port, body=body, patience=300.0)
            assert reply.ended_well, reply
            gaps.extend(later - now for now, later in zip(reply.times, reply.times[1:], strict=False))
            done += 1

    _, lags = await probed(served, asyncio.gather(*map(client, range(clients))))
    assert max(gaps) < 5.0, max(gaps)
    return {"requests per s": done / seconds, "requests": done, "worst gap ms": 1e3 * max(gaps),
            "livez p99 ms": 1e3 * percentile(lags, 0.99)}


def said(reply: Reply) -> list[tuple[list[int], list[float]]]:
    """Ids and logprobs of each choice of a completion, streamed or not, that asked for both."""
    assert reply.ended_well, reply
    found: dict[int, list[float]] = {}
    for part in (reply.events[:-1] if reply.body.startswith(b"data: ") else [reply.json]):
        for choice in part["choices"]:
            found.setdefault(choice["index"], []).extend((choice["logprobs"] or {"token_logprobs": []})["token_logprobs"])
    return list(zip(reply.token_ids, [found[index] for index in sorted(found)], strict=True))


def mixed(count: int) -> list[Body]:
    """Requests of all lengths up to 300 tokens, half of them with a common beginning, some of them sampled."""
    return [completion([*(3 + (7 * n) % 300 for n in range((number * 37) % 290 if number % 2 else 0)), 5 + number],
                       max_tokens=24, logprobs=2, temperature=float(number % 3 == 0), seed=number) for number in range(count)]


async def same_bits(served: Served, bodies: list[Body], expected: list[Any] | None = None) -> list[Any]:
    """L15: alone, eight at a time, all together, cold, warm, streamed: the same ids and the same logprobs."""
    def cold(number: int) -> list[Body]:
        return [body | {"cache_salt": f"{number}.{served.port}"} for body in bodies]

    alone_ = [said(await call(served.port, body=body)) for body in cold(0)]
    assert expected is None or alone_ == expected
    for at_once, ways in ((8, cold(1)), (8, cold(1)), (len(bodies), cold(2)), (len(bodies), bodies)):
        for streams in (False, True):
            gate = asyncio.Semaphore(at_once)

            async def one(body: Body, gate: asyncio.Semaphore = gate, streams: bool = streams) -> list[Any]:
                async with gate:
                    return said(await call(served.port, body=body | {"stream": streams}))

            assert await asyncio.gather(*map(one, ways)) == alone_, (at_once, streams)
    return alone_


async def rolling(proxy: Proxy, replicas: list[Served], start: Callable[[], Served], clients: int) -> Figures:
    """L13: each replica is asked to end and followed by a new one while clients go on asking; no call may fail."""
    bodies = [completion(f"Rolling {number}", max_tokens=100, stream=number % 2 == 0) for number in range(clients)]
    expected, done, over = await alone(replicas[0], bodies), 0, False

    async def client(number: int) -> None:
        nonlocal done
        while not over:
            reply = await call(proxy.port, body=bodies[number])
            assert reply.ended_well and reply.token_ids == expected[number], reply
            done += 1

    proxy.ports = [served.port for served in replicas]
    asking = asyncio.gather(*map(client, range(clients)))
    for number, served in enumerate(replicas):
        before = done
        await until(lambda before=before: asking.done() or done > before + 2 * clients, 30.0, "answers")
        assert await asyncio.to_thread(served.end) == 0
        replicas[number] = await asyncio.to_thread(start)
        proxy.ports[number] = replicas[number].port
    over = True
    await asking
    return {"calls": done, "turned away and taken elsewhere": proxy.elsewhere}
