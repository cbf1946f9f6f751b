"""octavo chat: history, streaming, the two slash commands, refusals and Ctrl-C."""

import io
import sys
from functools import partial
from typing import Any

import pytest

from octavo.cli import main
from octavo.commands.chat import Conversation, talk
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

    return Conversation(engine, partial(chat_prompt, engine.template, None), engine.default_params(None), 160, system)


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
    chat.params = chat.params.clone(max_tokens=1000)
    chat.encode = lambda messages: ("user: some words", [1] * 159)
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
