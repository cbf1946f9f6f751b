"""Faults on purpose: what is killed, stopped, full or broken costs what it must, and nothing else."""

import asyncio
import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq
from crowd import Crowd, alone, status, until
from served import ROOT, ROWS, Served, gone, wait_for
from web import call, completion, encode

from octavo.messages import EngineRequest
from octavo.params import SamplingParams
from octavo.server.api_process import ECHO_SECONDS
from octavo.server.ipc import Abort, Add, encode_request

LONG = 1500
"""Tokens of an answer that takes seconds."""


def refuses(port: int) -> bool:
    """Whether nobody listens there. A process whose first thread has ended may still hold a socket for a moment."""
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED


def test_f02_a_killed_engine_ends_its_streams_and_comes_back(server: Served) -> None:
    async def run() -> None:
        # More than run at once: some have not begun when it happens.
        crowd = Crowd(server, ROWS + 8, lambda number: number < ROWS or number % 2 == 0, max_tokens=LONG)
        await crowd.under_way(ROWS)
        killed = time.monotonic()
        os.kill(server.engine_pid, signal.SIGKILL)
        while await status(server, "/readyz") != 503:
            assert time.monotonic() - killed < 2.0
        while (refused := await call(server.port, body=completion())).status == 200:
            assert time.monotonic() - killed < 2.0
        assert refused.status == 503 and int(refused.headers["retry-after"]) >= 1
        for number, reply in enumerate(await crowd.replies()):
            if number in crowd.talking:
                assert reply.stream_error is not None and reply.stream_error["type"] == "server_error", reply.body[-300:]
            else:
                assert reply.status == 500 and reply.json["error"]["type"] == "server_error", reply
        assert time.monotonic() - killed < 5.0

    asyncio.run(run())
    server.wait_ready(30.0)
    server.settle(restarted=True)


def test_f03_nothing_outlives_a_killed_api_process(model: Path) -> None:
    with Served(model, "--api-server-count", "2") as served:
        children, folder = served.children(), served.look()["directory"]
        assert served.engine_pid in children and len(children) == 3  # and who removes the folder
        served.process.kill()
        served.process.wait()
        wait_for(lambda: all(map(gone, children)), 5.0, "the end of all processes")
        wait_for(lambda: refuses(served.port), 5.0, "a free port")
        wait_for(lambda: not Path(folder).exists(), 5.0, "the end of the folder")
        with Served(model, "--port", str(served.port), base=served.folder) as again:
            assert again.port == served.port and again.sing() == served.canary
            again.settle()


def test_f05_a_stopped_engine_is_seen_and_goes_on_as_if_nothing_had_been(server: Served) -> None:
    async def run() -> None:
        bodies = [completion(f"Client {number} says", stream=True, max_tokens=800) for number in range(4)]
        expected = await alone(server, bodies)
        crowd = Crowd(server, 4, max_tokens=800)
        await crowd.under_way(4)
        os.kill(server.engine_pid, signal.SIGSTOP)
        try:
            stopped = time.monotonic()
            limited = await call(server.port, body=completion(timeout=1.0))
            assert limited.status == 503 and "retry-after" in limited.headers, limited  # it has never begun
            assert await status(server, "/version") == 401  # the port answers
            while await status(server, "/livez") != 503:
                assert time.monotonic() - stopped < 10.0
                await asyncio.sleep(0.05)
            assert await status(server, "/readyz") == 503
            refused = await call(server.port, body=completion())
            assert refused.status == 503 and "retry-after" in refused.headers
        finally:
            os.kill(server.engine_pid, signal.SIGCONT)
        assert [reply.token_ids for reply in await crowd.replies()] == expected
        await until(lambda: server.ask_status("/readyz") == 200, 5.0, "readiness")

    asyncio.run(run())
    server.settle()


def test_f07_a_drain_lets_everything_end_that_has_begun(model: Path) -> None:
    with Served(model, faults="slow_step:0.01") as served:
        pids = [served.pid, *served.children()]

        async def run() -> None:
            crowd = Crowd(served, 32, lambda number: number % 4 > 0, max_tokens=200)
            await until(lambda: served.look()["front"]["tickets"] == 32, 10.0, "32 requests")
            idle = await asyncio.open_connection("127.0.0.1", served.port)
            served.process.send_signal(signal.SIGTERM)
            while await status(served, "/readyz") != 503:
                await asyncio.sleep(0.001)
            assert await status(served, "/health") == 200
            refused = await call(served.port, body=completion())
            assert refused.status == 503 and "retry-after" in refused.headers
            assert refused.headers.get("connection") == "close"
            replies = await crowd.replies()
            assert all(reply.ended_well for reply in replies), [reply for reply in replies if not reply.ended_well]
            answers.extend(reply.token_ids for reply in replies)
            assert await idle[0].read() == b""
            idle[1].close()

        answers: list[list[list[int]]] = []
        asyncio.run(run())
        assert served.process.wait(5.0) == 0
        assert all(map(gone, pids)) and not list(served.folder.glob("octavo-server-*"))
    with Served(model) as served:  # bit by bit what an idle server says
        bodies = [completion(f"Client {number} says", max_tokens=200) for number in range(0, 32, 5)]
        assert asyncio.run(alone(served, bodies)) == answers[::5]


@pytest.mark.parametrize(("options", "signals"), [(("--shutdown-timeout", "1"), 1), ((), 2)])
def test_f08_what_does_not_end_in_time_or_is_told_twice_ends_with_an_error(
        model: Path, options: tuple[str, ...], signals: int) -> None:
    with Served(model, *options, faults="slow_step:0.02") as served:
        pids = [served.pid, *served.children()]

        async def run() -> None:
            crowd = Crowd(served, ROWS + 4, lambda number: number < ROWS, max_tokens=LONG)
            await crowd.under_way(ROWS)
            served.process.send_signal(signal.SIGTERM)
            if signals == 2:
                while await status(served, "/readyz") != 503:
                    await asyncio.sleep(0.001)
                served.process.send_signal(signal.SIGTERM)  # an echo of the first one
                await asyncio.sleep(1.5 * ECHO_SECONDS)
                assert not crowd.ended
                served.process.send_signal(signal.SIGTERM)
            for number, reply in enumerate(await crowd.replies()):
                error = reply.stream_error if number < ROWS else reply.json["error"]
                assert error is not None and error["type"] == "overloaded_error", reply.body[-300:]

        began = time.monotonic()
        asyncio.run(run())
        assert served.process.wait(5.0) == 0
        assert time.monotonic() - began < 15.0
        assert all(map(gone, pids)) and not list(served.folder.glob("octavo-server-*"))


def test_f09_an_exception_in_a_step_ends_that_steps_requests_only(model: Path) -> None:
    with Served(model, faults="step_raise:80") as served:

        async def run() -> None:
            crowd = Crowd(served, ROWS + 8, lambda number: number % 2 == 0, max_tokens=120)
            replies = await crowd.replies()
            failed = [reply for reply in replies if not reply.ended_well]
            assert 0 < len(failed) <= ROWS
            for reply in failed:
                error = reply.stream_error if reply.status == 200 else reply.json["error"]
                assert error is not None and error["type"] == "server_error" and "fails" not in error["message"], reply.body
            good = [number for number, reply in enumerate(replies) if reply.ended_well]
            assert [replies[number].token_ids for number in good] == await alone(served, [crowd.bodies[n] for n in good])

        asyncio.run(run())
        served.settle(errors=True)
        assert served.log().count("step 80 fails") == 1


def test_f11_a_row_without_finite_logits_ends_its_request_and_no_other(model: Path) -> None:
    with Served(model, faults="nan_row:300:3") as served:

        async def run() -> None:
            crowd = Crowd(served, 8, lambda number: number % 2 == 0, max_tokens=600)
            replies = await crowd.replies()
            bad = [number for number, reply in enumerate(replies) if not reply.ended_well]
            assert len(bad) == 1
            reply = replies[bad[0]]
            error = reply.stream_error if reply.status == 200 else reply.json["error"]
            assert error is not None and error["type"] == "server_error"
            # Asked again, it is answered, and not from blocks of the failed one: the same as in other company.
            again = await alone(served, crowd.bodies)
            assert all(again[number] == replies[number].token_ids for number in range(8) if number not in bad)
            if reply.status == 200:
                said = reply.token_ids[0]
                assert again[bad[0]][0][: len(said)] == said

        asyncio.run(run())
        served.settle()


def test_f12_a_lost_device_ends_the_engine_process_and_not_the_server(model: Path) -> None:
    with Served(model, faults="device_lost:500") as served:

        async def run() -> None:
            began = time.monotonic()
            crowd = Crowd(served, 8, max_tokens=LONG)
            await crowd.under_way(8)
            replies = await crowd.replies()
            assert all(reply.stream_error is not None for reply in replies)
            assert time.monotonic() - began < 10.0

        asyncio.run(run())
        served.wait_ready(30.0)
        served.settle(restarted=True, errors=True)
        assert "exit code 71" in served.log()


def test_f13_a_pool_far_too_small_for_all_changes_no_bit(server: Served, model: Path) -> None:
    async def run(served: Served) -> list[list[list[int]]]:
        return [reply.token_ids for reply in await Crowd(served, 48, max_tokens=150).replies()]

    expected = asyncio.run(run(server))
    with Served(model, "--max-model-len", "512", blocks=32) as small:
        assert asyncio.run(run(small)) == expected
        assert small.look()["preempted"] > 0
        small.settle()


def test_f14_garbage_on_the_engines_socket_is_dropped_and_counted(server: Served) -> None:
    look = server.look()
    address = Path(look["directory"]) / f"engine-{look['epoch']}"
    good = encode_request(Add(EngineRequest(request_id="intruder", prompt_token_ids=[5, 6], params=SamplingParams(max_tokens=4))))
    rng = random.Random(14)
    frames = [b"\x00", b"\xc1" * 100, b"{}", good[:-3], good + b"\0", encode_request(Abort("0.ffffff.1")), b"\xff" * (33 << 20),
              good.replace(b"add", b"bad"), good, good, *(rng.randbytes(rng.randrange(1, 300)) for _ in range(200))]

    async def run() -> None:
        crowd = Crowd(server, 4, max_tokens=600)
        await crowd.under_way(4)
        with zmq.Context() as context, context.socket(zmq.DEALER) as intruder:
            intruder.set(zmq.LINGER, 1000)
            intruder.connect(f"ipc://{address}")
            for frame in frames:
                intruder.send(frame)
            intruder.send_multipart([b""] * 100)
            replies = await crowd.replies()
            assert all(reply.ended_well for reply in replies)
            assert [reply.token_ids for reply in replies] == await alone(server, crowd.bodies)
            await until(lambda: server.look()["bad_frames"] >= look["bad_frames"] + 200, 5.0, "the count of bad frames")

    asyncio.run(run())
    server.settle()


def test_f16_a_server_that_cannot_start_says_why_in_one_line(model: Path, tmp_path: Path) -> None:
    def broken(name: str) -> Path:
        return Path(shutil.copytree(model, tmp_path / name))

    missing, cut, flipped, config, tokenizer = map(broken, ("missing", "cut", "flipped", "config", "tokenizer"))
    (missing / "model.safetensors").unlink()
    weights = (model / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[:-1000])
    (flipped / "model.safetensors").write_bytes(weights[:3] + bytes([weights[3] ^ 64]) + weights[4:])
    (config / "config.json").write_text(json.dumps({"architectures": ["NobodysModel"], "model_type": "nobodys"}))
    (tokenizer / "tokenizer.json").write_text("{")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        tries = {
            "missing": [str(missing)], "cut": [str(cut)], "flipped": [str(flipped)], "config": [str(config)],
            "tokenizer": [str(tokenizer)], "dtype": [str(model), "--dtype", "float7"], "nothing": [str(tmp_path / "nothing")],
            "share": [str(model), "--gpu-memory-utilization", "2"], "port": [str(model), "--port", port],
            "host": [str(model), "--host", "256.1.1.1"], "keys": [str(model), "--api-key-file", str(tmp_path / "none")],
            "length": [str(model), "--max-model-len", "1000000"], "flag": [str(model), "--api-kee", "x"],
        }
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_RUNTIME_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
        began = time.monotonic()
        processes = {name: subprocess.Popen(
            [sys.executable, "-m", "octavo", "serve", *arguments, *(["--port", "0"] if name != "port" else [])],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, cwd=ROOT, text=True)
            for name, arguments in tries.items()}
        try:
            for name, process in processes.items():
                _, said = process.communicate(timeout=60)
                assert process.returncode not in (0, 70) and process.returncode > 0, (name, process.returncode, said)
                errors = [line for line in said.splitlines() if "error:" in line]
                assert len(errors) == 1 and "Traceback" not in said, (name, said)
            assert time.monotonic() - began < 60.0  # thirteen at once
        finally:
            for process in processes.values():
                process.kill()
                process.communicate()
    assert not list(tmp_path.glob("octavo-server-*"))


def test_f17_nobody_reads_what_the_server_writes(model: Path) -> None:
    """Its output is a pipe that is full at once; and a full disk, for the second one."""
    for full in (False, True):
        read, write = os.pipe() if not full else (-1, os.open("/dev/full", os.O_WRONLY))
        try:
            with Served(model, "--uvicorn-log-level", "trace", log=write, verbose=True) as served:
                async def run(served: Served = served) -> None:
                    for _ in range(30):  # some 200 kB of log
                        calls = [call(served.port, "/v1/nothing-" + "x" * 180, body={}) for _ in range(30)]
                        replies = await asyncio.gather(*calls)
                        assert {reply.status for reply in replies} == {404}
                    assert (await call(served.port, body=completion())).status == 200

                asyncio.run(run())
                served.settle()
                assert served.end() == 0
        finally:
            os.close(write)
            if read >= 0:
                os.close(read)


def test_f18_clients_that_do_not_read_are_dropped(model: Path) -> None:
    count, tokens = 8, 1900
    with Served(model, "--send-timeout", "1", "--max-stream-buffer", "100000") as served:
        body = completion("Say a lot", stream=True, max_tokens=tokens, n=2, logprobs=20)

        async def reader(slowly: bool) -> None:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(sock, ("127.0.0.1", served.port))
            await loop.sock_sendall(sock, encode("/v1/completions", body))
            try:
                while not all_dropped.is_set():
                    if slowly and not await loop.sock_recv(sock, 1):
                        return
                    await asyncio.sleep(0.2)
            except OSError:
                return
            finally:
                sock.close()

        async def run() -> None:
            readers = [asyncio.create_task(reader(number % 2 == 0)) for number in range(count)]
            await until(lambda: served.look()["front"]["tickets"] == count, 10.0, "their requests")
            before, end = served.look()["generated_tokens"], time.monotonic() + 60.0
            while served.look()["front"]["tickets"]:
                await asyncio.sleep(0.05)
                canary = await call(served.port, body=completion(priority=-1))
                assert canary.seconds < 10.0
                assert time.monotonic() < end
            assert served.look()["generated_tokens"] - before < count * 2 * tokens * 0.6  # they were not answered to the end
            all_dropped.set()
            await asyncio.gather(*readers)

        all_dropped = asyncio.Event()
        asyncio.run(run())
        served.settle()
        served.check_descriptors()


def test_f19_no_deadline_knows_the_wall_clock() -> None:
    """The wall clock may jump: only the dates that answers carry are read from it."""
    allowed = {"chunks.py", "models.py", "messages.py", "responses.py"}
    users = {path.name for folder in ("server", "engine", "worker") for path in (ROOT / "octavo" / folder).rglob("*.py")
             if re.search(r"\btime\.time\(|\bdatetime\b|from time import time", path.read_text())}
    assert users <= allowed, users - allowed
    for name in allowed & users:
        text = (ROOT / "octavo" / "server" / name).read_text()
        assert all("int(time.time())" in line for line in text.splitlines() if "time.time" in line), name
