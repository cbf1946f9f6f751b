"""octavo.server.config: defaults as promised, every range, flags from fields."""

import argparse
import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest

from octavo.errors import ConfigError
from octavo.server.config import ServerConfig


def parse(*arguments: str) -> ServerConfig:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerConfig.add_cli_args(parser)
    return ServerConfig.from_cli_args(parser.parse_args(arguments))


def test_without_flags_everything_is_the_default() -> None:
    assert parse() == ServerConfig()


def test_the_defaults_are_those_that_were_promised() -> None:
    config = ServerConfig()
    promised = {
        "host": "127.0.0.1", "port": 8000, "max_body_bytes": 32 << 20, "max_header_bytes": 32 << 10, "max_headers": 100,
        "max_json_depth": 128, "max_n": 128, "max_prompts": 1024, "max_sequences": 1024, "max_stop": 16, "max_stop_chars": 256,
        "max_logit_bias": 1024, "max_schema_bytes": 64 << 10, "max_schema_depth": 64, "max_regex_bytes": 4 << 10,
        "max_grammar_cache_bytes": 256 << 20, "shutdown_timeout": 30.0, "step_timeout": 120.0, "max_stream_buffer": 1 << 20,
        "send_timeout": 5.0, "metrics_auth": True, "enable_auto_tool_choice": True, "metrics_compat": "vllm"}
    assert {name: getattr(config, name) for name in promised} == promised


def test_flags_of_every_kind() -> None:
    config = parse("--host", "0.0.0.0", "--port", "0", "--api-key", "one", "two", "--no-metrics-auth", "--request-timeout", "1.5",
                   "--max-queued-requests", "7", "--allowed-origins", "https://a.example", "--uds", "/tmp/x")
    assert (config.host, config.port, config.api_key) == ("0.0.0.0", 0, ("one", "two"))
    assert config.metrics_auth is False and config.request_timeout == 1.5 and config.max_queued_requests == 7
    assert config.allowed_origins == ("https://a.example",) and config.uds == "/tmp/x"


def test_every_field_has_a_flag_with_words() -> None:
    parser = argparse.ArgumentParser()
    ServerConfig.add_cli_args(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings if action.help}
    assert {"--" + f.name.replace("_", "-") for f in fields(ServerConfig)} <= flags


BAD: list[tuple[str, Any]] = [
    ("port", -1), ("port", 65536), ("port", "8000"), ("port", True), ("host", ""), ("root_path", "api"), ("root_path", "/api/"),
    ("api_server_count", 0), ("api_server_count", 65), ("served_model_name", ("",)), ("shutdown_timeout", -1.0),
    ("shutdown_timeout", float("nan")), ("request_timeout", 0.0), ("queue_timeout", -1.0), ("step_timeout", 0.0),
    ("keep_alive", 0.0), ("header_timeout", 0.0), ("body_timeout", 0.0), ("send_timeout", float("inf")), ("max_log_len", -1),
    ("metrics_compat", "sglang"), ("chat_template_content_format", "xml"), ("uvicorn_log_level", "loud"), ("max_n", 129),
    ("max_stop", 17), ("max_stop_chars", 257), ("max_logit_bias", 1025), ("max_n", 0), ("ssl_ca_certs", "/nowhere"),
    ("api_key_file", "/nowhere"), ("max_n", 1.5), ("api_key", ("a b",)), ("api_key", ("",)), ("api_key", ("k\u00e9y",)),
    ("api_key", ("a\nb",)), *((f.name, 0) for f in fields(ServerConfig) if f.name.startswith("max_") and f.name != "max_log_len")]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_what_is_not_legal_is_named(name: str, value: Any) -> None:
    with pytest.raises(ConfigError) as info:
        ServerConfig(**{name: value})
    assert info.value.param == name and name in str(info.value) and re.search(r"[^.]\.$", str(info.value))


def test_a_key_is_never_repeated() -> None:
    with pytest.raises(ConfigError) as info:
        ServerConfig(api_key=("good-one", "bad secret"))
    assert "secret" not in str(info.value) and "good-one" not in str(info.value)


def test_key_and_certificate_go_together(tmp_path: Path) -> None:
    (tmp_path / "key").touch()
    for name in ("ssl_keyfile", "ssl_certfile"):
        with pytest.raises(ConfigError, match="go together"):
            ServerConfig(**{name: str(tmp_path / "key")})


def test_it_does_not_change_and_copies_are_checked() -> None:
    config = ServerConfig()
    with pytest.raises(FrozenInstanceError):
        config.port = 1  # type: ignore[misc]
    assert config.replace(port=1).port == 1 and config.port == 8000
    with pytest.raises(ConfigError):
        config.replace(port=-1)
