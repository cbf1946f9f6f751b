"""octavo chat: history, streaming, the two slash commands, refusals and Ctrl-C, with an engine and with a server."""

import asyncio
import io
import os
import signal
import sys
import threading
from functools import partial
from typing import Any

import pytest
from stand_in import Seen, StandIn, chunked, error

from octavo.cli import main
from octavo.commands.chat import Conversation, LocalSpeaker, talk
from octavo.config import EngineConfig
from octavo.errors import OctavoError, RequestError


@pytest.fixture
def engine(engines: list[Any]) -> Any:
    from octavo.llm import LLMEngine

    made = LLMEngine.from_engine_args(EngineConfig(model="m"))
    yield made
    made.close()


def conversation(engine: Any, system: str | None = None) -> Conversation:
    from octavo.text.chat import chat_prompt

    encode = partial(chat_prompt, engine.template, None)
    return Conversation(LocalSpeaker(engine, encode, engine.default_params(None), 160), system)


def test_an_answer_is_streamed_piece_by_piece(engine: Any) -> None:
    pieces: list[str] = []
    conversation(engine).answer("three small words", pieces.append)
    assert pieces == ["THREE", " SMALL", " WORDS"]


def test_history_goes_into_the_next_prompt(engine: Any) -> None:
    chat = conversation(engine, "be kind")
    chat.answer("hello", lambda text: None)
    chat.answer("again", lambda text: None)
    assert engine.requests[-1][1]["prompt"] == "system: be kind\nuser: hello\nassistant: HELLO\nuser: again"
    assert engine.requests[0][0] != engine.requests[1][0]
    chat.reset()
    chat.answer("new", lambda text: None)
    assert engine.requests[-1][1]["prompt"] == "system: be kind\nuser: new"


@pytest.mark.parametrize(("text", "kind"), [("refuse", RequestError), ("some FAIL here", OctavoError)])
def test_a_refused_or_failed_turn_leaves_no_trace(engine: Any, text: str, kind: type[Exception]) -> None:
    chat = conversation(engine)
    chat.answer("hello", lambda text: None)
    before = list(chat.messages)
    with pytest.raises(kind):
        chat.answer(text, lambda text: None)
    assert chat.messages == before


def test_ctrl_c_stops_an_answer_and_keeps_what_came(engine: Any) -> None:
    chat, steps = conversation(engine), iter([None, None, KeyboardInterrupt()])

    def interrupt() -> None:
        error = next(steps)
        if error:
            raise error

    engine.on_step = interrupt
    chat.answer("one two three four", lambda text: None, stoppable=True)
    assert chat.messages[-1] == {"role": "assistant", "content": "ONE TWO"}
    assert not engine.has_unfinished_requests()


def test_ctrl_c_in_a_pipe_ends_the_program(engine: Any) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    engine.on_step = interrupt
    chat = conversation(engine)
    with pytest.raises(KeyboardInterrupt):
        chat.answer("one", lambda text: None)
    assert not engine.has_unfinished_requests() and chat.messages == []


def test_talk(engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    chat = conversation(engine)
    lines = iter(["hello\n", "\n", "/reset\n", "/help\n", "/etc/passwd what\n", "/exit\n", "never\n"])
    assert talk(chat, lines) == 0
    assert capsys.readouterr().out == "HELLO\n/ETC/PASSWD WHAT\n"
    assert [m["content"] for m in chat.messages] == ["/etc/passwd what", "/ETC/PASSWD WHAT"]


def test_talk_goes_on_after_a_refusal(engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk(conversation(engine), iter(["refuse", "hello"])) == 1
    captured = capsys.readouterr()
    assert "HELLO" in captured.out and captured.err == "octavo: error: prompt is refused, got 'refuse'.\n"


def test_the_command_works_from_a_pipe(
    engines: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello there\nbye\n"))
    assert main(["chat", "m", "--system-prompt", "s", "--temperature", "0", "--max-tokens", "9"]) == 0
    assert capsys.readouterr().out == "HELLO THERE\nBYE\n"
    _, prompt, params = engines[-1].requests[-1]
    assert prompt["prompt"].startswith("system: s\n") and (params.temperature, params.max_tokens) == (0.0, 9)


def test_all_that_fits_is_the_default(engines: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n"))
    assert main(["chat", "m"]) == 0
    assert engines[-1].requests[-1][2].max_tokens is None and engines[-1].requests[-1][2].temperature == 0.5


def test_what_makes_no_sense_in_a_chat_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "m", "--skip-tokenizer-init"]) == 1
    with pytest.raises(SystemExit) as caught:
        main(["chat", "m", "--best-of", "2"])
    assert caught.value.code == 2
    assert "unknown flag --best-of" in capsys.readouterr().err


def test_an_unknown_command_is_answered_with_those_that_exist(engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert talk(conversation(engine), iter(["/quit", "/quit now", "hello"])) == 1
    captured = capsys.readouterr()
    assert captured.out == "HELLO\n" and captured.err.count("unknown command /quit. /reset forgets") == 2
    assert len(engine.requests) == 1
    assert talk(conversation(engine), iter(["/help"])) == 0
    assert "/reset" in capsys.readouterr().err


def test_a_full_context_names_the_way_out(engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    chat = conversation(engine)
    chat.answer("hello", lambda text: None)

    def refuse(*args: Any) -> None:
        raise RequestError("prompt has 170 tokens.", "prompt", "context_length_exceeded")

    add, engine.add_request = engine.add_request, refuse
    assert talk(chat, iter(["more"])) == 1
    assert "the conversation fills the context of 160 tokens: /reset forgets it" in capsys.readouterr().err
    engine.add_request = add
    assert talk(chat, iter(["/reset", "again"])) == 0 and "AGAIN" in capsys.readouterr().out


def test_an_answer_ends_with_the_tokens_that_fit(engine: Any, capsys: pytest.CaptureFixture[str]) -> None:
    chat = conversation(engine)
    speaker = chat.speaker
    assert isinstance(speaker, LocalSpeaker)
    speaker.params = speaker.params.clone(max_tokens=1000)
    speaker.encode = lambda messages: ("user: some words", [1] * 159)
    step = engine.step

    def cut() -> Any:
        outputs = step()
        for output in outputs:
            if output.finished:
                output.outputs[0].finish_reason = "length"
        return outputs

    engine.step = cut
    assert talk(chat, iter(["some words"])) == 0
    assert engine.requests[-1][2].max_tokens == 1
    captured = capsys.readouterr()
    assert captured.out == "SOME WORDS\n" and "/reset forgets it" in captured.err


def test_one_message_and_its_answer(engines: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "m", "--quick", "hello there"]) == 0
    assert capsys.readouterr().out == "HELLO THERE\n"
    assert main(["chat", "m", "-q", "/reset"]) == 0, "a message, whatever it looks like"
    assert capsys.readouterr().out == "/RESET\n"


@pytest.mark.parametrize("words", [["--url", "http://h"], ["--model-name", "x"], ["--api-key", "k"]])
def test_what_is_for_a_server_is_refused_with_a_model(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "m", *words]) == 1
    assert words[0][2:].replace("-", "_") in capsys.readouterr().err


def test_what_is_for_a_model_is_refused_with_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:1", "--max-model-len", "64"]) == 1
    assert "max_model_len is for a model that is loaded here" in capsys.readouterr().err


def chat(server: StandIn, *words: str) -> int:
    return main(["chat", "--url", server.url, *words])


def test_a_conversation_with_a_server(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nbye\n"))
    assert chat(server, "--system-prompt", "s", "--temperature", "0", "--max-tokens", "3", "--api-key", "k") == 0
    assert capsys.readouterr().out == "w0 w1 w2 \nw0 w1 w2 \n"
    models, first, second = server.seen
    assert models.path == "/v1/models" and models.headers["authorization"] == "Bearer k"
    assert (first.path, first.body["model"], first.body["temperature"]) == ("/v1/chat/completions", "stand-in", 0.0)
    assert first.body["messages"] == [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
    assert second.body["messages"][2:] == [{"role": "assistant", "content": "w0 w1 w2 "}, {"role": "user", "content": "bye"}]
    assert server.connections == 1


def test_the_model_s_name_and_the_environment_s_key(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    assert chat(server, "--model-name", "other", "-q", "hi") == 0
    assert server.seen[-1].body["model"] == "other"
    assert server.seen[-1].headers["authorization"] == "Bearer from-the-environment"


def test_a_server_s_refusal_is_one_line_and_leaves_no_trace(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter([None, error(400, "this is\nnot allowed"), chunked([b'data: {"error": {"message": "boom"}}\n\n']), None])
    server.override = lambda seen: next(answers)
    monkeypatch.setattr(sys, "stdin", io.StringIO("no\nboom\nyes\n"))
    assert chat(server) == 1
    captured = capsys.readouterr()
    assert captured.err.splitlines() == ["octavo: error: the server answered 400: this is not allowed",
                                         "octavo: error: the server ended its answer with an error: boom"]
    assert captured.out == "\n\nw0 w1 w2 w3 w4 \n" and len(server.seen[-1].body["messages"]) == 1


def test_a_server_s_full_context(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The answer that fills it says so, and so does the refusal of the next message."""
    server.max_model_len = 14
    answers = iter([None, None, error(400, "too long", "context_length_exceeded")])
    server.override = lambda seen: next(answers)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one two\nmore\n"))  # 3 + 7 tokens, and 5 of the answer
    assert chat(server) == 1
    assert capsys.readouterr().err.splitlines() == [
        "[the conversation fills the context of 14 tokens: /reset forgets it]",
        "octavo: error: the conversation fills the context of 14 tokens: /reset forgets it."]


@pytest.mark.parametrize(("behave", "message"), [
    (lambda s: setattr(s, "override", lambda seen: error(401, "no key")), "answered 401: no key"),
    (lambda s: setattr(s, "override", lambda seen: error(404, "not here")), "answered 404: not here"),
    (lambda s: setattr(s, "model", None), "serves no model"), (lambda s: setattr(s, "port", 1), "cannot reach"),
])
def test_a_server_that_cannot_be_talked_to(
    server: StandIn, behave: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    behave(server)
    assert chat(server, "-q", "hi") == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_ctrl_c_closes_the_connection_and_keeps_what_came(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    from octavo.client.connection import Address
    from octavo.client.talk import open_model

    server.split = 500  # the head, the role and the first words
    holds = []  # kept: a task that waits for what nobody else knows is garbage

    def hold(seen: Seen) -> asyncio.Event | None:
        holds.append(asyncio.Event())
        return holds[-1] if seen.method == "POST" else None

    server.release = hold
    interrupted: set[int] = set()

    def interrupt(text: str) -> None:
        if len(holds) not in interrupted:  # once an answer: a second Ctrl-C would not let the first one clean up
            interrupted.add(len(holds))
            threading.Timer(0.0, os.kill, (os.getpid(), signal.SIGINT)).start()

    with open_model(Address.parse(server.url), None, None, {}) as model:
        conversation = Conversation(model)
        conversation.answer("hello", interrupt, stoppable=True)
        said = conversation.messages[-1]["content"]
        assert said and "w0 w1 w2 w3 w4 ".startswith(said) and said != "w0 w1 w2 w3 w4 "
        with pytest.raises(KeyboardInterrupt):
            conversation.answer("again", interrupt)
        assert len(conversation.messages) == 2
        server.release = lambda seen: None
        conversation.answer("once more", lambda text: None)
        assert conversation.messages[-1]["content"] == "w0 w1 w2 w3 w4 "
    assert server.connections == 3, "an answer that was left is a connection that is closed"
