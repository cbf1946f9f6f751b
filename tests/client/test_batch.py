"""Batches: every line has one result, interrupted runs go on, and nothing in a line ends the run."""

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stand_in import StandIn, error, plain

from octavo.client.batch import Output, count, jobs, parse, run
from octavo.client.connection import Address, Client
from octavo.errors import ConfigError, OctavoError


def request(name: Any, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": {"prompt": "a", **body}}


class Files:
    """An input and an output, and running one into the other."""

    def __init__(self, folder: Path) -> None:
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.slept: list[float] = []

    def write(self, *lines: Any) -> None:
        self.input.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))

    def run(self, server: StandIn, max_concurrency: int = 4) -> Output:
        output = Output(str(self.output))

        async def sleep(seconds: float) -> None:
            self.slept.append(seconds)
            await asyncio.sleep(0)

        async def main() -> None:
            client = Client(Address.parse(server.url))
            try:
                await run(client, jobs(str(self.input), output), output, max_concurrency, sleep=sleep)
            finally:
                await client.close()

        try:
            asyncio.run(main())
        finally:
            output.close()
        return output

    def results(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text().splitlines()]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def test_every_line_has_a_result(server: StandIn, files: Files) -> None:
    files.write(request("a"), "", request("b", "/v1/chat/completions", messages=[{"content": "x"}]), request("c"))
    assert count(str(files.input)) == 3
    output = files.run(server)
    found = {entry["custom_id"]: entry for entry in files.results()}
    assert set(found) == {"a", "b", "c"} and output.failed == 0
    assert set(found["a"]) == {"id", "custom_id", "response", "error"} and found["a"]["error"] is None
    assert found["a"]["id"].startswith("batch_req-") and found["a"]["response"]["status_code"] == 200
    assert found["a"]["response"]["body"]["choices"][0]["text"] == "w0 w1 w2 w3 w4 "
    assert [seen.body["prompt"] for seen in server.seen] == ["a", "a", "a"]


def test_results_come_in_the_order_in_which_they_end(server: StandIn, files: Files) -> None:
    first = asyncio.Event()
    server.split = 50
    server.release = lambda seen: first if seen.body["user"] == "slow" else None

    def answered(seen: Any) -> bytes | None:
        if seen.body["user"] == "last":
            first.set()
        return None

    server.override = answered
    files.write(request("slow", user="slow"), *(request(f"q{i}", user="quick") for i in range(3)), request("z", user="last"))
    files.run(server, 2)
    names = [entry["custom_id"] for entry in files.results()]
    assert sorted(names) == ["q0", "q1", "q2", "slow", "z"] and names.index("slow") >= 3


@pytest.mark.parametrize(("line", "message"), [
    ("nope", "line 2 is not JSON"), ("[1]", "line 2 must be an object"), ("[" * 100000, "line 2 is not JSON"),
    ({"method": "POST"}, "custom_id must be a string"), (request(5), "custom_id must be a string"),
    (request(""), "custom_id must be a string"), ({**request("x"), "method": "GET"}, "method must be POST, got 'GET'"),
    (request("x", "/v1/messages"), "url must be one of"), (request("x", "/v1/embeddings"), "url must be one of"),
    ({**request("x"), "body": "a"}, "body must be an object"), (request("x", stream=True), "stream must be left out"),
    ('{"custom_id": "x", "custom_id": "\\ud800"}', "line 2"),
])
def test_a_bad_line_has_an_error_and_ends_nothing(server: StandIn, files: Files, line: Any, message: str) -> None:
    files.write(request("a"), line, request("b"))
    output = files.run(server)
    found = files.results()
    assert len(found) == 3 and output.failed == 1
    bad = next(entry for entry in found if entry["error"])
    assert bad["response"] is None and bad["error"]["code"] == "invalid_line" and message in bad["error"]["message"]
    before = files.output.read_bytes()
    assert files.run(server).held == 3 and files.output.read_bytes() == before, "a second run has nothing to do"


@given(st.binary(max_size=60) | st.from_regex(rb'\{"custom_id": ?("a"|1|null), ?"url": ?[^}]{0,10}\}', fullmatch=True))
def test_any_line_is_a_request_or_a_problem(line: bytes) -> None:
    job = parse(line, 1)
    assert bool(job.problem) != bool(job.url)


def test_a_custom_id_that_came_before_is_an_error(server: StandIn, files: Files) -> None:
    files.write(request("a"), request("a"), request("b"), request("a"))
    output = files.run(server)
    found = files.results()
    assert output.failed == 2 and sorted(str(entry["error"] and entry["error"]["message"]) for entry in found) == [
        "None", "None", "line 2: custom_id 'a' came before", "line 4: custom_id 'a' came before"]
    assert len(server.seen) == 2
    before = files.output.read_bytes()
    files.run(server)
    assert files.output.read_bytes() == before


def test_a_duplicate_s_error_is_not_taken_for_the_first_one_s_result(server: StandIn, files: Files) -> None:
    files.write(request("a"), request("a"))
    files.run(server)
    duplicate = [line for line in files.output.read_text().splitlines(True) if "came before" in line]
    files.output.write_text("".join(duplicate))
    files.run(server)
    assert len(server.seen) == 2 and len(files.results()) == 2


@pytest.mark.parametrize("cut", range(1, 12))
def test_an_interrupted_run_goes_on(server: StandIn, files: Files, cut: int) -> None:
    """The output is cut anywhere in its last line, or exactly before its end: what was whole stays, the rest is done again."""
    files.write(*(request(f"r{i}") for i in range(4)))
    files.run(server, 1)
    whole = files.output.read_bytes()
    lines = whole.splitlines(True)
    at = len(whole) - [1, 2, 3, 20, 50, 100, 150, 200, len(lines[3]) - 1, len(lines[3]), len(lines[3]) + 7][cut - 1]
    files.output.write_bytes(whole[:at])
    again = files.run(server)
    found = files.results()
    assert sorted(entry["custom_id"] for entry in found) == ["r0", "r1", "r2", "r3"] and again.failed == 0
    kept = 2 if cut == 11 else 3
    assert files.output.read_bytes().startswith(b"".join(lines[:kept]))
    assert len(server.seen) == 4 + (0 if cut == 1 else 4 - kept), "a line that lacks only its end is whole"


def test_another_file_is_not_written_to(files: Files) -> None:
    files.output.write_text('{"a": 1}\n')
    with pytest.raises(ConfigError, match="line 1 is no result"):
        Output(str(files.output))
    assert files.output.read_text() == '{"a": 1}\n'


def test_two_runs_do_not_write_one_file(files: Files) -> None:
    first = Output(str(files.output))
    with pytest.raises(ConfigError, match="another process"):
        Output(str(files.output))
    first.close()
    Output(str(files.output)).close()


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="output_file"):
        Output(str(tmp_path / "none" / "out"))
    with pytest.raises(ConfigError, match="input_file"):
        count(str(tmp_path / "none"))


def test_what_does_not_fit_on_the_disk_leaves_no_half_line(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Output(str(files.output))
    output.write(parse(b"x", 1), None, {"code": "c", "message": "m"})
    before, write = files.output.read_bytes(), os.write

    def full(file: int, data: bytes) -> int:
        if len(data) > 10:
            return write(file, data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space"):
        output.write(parse(b"x", 2), None, {"code": "c", "message": "m"})
    monkeypatch.undo()
    output.close()
    assert files.output.read_bytes() == before


def test_refusals_are_results(server: StandIn, files: Files) -> None:
    server.override = lambda seen: error(400, "temperature is bad", more="x-request-id: r-1\r\n")
    files.write(request("a"))
    output = files.run(server)
    (entry,) = files.results()
    assert output.failed == 1 and entry["error"] is None
    assert entry["response"]["status_code"] == 400 and entry["response"]["request_id"] == "r-1"
    assert entry["response"]["body"]["error"]["message"] == "temperature is bad"


def test_a_busy_server_is_asked_again(server: StandIn, files: Files) -> None:
    answers = iter([error(503, "full", more="Retry-After: 7\r\n"), error(429, "slow down"), None])
    server.override = lambda seen: next(answers)
    files.write(request("a"))
    assert files.run(server).failed == 0 and files.slept == [7.0, 1.0] and len(server.seen) == 3


def test_a_server_that_stays_busy_is_a_failure(server: StandIn, files: Files) -> None:
    server.override = lambda seen: error(503, "full", more="Retry-After: 3600\r\n")
    files.write(request("a"))
    assert files.run(server).failed == 1 and sum(files.slept) == 600.0
    assert files.results()[0]["response"]["status_code"] == 503


@pytest.mark.parametrize(("override", "code"), [
    (lambda seen: b"", "connection_failed"), (lambda seen: plain(200, b"nope"), "invalid_answer")])
def test_an_answer_that_never_comes_is_a_failure(
    server: StandIn, files: Files, override: Callable[[Any], bytes], code: str
) -> None:
    server.override = override
    files.write(request("a"))
    assert files.run(server).failed == 1
    (entry,) = files.results()
    assert entry["response"] is None and entry["error"]["code"] == code


def test_a_server_that_is_gone_ends_the_run_and_keeps_what_is_done(server: StandIn, files: Files) -> None:
    files.write(request("a"))
    files.run(server)
    files.write(request("a"), request("b"))
    port, server.port = server.port, 1
    with pytest.raises(OctavoError, match=r"cannot reach .* go on where it stopped"):
        files.run(server)
    assert [entry["custom_id"] for entry in files.results()] == ["a"] and files.slept == [1.0, 2.0]
    server.port = port
    files.run(server)
    assert [entry["custom_id"] for entry in files.results()] == ["a", "b"]
