"""octavo serve: its flags, and what it refuses before anything is started."""

import pytest

from octavo.absent import REFUSED
from octavo.cli import build_parser, main
from octavo.server.config import ServerConfig


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as error:
        main(["serve", *words])
    assert error.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--enable-lora", "--speculative_config", "-O", "-dp", "--cpu-offload-gb=3"])
def test_a_flag_of_vllm_is_refused_by_name(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    name = flag.partition("=")[0].replace("_", "-")
    assert f"{name} is a flag of vLLM that Octavo does not have: {REFUSED[name]}." in refusal(capsys, "m", flag, "1")


def test_no_flag_is_both_refused_and_there() -> None:
    parser = next(action for action in build_parser()._actions if action.dest == "command").choices["serve"]  # type: ignore
    assert not set(parser._option_string_actions) & set(REFUSED)


def test_a_misspelt_flag_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean --served-model-name?" in refusal(capsys, "m", "--served-modelname", "x")


def test_a_bad_config_file_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot be read as YAML" in refusal(capsys, "--config", "/nowhere/options.yaml")


@pytest.mark.parametrize(("words", "message"), [
    ([], "a model must be given"), (["m", "--model", "n"], "given twice"), (["m", "--port", "70000"], "port must be"),
    (["m", "--ssl-keyfile", "/nowhere"], "go together"), (["m", "--api-key", "two words"], "api_key must be")])
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["serve", *words]) == 1
    err = capsys.readouterr().err
    assert message in err and len(err.splitlines()) == 1


def test_a_bad_key_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    main(["serve", "m", "--api-key", "se cret"])
    assert "cret" not in capsys.readouterr().err


def test_both_spellings_of_the_model() -> None:
    for words in (["m"], ["--model", "m"], ["--model=m"]):
        args = build_parser().parse_args(["serve", *words])
        assert (args.model or args.model_flag) == "m"


def test_lists_take_several_values() -> None:
    args = build_parser().parse_args(["serve", "m", "--api-key", "a", "b", "--api-key", "c"])
    config = ServerConfig.from_cli_args(args)
    assert config.api_key == ("a", "b", "c") and config.allowed_origins == ("*",)
