"""octavo generate: where prompts come from, what they become, and how results are written."""

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from octavo.cli import main
from octavo.commands.generate import answers, parse_prompts, write_json, write_text
from octavo.commands.options import with_hint
from octavo.config import EngineConfig
from octavo.errors import ModelError, RequestError
from octavo.outputs import CompletionOutput, Logprob, RequestOutput


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def asked(engines: list[Any]) -> tuple[list[Any], Any]:
    requests = engines[-1].requests
    return [prompt for _, prompt, _ in requests], requests[-1][2]


def test_prompts_from_flags(engines: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "m", "--prompt", "one", "--prompt", "two words"]) == 0
    assert [(r["index"], r["prompt"], r["outputs"][0]["text"]) for r in lines(capsys)] == [
        (0, "one", "ONE"), (1, "two words", "TWO WORDS")]
    assert engines[-1].config.model == "m"


def test_prompts_from_stdin(monkeypatch: pytest.MonkeyPatch, engines: list[Any]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n  two \n"))
    assert main(["generate", "m"]) == 0
    assert asked(engines)[0] == ["one", "  two "]


def test_prompts_from_a_file_of_json_lines(tmp_path: Path, engines: list[Any]) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('"one"\n{"prompt": "two"}\n{"prompt_token_ids": [1, 2]}\n')
    assert main(["generate", "m", "--input", str(path)]) == 0
    assert asked(engines)[0] == ["one", {"prompt": "two"}, {"prompt_token_ids": [1, 2]}]


@pytest.mark.parametrize(("kind", "text", "wanted"), [
    ("auto", 'plain\n{"prompt": "x"}', ["plain", '{"prompt": "x"}']),
    ("auto", '\n {"prompt": "x"}\n"y"', [{"prompt": "x"}, "y"]),
    ("text", '{"prompt": "x"}', ['{"prompt": "x"}']),
    ("jsonl", '"x"\n\n"y"', ["x", "y"]),
    ("text", "a\x0bb\r\nc\u2028d", ["a\x0bb", "c\u2028d"]),  # only newlines end a prompt
    ("auto", "", []),
])
def test_parse_prompts(kind: str, text: str, wanted: list[Any]) -> None:
    assert parse_prompts("name", text.split("\n"), kind) == wanted


@pytest.mark.parametrize("line", ["{", "3", "null", "[1]", "NaN{"])
def test_a_bad_line_names_file_and_line(line: str) -> None:
    with pytest.raises(RequestError, match=r"^name line 2 ") as caught:
        parse_prompts("name", ['"good"', line], "jsonl")
    assert caught.value.param == "input"


@pytest.mark.parametrize("words", [
    ["--input", "/no/such/file"], ["--prompt", "x", "--input", "-"], ["--prompt", "x", "--temperature", "-1"],
    ["--prompt", "x", "--temperature", "nan"], ["--prompt", "x", "--max-tokens", "0"], ["--prompt", "x", "--n", "0"],
    ["--prompt", "x", "--use-beam-search", "--n", "2"], ["--prompt", "x", "--logit-bias", '{"1": 1000}'],
    ["--prompt", "x", "--block-size", "16", "--max-model-len", "0"], ["--input", "-"],
])
def test_a_user_s_mistake_is_one_line_and_exit_code_1(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert main(["generate", "m", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("octavo: error: ") and error.count("\n") == 1


def test_no_prompt_on_a_terminal_says_what_to_give(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", terminal)
    assert main(["generate", "m"]) == 1
    assert "--prompt" in capsys.readouterr().err


def test_max_tokens_is_all_that_fits_and_defaults_are_the_model_s(engines: list[Any]) -> None:
    assert main(["generate", "m", "--prompt", "x"]) == 0
    params = asked(engines)[1]
    assert (params.max_tokens, params.temperature, params.top_p) == (None, 0.5, 0.9)


def test_every_sampling_flag_reaches_its_field(engines: list[Any]) -> None:
    assert main([
        "generate", "m", "--prompt", "x", "--n", "2", "--best-of", "3", "--presence-penalty", "1",
        "--frequency_penalty=-1", "--repetition-penalty", "1.1", "--temperature", "0.7", "--top-p", "0.8", "--top-k",
        "5", "--min-p", "0.1", "--sampling-seed", "9", "--stop", "END", "--stop", "STOP", "--stop-token-ids", "3",
        "--ignore-eos", "--include-stop-str-in-output", "--max-tokens", "1k", "--min-tokens", "2", "--logprobs", "1",
        "--prompt-logprobs", "0", "--no-skip-special-tokens", "--no-spaces-between-special-tokens", "--logit-bias",
        '{"5": -3}', "--allowed-token-ids", "5", "--allowed-token-ids", "7", "--bad-words", "no", "--length-penalty",
        "2", "--early-stopping", "never", "--detokenize",
    ]) == 0
    p = asked(engines)[1]
    assert (p.n, p.best_of, p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (2, 3, 1.0, -1.0, 1.1)
    assert (p.temperature, p.top_p, p.top_k, p.min_p, p.seed, p.stop) == (0.7, 0.8, 5, 0.1, 9, ("END", "STOP"))
    assert (p.stop_token_ids, p.ignore_eos, p.include_stop_str_in_output) == ((3,), True, True)
    assert (p.max_tokens, p.min_tokens, p.logprobs, p.prompt_logprobs) == (1000, 2, 1, 0)
    assert (p.skip_special_tokens, p.spaces_between_special_tokens, p.logit_bias) == (False, False, {5: -3})
    assert (p.allowed_token_ids, p.bad_words, p.length_penalty, p.early_stopping) == ((5, 7), ("no",), 2.0, "never")


def test_beam_search_leaves_the_model_s_random_choices_out(engines: list[Any]) -> None:
    words = ["generate", "m", "--prompt", "x", "--use-beam-search", "--temperature", "0", "--n", "2"]
    assert main(words) == 0
    assert (asked(engines)[1].top_p, asked(engines)[1].temperature) == (1.0, 0.0)
    assert main([*words, "--top-p", ".5"]) == 1


def test_the_two_seeds_are_two_things(engines: list[Any]) -> None:
    assert main(["generate", "m", "--prompt", "x", "--seed", "3", "--sampling-seed", "4"]) == 0
    assert (engines[-1].config.seed, asked(engines)[1].seed) == (3, 4)


def test_a_failed_request_is_reported_and_the_others_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "m", "--prompt", "fail", "--prompt", "ok"]) == 1
    found = lines(capsys)
    assert [r["error"] for r in found] == ["logits were not finite", None]
    assert main(["generate", "m", "--prompt", "fail", "--prompt", "ok", "--no-json"]) == 1
    captured = capsys.readouterr()
    assert "octavo: error: prompt 0: logits were not finite" in captured.err and "OK" in captured.out


def test_text_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "m", "--prompt", "one  two", "--no-json", "--n", "2"]) == 0
    assert capsys.readouterr().out == "[0] one two\n(1) ONE  TWO  [length]\n(2) ONE  TWO  [length]\n\n"


def test_ids_are_shown_where_there_is_no_text(capsys: pytest.CaptureFixture[str]) -> None:
    completion = CompletionOutput(0, "", [5, 6], finish_reason="stop")
    assert write_text(3, RequestOutput("3", None, [1, 2], outputs=[completion])) == 0
    assert capsys.readouterr().out == "[3] 2 token ids\n5 6\n\n"


def test_json_has_words_for_everything(capsys: pytest.CaptureFixture[str]) -> None:
    """Infinite logprobs become null: JSON has no infinity, and a reader must not choke."""
    logprobs = [{7: Logprob(-0.5, 1, "a"), 8: Logprob(-math.inf, 2, "\u20ac")}]
    completion = CompletionOutput(0, "\u20ac", [7], -0.5, logprobs, "stop", None)
    write_json(0, RequestOutput("0", "p", [1], [None, {1: Logprob(-1.0, 1, "p")}], [completion], True, 4))
    text = capsys.readouterr().out
    found = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert found["outputs"][0]["logprobs"] == [{"7": {"logprob": -0.5, "rank": 1, "decoded_token": "a"},
                                                "8": {"logprob": None, "rank": 2, "decoded_token": "\u20ac"}}]
    assert found["num_cached_tokens"] == 4 and found["prompt_logprobs"][0] is None and "\u20ac" in text
    assert " ".join(found) == "index prompt prompt_token_ids prompt_logprobs outputs num_cached_tokens error"


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and keeps what was written piece by piece."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.pieces.append(text)
        return super().write(text)


def test_a_single_prompt_is_streamed_to_a_terminal(monkeypatch: pytest.MonkeyPatch, engines: list[Any]) -> None:
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["generate", "m", "--prompt", "one two three"]) == 0
    assert out.getvalue() == "[0] \nONE TWO THREE\n\n"  # the fake echoes no prompt
    assert [piece for piece in out.pieces if piece.strip()][1:] == ["ONE", " TWO", " THREE"]
    assert err.getvalue() == "no --max-tokens: up to 160 tokens a prompt, the prompt included\n"
    assert engines[-1].config.disable_log_stats


def test_several_prompts_on_a_terminal_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert main(["generate", "m", "--prompt", "a", "--prompt", "b", "--max-tokens", "4"]) == 0
    text = out.getvalue()
    assert text.index("[0] a") < text.index("A  [length]") < text.index("[1] b") < text.index("B  [length]")
    assert "no --max-tokens" not in err.getvalue()


def test_a_result_is_written_once_those_before_it_are(engines: list[Any]) -> None:
    from octavo.llm import LLMEngine

    engine: Any = LLMEngine.from_engine_args(EngineConfig(model="m"))
    steps: list[int] = []
    engine.on_step = lambda: steps.append(1)
    params = engine.default_params(4)
    found = [(index, output.prompt, len(steps)) for index, output in answers(engine, ["a", "b", "c"], params)]
    engine.close()
    assert found == [(0, "a", 3), (1, "b", 3), (2, "c", 3)]  # the fake ends the last one first


def test_a_refused_prompt_of_several_is_named(engines: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "m", "--prompt", "fine", "--prompt", "refuse"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "prompt 1 of 2: prompt is refused" in captured.err


def test_what_a_bare_folder_needs_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    config = EngineConfig(model=str(tmp_path))
    text = str(with_hint(ModelError("no weights."), config))
    assert text.startswith("no weights. ") and "--load-format dummy" in text and "--skip-tokenizer-init" in text
    dummy = config.replace(load_format="dummy", skip_tokenizer_init=True)
    for other in (dummy, config.replace(model="/no/such/folder")):
        assert str(with_hint(ModelError("no weights."), other)) == "no weights."


def test_help_shows_sampling_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = capsys.readouterr().out
    places = [text.index(title) for title in ("\nsampling (", "\ninput and output:", "\nengine:", "\nnot supported yet")]
    assert places == sorted(places)
    assert all(text.rindex(flag) > places[3] for flag in ("--trust-remote-code", "--quantization", "-tp", "-pp"))
