"""The Gradio example: what it asks a server for, what it makes of the answers, and how it starts (with a stub for Gradio)."""

import importlib.util
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

FILE = Path(__file__).resolve().parents[2] / "examples" / "gradio_webserver.py"


@pytest.fixture
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gradio_webserver", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Server(ThreadingHTTPServer):
    """Answers every POST with ``status`` and ``reply``; remembers (path, key, body)."""

    status, reply = 200, b""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[tuple[str, str | None, dict[str, Any]]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers["Authorization"], body))
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.reply)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def events(*chunks: dict[str, Any] | str) -> bytes:
    return b"".join(b"data: " + (chunk if isinstance(chunk, str) else json.dumps(chunk)).encode() + b"\n\n" for chunk in chunks)


def test_a_chat_grows_and_carries_its_past(example: ModuleType, server: Server) -> None:
    server.reply = b": hello\n\n" + events(
        {"choices": [{"delta": {"role": "assistant"}}]}, {"choices": [{"delta": {"content": "Grü"}}]},
        {"choices": [{"delta": {"content": "ße"}}]}, {"choices": []}, "[DONE]")
    bot = example.Bot(server.url + "/v1/chat/completions", "secret")
    past = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}], "metadata": None}]
    assert list(bot.answer("c", past)) == ["", "Grü", "Grüße", "Grüße"]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert server.asked == [("/v1/chat/completions", "Bearer secret", {"messages": messages, "stream": True})]


def test_a_completion_goes_on_with_the_text(example: ModuleType, server: Server) -> None:
    server.reply = events({"choices": [{"text": " upon"}]}, {"choices": [{"text": " a"}]}, "[DONE]")
    assert list(example.Bot(server.url + "/v1/completions").answer("Once", [])) == ["Once upon", "Once upon a"]
    assert server.asked == [("/v1/completions", None, {"prompt": "Once", "max_tokens": 128, "stream": True})]


@pytest.mark.parametrize(("status", "reply", "wanted"), [
    (400, b'{"error": {"message": "Too long."}}', "[400: Too long.]"),
    (502, b"<html>", "[502: no reason was given]"),
    (200, events({"choices": [{"delta": {"content": "a"}}]}, {"error": {"message": "It died."}}), "a\n\n[It died.]"),
])
def test_errors_are_the_last_words(example: ModuleType, server: Server, status: int, reply: bytes, wanted: str) -> None:
    server.status, server.reply = status, reply
    assert list(example.Bot(server.url + "/v1/chat/completions").answer("x", []))[-1] == wanted


def test_no_server(example: ModuleType, server: Server) -> None:
    url = server.url
    server.server_close()
    assert "cannot be reached" in list(example.Bot(url + "/v1/chat/completions").answer("x", []))[-1]


def stub(version: str) -> tuple[ModuleType, list[Any]]:
    """A Gradio that only remembers."""
    told: list[Any] = []
    module = ModuleType("gradio")

    def interface(function: Any, **options: Any) -> Any:
        told.append((function, options))
        return SimpleNamespace(launch=lambda **options: told.append(options))

    module.__dict__.update(__version__=version, ChatInterface=interface)
    return module, told


def test_the_page_is_local_and_never_shared(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    module, told = stub("6.31.0")
    monkeypatch.setitem(sys.modules, "gradio", module)
    monkeypatch.setenv("OCTAVO_API_KEY", "secret")
    assert example.main(["--model-url", "http://x/v1/completions"]) == 0
    assert example.main(["--host", "0.0.0.0", "--port", "9"]) == 0
    bots = [function.__self__ for function, _ in told[::2]]
    assert [(bot.url, bot.key, bot.chat) for bot in bots] == [
        ("http://x/v1/completions", "secret", False), (example.MODEL_URL, "secret", True)]
    assert told[1::2] == [
        {"server_name": "127.0.0.1", "server_port": 8001, "share": False},
        {"server_name": "0.0.0.0", "server_port": 9, "share": False}]


def test_no_or_old_gradio_is_told_with_the_remedy(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert example.main([]) == 1
    assert "pip install gradio" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "gradio", stub("5.50.0")[0])
    assert example.main([]) == 1
    assert "pip install -U gradio" in capsys.readouterr().err
