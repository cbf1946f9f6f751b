"""ServerConfig: every option of the server beside the engine's, frozen, validated once; flags and docs come from its fields.

Owns names, defaults and ranges; it does not know sockets or requests. Invariant: a ServerConfig that exists holds values
that are each legal, and every limit of the server is one of its fields.
"""

import argparse
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from octavo.config import add_flag, check_field, option
from octavo.errors import ConfigError
from octavo.text.schema import Limits

COMPAT = ("vllm", "none")
CONTENT_FORMATS = ("auto", "string", "openai")
LOG_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Options of ``octavo serve``.

    Raises:
        ConfigError: a value is not legal; the message names the option and the value.
    """

    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: every interface")
    port: int = option(8000, "port to listen on; 0: a free one")
    uds: str | None = option(None, "path of a Unix socket to listen on instead of host and port")
    root_path: str = option("", "prefix under which a reverse proxy shows the server")
    ssl_keyfile: str | None = option(None, "private key for https")
    ssl_certfile: str | None = option(None, "certificate for https")
    ssl_ca_certs: str | None = option(None, "certificates of the authorities whose clients may connect")
    api_key: tuple[str, ...] = option((), "key that a client must send; several may be given (or OCTAVO_API_KEY)", kind="list")
    api_key_file: str | None = option(None, "file with one key per line")
    metrics_auth: bool = option(True, "with keys set, /metrics needs one too")
    allowed_origins: tuple[str, ...] = option(("*",), "origins that browsers may call from", kind="list")
    allowed_methods: tuple[str, ...] = option(("*",), "methods that browsers may use", kind="list")
    allowed_headers: tuple[str, ...] = option(("*",), "headers that browsers may send", kind="list")
    allow_credentials: bool = option(False, "browsers may send cookies")
    enable_request_id_headers: bool = option(True, "answers carry x-request-id")
    served_model_name: tuple[str, ...] = option((), "names under which the model is served; default: the model argument",
                                                kind="list")
    api_server_count: int = option(1, "processes that share the port", kind="int")
    # What the chat API does.
    chat_template_content_format: str = option(
        "auto", "how message contents reach the template; auto: as it reads them", choices=CONTENT_FORMATS)
    trust_request_chat_template: bool = option(False, "requests may bring a chat_template")
    enable_auto_tool_choice: bool = option(True, "the model may decide to call tools")
    tool_call_parser: str | None = option(None, "syntax of the model's tool calls; default: found in its chat template")
    reasoning_parser: str | None = option(None, "syntax of the model's reasoning; default: found in its chat template; none: off")
    enable_prompt_tokens_details: bool = option(False, "usage says how many prompt tokens were cached")
    enable_force_include_usage: bool = option(False, "every stream ends with usage, asked for or not")
    # What is logged and measured.
    enable_log_requests: bool = option(False, "a log line per request; without its text")
    max_log_len: int | None = option(None, "log prompts too, as many characters of them; default: none", kind="int")
    uvicorn_log_level: str = option("info", "level of the HTTP server's own log", choices=LOG_LEVELS)
    disable_uvicorn_access_log: bool = option(False, "no log line per HTTP call")
    metrics_compat: str = option("vllm", "show the metrics under vLLM's names too", choices=COMPAT)
    otlp_traces_endpoint: str | None = option(None, "where OpenTelemetry traces go (http); needs octavo[otel]")
    # Time.
    request_timeout: float | None = option(None, "seconds that a request may take in all; its field timeout may ask for less")
    queue_timeout: float | None = option(None, "seconds that a request may wait before it starts")
    shutdown_timeout: float = option(30.0, "seconds that requests get to end after SIGTERM")
    step_timeout: float = option(120.0, "seconds of one step after which /health says that the engine hangs")
    keep_alive: float = option(5.0, "seconds that an idle connection is kept")
    header_timeout: float = option(10.0, "seconds that a client may take for the head of a request")
    body_timeout: float = option(30.0, "seconds that a client may pause within the body of a request")
    send_timeout: float = option(5.0, "seconds that a reader may stand still before it is dropped")
    # Limits.
    max_connections: int = option(4096, "open connections of each API process", kind="int")
    max_queued_requests: int = option(512, "requests that may wait, shared among API processes; beyond: 503", kind="int")
    max_queued_tokens: int = option(4_000_000, "prompt tokens that may wait, shared among API processes; beyond: 503", kind="int")
    max_held_bytes: int = option(1 << 30, "bytes of the bodies of all requests together; beyond: 503", kind="int")
    max_body_bytes: int = option(32 << 20, "bytes of a request's body", kind="int")
    max_header_bytes: int = option(32 << 10, "bytes of a request's head", kind="int")
    max_headers: int = option(100, "headers of a request", kind="int")
    max_json_depth: int = option(128, "depth of nesting in a request's JSON", kind="int")
    max_stream_buffer: int = option(1 << 20, "bytes that may wait for a slow reader before it is dropped", kind="int")
    max_n: int = option(128, "continuations of one prompt", kind="int")
    max_prompts: int = option(1024, "prompts of one request", kind="int")
    max_sequences: int = option(1024, "prompts times continuations of one request", kind="int")
    max_logprob_entries: int = option(1_000_000, "logprobs that one answer may hold", kind="int")
    max_stop: int = option(16, "stop strings of a request", kind="int")
    max_stop_chars: int = option(256, "characters of a stop string", kind="int")
    max_logit_bias: int = option(1024, "entries of logit_bias", kind="int")
    # How long compiling may take is no flag: these bound it.
    max_schema_bytes: int = option(64 << 10, "bytes of a JSON schema, a tool's too; bounds how long compiling takes", kind="int")
    max_schema_depth: int = option(64, "depth of nesting in a JSON schema", kind="int")
    max_regex_bytes: int = option(4 << 10, "bytes of a regex; bounds how long compiling takes", kind="int")
    max_grammar_cache_bytes: int = option(256 << 20, "bytes that remembered schemas, regexes and grammars may take", kind="int")

    def __post_init__(self) -> None:
        for f in fields(self):
            check_field(f, getattr(self, f.name))
        _check_ranges(self)

    @property
    def grammar_limits(self) -> Limits:
        """The limits of constraints, as the text side takes them."""
        return Limits(self.max_schema_bytes, self.max_schema_depth, self.max_regex_bytes, self.max_grammar_cache_bytes)

    def replace(self, **changes: Any) -> "ServerConfig":
        """A copy with other values, validated again."""
        return replace(self, **changes)

    @classmethod
    def add_cli_args(cls, parser: Any) -> None:
        """Add a flag per field to a parser or a group of one."""
        for f in fields(cls):
            add_flag(parser, f)

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> "ServerConfig":
        """Build from the namespace of a parser that ``add_cli_args`` filled; a list that was not given keeps its default."""
        given = {f.name: getattr(args, f.name) for f in fields(cls) if hasattr(args, f.name)}
        lists = {f.name for f in fields(cls) if f.metadata["kind"] == "list"}
        values: dict[str, Any] = {name: tuple(value) if name in lists else value
                                  for name, value in given.items() if not (name in lists and value is None)}
        return cls(**values)


def _check_ranges(c: ServerConfig) -> None:
    def need(name: str, good: bool, hint: str) -> None:
        if not good:
            got = "" if name.startswith("api_key") else f", got {getattr(c, name)!r}"
            raise ConfigError(f"{name} must be {hint}{got}.", name)

    need("port", 0 <= c.port < 65536, "from 0 to 65535")
    need("host", bool(c.host), "an address")
    need("root_path", c.root_path == "" or (c.root_path.startswith("/") and not c.root_path.endswith("/")),
         "empty or begin, and not end, with /")
    need("api_server_count", 1 <= c.api_server_count <= 64, "from 1 to 64")
    # A key travels in a header: what no header can hold could never match.
    need("api_key", all(key and key.isascii() and key.isprintable() and " " not in key for key in c.api_key),
         "printable ASCII without spaces")
    need("served_model_name", all(c.served_model_name), "names that are not empty")
    if (c.ssl_keyfile is None) != (c.ssl_certfile is None):
        raise ConfigError("ssl_keyfile and ssl_certfile go together, got only one of them.", "ssl_certfile")
    for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "api_key_file"):
        value: Any = getattr(c, name)
        need(name, value is None or Path(value).expanduser().is_file(), "a readable file")
    need("shutdown_timeout", c.shutdown_timeout >= 0.0, "0 or more")
    for name in ("request_timeout", "queue_timeout"):
        need(name, getattr(c, name) is None or getattr(c, name) > 0.0, "above 0")
    for name in ("step_timeout", "keep_alive", "header_timeout", "body_timeout", "send_timeout"):
        need(name, getattr(c, name) > 0.0, "above 0")
    need("max_log_len", c.max_log_len is None or c.max_log_len >= 0, "0 or more")
    if c.max_log_len is not None and not c.enable_log_requests:
        raise ConfigError(f"max_log_len ({c.max_log_len}) needs enable_log_requests, which is off.", "max_log_len")
    for f in fields(c):
        if f.name.startswith("max_") and f.name != "max_log_len":
            need(f.name, getattr(c, f.name) >= 1, "at least 1")
    # Ranges that SamplingParams holds by itself can be made narrower here and not wider; compiling must not take many seconds.
    for name, most in (("max_n", 128), ("max_stop", 16), ("max_stop_chars", 256), ("max_logit_bias", 1024),
                       ("max_schema_bytes", 256 << 10), ("max_schema_depth", 120), ("max_regex_bytes", 16 << 10)):
        need(name, getattr(c, name) <= most, f"at most {most}")
