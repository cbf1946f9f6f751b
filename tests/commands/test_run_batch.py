"""octavo run-batch: against a server that runs, with one of its own, and what may not be combined."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from stand_in import StandIn, error

from octavo.cli import main
from octavo.client.private import PrivateServer


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    lines = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": {"prompt": "a"}} for i in range(3)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["run-batch", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl")]


def results(files: list[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(files[-1]).read_text().splitlines()]


def test_against_a_server(server: StandIn, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*files, "--url", server.url, "--api-key", "k"]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "3 lines, 0 of them answered before, 0 failed" in captured.err
    assert len(results(files)) == 3 and server.seen[0].headers["authorization"] == "Bearer k"
    assert main([*files, "--url", "http://127.0.0.1:1"]) == 0, "nothing is left to do, so nobody is asked"
    assert "3 of them answered before" in capsys.readouterr().err


def test_a_failure_is_exit_code_1_now_and_later(server: StandIn, files: list[str]) -> None:
    server.override = lambda seen: error(400, "bad") if len(server.seen) == 2 else None
    assert main([*files, "--url", server.url, "--max-concurrency", "1"]) == 1
    assert sorted(entry["response"]["status_code"] for entry in results(files)) == [200, 200, 400]
    assert main([*files, "--url", server.url]) == 1 and len(server.seen) == 3


@pytest.mark.parametrize(("words", "name"), [
    ([], "model or url"), (["--url", "http://h", "--model", "m"], "model is for|model or url"),
    (["--url", "http://h", "--max-model-len", "5"], "max_model_len"),
    (["--url", "http://h", "--tool-call-parser", "x"], "tool_call_parser"), (["--model", "m", "--api-key", "k"], "api_key"),
    (["--url", "h"], "url must be"), (["--url", "http://h", "--max-concurrency", "0"], "max_concurrency"),
    (["--model", "m", "--max-model-len", "0"], "max_model_len"),
])
def test_what_may_not_be_combined(files: list[str], words: list[str], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*files, *words]) == 1
    assert re.search(name, capsys.readouterr().err) and not os.path.exists(files[-1])


def test_the_output_may_not_be_the_input(files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*files[:-1], files[2], "--url", "http://127.0.0.1:1"]) == 1
    assert "output_file must be another file" in capsys.readouterr().err


SERVER = """
import asyncio, json, os, signal, sys
sys.path.insert(0, {client!r})
from stand_in import StandIn
words = sys.argv[1:]
open({log!r}, "w").write(json.dumps([words, os.environ.get("OCTAVO_API_KEY"), os.getpid()]))
async def main():
    stand_in = StandIn()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await asyncio.start_unix_server(stand_in.serve, words[words.index("--uds") + 1])
    await stop.wait()
print("a line that must not be among results")
asyncio.run(main())
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """``octavo serve`` replaced by a stand-in; returns where it notes its words, its environment's key and its pid."""
    log, script = tmp_path / "log.json", tmp_path / "serve.py"
    script.write_text(SERVER.format(client=str(Path(__file__).parents[1] / "client"), log=str(log)))
    monkeypatch.setattr(PrivateServer.__init__, "__defaults__", ((sys.executable, str(script)),))
    monkeypatch.setenv("OCTAVO_API_KEY", "of-another-server")
    return log


def gone(pid: int) -> bool:
    """True when a process has ended, even if nobody has asked for its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_with_a_server_of_its_own(files: list[str], own: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*files, "--model", "tiny", "--max-model-len", "64", "--served-model-name", "a", "b",
                 "--no-enable-prefix-caching", "--hf-overrides", '{"x": 1}']) == 0
    words, key, pid = json.loads(own.read_text())
    assert words[0] == "tiny" and key is None and gone(pid)
    assert "--max-model-len=64" in words and "--no-enable-prefix-caching" in words and '--hf-overrides={"x": 1}' in words
    assert [words[i + 1] for i, word in enumerate(words) if word == "--served-model-name"] == ["a", "b"]
    assert not os.path.exists(words[words.index("--uds") + 1]) and len(results(files)) == 3
    captured = capfd.readouterr()
    assert captured.out == "" and "must not be among results" in captured.err


def test_a_server_of_its_own_that_cannot_start(files: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """The real command, with a model that does not exist."""
    assert main([*files, "--model", "/no/such/model"]) == 1
    assert "the server could not start (exit code" in capfd.readouterr().err and results(files) == []


def test_a_server_of_its_own_ends_with_its_parent(own: Path, tmp_path: Path) -> None:
    """Even when that is killed."""
    code = ("import sys, time; from octavo.client.private import PrivateServer; import asyncio\n"
            "from octavo.client.connection import Client\n"
            f"with PrivateServer(['m'], (sys.executable, {str(tmp_path / 'serve.py')!r})) as server:\n"
            "    asyncio.run(server.ready(Client(server.address))); print('ready', flush=True); time.sleep(60)")
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stdout.readline() == "ready\n"
        pid = json.loads(own.read_text())[2]
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
    for _ in range(1000):
        if gone(pid):
            return
        time.sleep(0.01)
    raise AssertionError("the server outlived its parent")
