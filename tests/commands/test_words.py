"""Config files, dotted JSON flags and help about a part of the flags."""

import argparse
from pathlib import Path

import pytest

from octavo.commands.words import help_about, with_config_file, with_json_flags
from octavo.errors import ConfigError

FLAGS = {"--hf-overrides", "--other"}


def written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "options.yaml"
    path.write_text(text)
    return str(path)


def test_a_file_speaks_before_the_command_line(tmp_path: Path) -> None:
    path = written(tmp_path, "model: m\nport: 9\nmax_model_len: 2k\nenable-prefix-caching: false\napi-key: [a, b]\n"
                             "enforce-eager: true\nhf-overrides: {a: 1}\nuds: null\n")
    assert with_config_file(["--port", "10", "--config", path], "model") == [
        "m", "--max-model-len", "2k", "--no-enable-prefix-caching", "--api-key", "a", "b", "--enforce-eager",
        "--hf-overrides", '{"a": 1}', "--port", "10"]


@pytest.mark.parametrize("words", [
    ["other", "--config", "FILE"], ["--model", "other", "--config=FILE"], ["--config", "FILE", "--model=other"]])
def test_the_model_of_the_command_line_wins(tmp_path: Path, words: list[str]) -> None:
    path = written(tmp_path, "model: m\n")
    given = [word.replace("FILE", path) for word in words]
    assert "m" not in with_config_file(given, "model")


@pytest.mark.parametrize("given", ["--no-enable-prefix-caching", "--enable-prefix-caching"])
def test_a_switch_of_either_form_wins(tmp_path: Path, given: str) -> None:
    path = written(tmp_path, "enable-prefix-caching: true\nhf-overrides: {a: 1}\n")
    words = with_config_file([given, "--hf-overrides.b", "2", "--config", path], "model")
    assert words == [given, "--hf-overrides.b", "2"]


def test_without_a_file_nothing_changes() -> None:
    assert with_config_file(["m", "--port", "1"], "model") == ["m", "--port", "1"]


@pytest.mark.parametrize("text", ["- a\n", "3\n", "1: 2\n", "a: [\n"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="config"):
        with_config_file(["--config", written(tmp_path, text)], "model")
    with pytest.raises(ConfigError, match="cannot be read"):
        with_config_file(["--config", str(tmp_path / "none")], "model")


def test_dotted_flags_become_one_object() -> None:
    words = ["m", "--hf-overrides.rope.factor", "2", "--hf-overrides.rope.kind=linear", "--port", "1", "--hf-overrides.l+", "x",
             "--hf-overrides.l+", "true", "--other", '{"q": 1}', "--other.r", "null"]
    assert with_json_flags(words, FLAGS) == [
        "m", "--port", "1", "--hf-overrides", '{"rope": {"factor": 2, "kind": "linear"}, "l": ["x", true]}',
        "--other", '{"q": 1, "r": null}']


def test_a_plain_json_flag_stays() -> None:
    words = ["--other", "no json", "--hf-overrides", "{"]
    assert with_json_flags(words, FLAGS) == words


@pytest.mark.parametrize("words", [
    ["--other.a"], ["--other.a", "1", "--other.a.b", "2"], ["--other.a", "1", "--other.a+", "2"], ["--other.", "1"],
    ["--other..a", "1"], ["--other.+", "1"]])
def test_dotted_flags_that_contradict_themselves_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="--other"):
        with_json_flags(words, FLAGS)


def test_help_about_a_word() -> None:
    parser = argparse.ArgumentParser(prog="octavo serve")
    group = parser.add_argument_group("server")
    group.add_argument("--port", help="where to listen")
    parser.add_argument_group("engine").add_argument("--block-size", help="tokens of a block")
    assert help_about(parser, ["--port", "1"]) is None
    whole = help_about(parser, ["--help=all"])
    assert whole is not None and "--port" in whole and "--block-size" in whole
    for word in ("port", "listen", "SERVER"):
        found = help_about(parser, [f"--help={word}"])
        assert found is not None and "--port" in found and "--block-size" not in found
    nothing = help_about(parser, ["--help=zebra"])
    assert nothing is not None and "'zebra'" in nothing
