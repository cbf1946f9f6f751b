"""octavo complete: texts go to a server's completions, and one that fails does not end the others."""

import io
import sys

import pytest
from stand_in import StandIn, error

from octavo.cli import main


def test_one_text(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", "--url", server.url, "-q", "Once upon", "--max-tokens", "2", "--top-k", "3"]) == 0
    assert capsys.readouterr().out == "w0 w1 \n"
    sent = server.seen[-1]
    assert sent.path == "/v1/completions" and sent.body["prompt"] == "Once upon" and sent.body["model"] == "stand-in"
    assert (sent.body["max_tokens"], sent.body["top_k"], sent.body["stream"]) == (2, 3, True)


def test_lines(server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter([None, None, error(400, "refused"), None])
    server.override = lambda seen: next(answers)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\n\n b \r\nc\n"))
    assert main(["complete", "--url", server.url, "--model-name", "x"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "w0 w1 w2 w3 w4 \n\nw0 w1 w2 w3 w4 \n"
    assert captured.err == "octavo: error: the server answered 400: refused\n"
    assert [seen.body["prompt"] for seen in server.seen[1:]] == ["a", " b ", "c"]


def test_flags_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--max-model-len", "5"], ["--n", "2"]):
        with pytest.raises(SystemExit):
            main(["complete", *words])
        assert f"unknown flag {words[0]}" in capsys.readouterr().err


def test_an_address_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", "--url", "localhost:8000", "-q", "a"]) == 1
    assert "url must be http://HOST" in capsys.readouterr().err
