"""The server's documentation against the server: fields, flags, routes, limits, requests and the files for deployment.

What a page says is compared with the code that it speaks of; nothing is started, and no name is written down a second time.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from octavo.absent import REFUSED
from octavo.cli import build_parser
from octavo.server import chat, completions, generate, messages, models, probes, responses, tokenize
from octavo.server.config import ServerConfig
from octavo.server.errors import STATUSES, TYPES
from octavo.server.http import OPEN_PATHS
from octavo.server.messages_input import MessagesRequest, Said
from octavo.server.sampling_fields import NO_EFFECT
from octavo.server.strict import decode
from octavo.server.tools.parser import REASONING_FORMATS, TOOL_FORMATS
from octavo.text import grammar, schema

ROOT = Path(__file__).resolve().parents[1]
DOCS, DEPLOY = ROOT / "docs", ROOT / "examples" / "deploy"
BODIES: dict[str, type[msgspec.Struct]] = {
    "/v1/completions": completions.CompletionRequest, "/v1/chat/completions": chat.ChatRequest,
    "/v1/responses": responses.ResponsesRequest, "/v1/messages": MessagesRequest, "/v1/messages/count_tokens": Said,
    "/generate": generate.GenerateRequest, "/tokenize": tokenize.TokenizeRequest, "/detokenize": tokenize.DetokenizeRequest,
}
APIS = (*completions.ROUTES, *chat.ROUTES, *responses.ROUTES, *messages.ROUTES, *generate.ROUTES, *tokenize.ROUTES,
        *models.ROUTES)
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def section(page: str, title: str) -> str:
    """What stands under a heading, up to the next one of its kind or a higher one."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,2}} |\Z)", page, re.DOTALL | re.MULTILINE)
    assert found is not None, title
    return found[2]


def rows(part: str) -> list[list[str]]:
    """The cells of a part's tables, without heads."""
    found = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    rules = [number for number, row in enumerate(found) if set(row[0]) == {"-"}]
    return [row for number, row in enumerate(found) if number not in rules and number + 1 not in rules]


def names(cell: str) -> list[str]:
    """What stands in backquotes."""
    return re.findall(r"`([^`]+)`", cell)


def serve_parser() -> argparse.ArgumentParser:
    commands = next(action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    parser: argparse.ArgumentParser = commands.choices["serve"]
    return parser


def serve(words: list[str]) -> argparse.Namespace:
    """What a command line of ``octavo serve`` says; a mistake in it ends the test."""
    return build_parser().parse_args(["serve", *words])


# Pages made from the code

@pytest.mark.parametrize("script", ["generate_fields.py", "generate_vllm_flags.py"])
def test_pages_made_from_the_code_are_up_to_date(script: str) -> None:
    done = subprocess.run([sys.executable, DOCS / script, "--check"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_every_field_of_every_request_has_a_row() -> None:
    page = text("api-fields.md")
    matrix = rows(section(page, "Completions, chat and generate"))
    for number, path in enumerate(["/v1/completions", "/v1/chat/completions", "/generate"], start=1):
        told = {names(row[0])[0]: row[number] for row in matrix}
        assert {name for name, mark in told.items() if mark != "-"} == set(BODIES[path].__struct_fields__), path
        assert {name for name, mark in told.items() if mark == "no effect"} <= set(NO_EFFECT), path
        assert set(told.values()) <= {"yes", "no effect", "refused", "-"}
    for title, kinds in (("Responses", ["/v1/responses"]), ("Messages", ["/v1/messages"]),
                         ("Tokenize and detokenize", ["/tokenize", "/detokenize"])):
        told_names = [names(row[0])[0] for row in rows(section(page, title))]
        assert told_names == [name for path in kinds for name in BODIES[path].__struct_fields__], title


def test_every_refused_flag_stands_in_the_table() -> None:
    told = {names(row[0])[0]: row[1] for row in rows(section(text("vllm-flags.md"), "Refused"))}
    assert told == REFUSED


# The guide

def test_every_route_stands_in_the_guide() -> None:
    told = {spelt.replace("{model:path}", "{model}") for row in rows(section(text("serving.md"), "Routes"))
            for cell in row for spelt in names(cell) if re.match(r"(GET|POST) /", spelt)}
    known = {f"{method} {path.replace('{model:path}', '{model}')}" for method, path, _ in APIS}
    health: Any = None
    known |= {f"{method} {path}" for method, path, _ in probes.Probes(health, health).routes()}
    assert told == known | {"GET /metrics", "GET /openapi.json", "GET /"}


def test_every_status_stands_in_the_guide() -> None:
    told = {int(row[0]): names(row[1])[0] for row in rows(section(text("serving.md"), "Errors"))}
    assert told == {status: TYPES.get(status, "invalid_request_error") for status in STATUSES}


def test_limits_and_times_of_the_guide_are_the_defaults() -> None:
    config = ServerConfig()
    page = text("serving.md").partition("\n## Limits\n")[2].partition("\n## Overload\n")[0]
    told: dict[str, str] = {}
    for row in rows(page):
        flags = [flag for flag in names(row[0]) if flag.startswith("--")]
        told.update(zip(flags, row[1].replace(" s", "").split(", ") * len(flags), strict=False))
    assert told.pop("--max-logprobs") == str(serve(["m"]).max_logprobs)
    for flag, shown in told.items():
        default = getattr(config, flag.removeprefix("--").replace("-", "_"))
        assert shown == ("none" if default is None else f"{default:g}" if isinstance(default, float) else str(default)), flag
    named = {flag.removeprefix("--").replace("-", "_") for flag in told}
    fields = {name for name in ServerConfig.__dataclass_fields__ if name.startswith("max_") or name.endswith("_timeout")}
    assert named == (fields | {"keep_alive"}) - {"max_log_len"}


def test_requests_in_the_pages_are_requests() -> None:
    seen = 0
    for page in PAGES:
        for _, block in FENCE.findall(page.read_text(encoding="utf-8")):
            for command in re.findall(r"^curl (.*?)(?=\n\n|\ncurl |\Z)", block, re.DOTALL | re.MULTILINE):
                words = shlex.split(command)
                path = re.sub(r"^https?://[^/]+", "", next(word for word in words if word.startswith("http")))
                if "-d" in words:
                    decode(words[words.index("-d") + 1].encode(), BODIES[path])
                    seen += 1
                else:
                    assert any(path == route for _, route, _ in APIS), path
    assert seen >= 6


def test_commands_in_the_pages_can_be_parsed() -> None:
    seen = 0
    for page in PAGES:
        for language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            for line in block.splitlines() if language == "" else ():
                words = shlex.split(line.partition(" #")[0]) if line.startswith("octavo serve ") else []
                if words and words[2] != "MODEL" and not any(word.startswith(("--help", "--config")) for word in words):
                    serve(words[2:])
                    seen += 1
    assert seen >= 5


def test_flags_named_in_the_servers_pages_exist() -> None:
    known = {word for words in _options(build_parser()) for word in words} | set(REFUSED) | {"--config"}  # see words.py
    others = {"--init", "--unit", "--now", "--follow"}  # docker's and systemd's
    for name in ("serving", "deployment", "security", "migrate-from-vllm", "api-fields"):
        for flag in set(re.findall(r"(?<![\w-])--[a-z][a-z-]+[a-z]", text(f"{name}.md"))):
            assert flag in known | others, f"{name}: {flag}"


def _options(parser: argparse.ArgumentParser) -> Any:
    for action in parser._actions:
        yield action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for sub in action.choices.values():
                yield from _options(sub)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "docs/index.md", "docs/install.md", "docs/serving.md"])
def test_make_targets_in_the_pages_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`|\s)make ([a-z-]+)(?=\s{2,}|`| PIP_ARGS| PYTHON|$)", (ROOT / page).read_text(), re.MULTILINE))
    assert named and named <= targets, named - targets


# Files for deployment

def test_the_compose_file() -> None:
    document = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    service = document["services"]["octavo"]
    args = serve(service["command"])
    assert int(service["stop_grace_period"].removesuffix("s")) > args.shutdown_timeout
    assert (ROOT / service["build"]["dockerfile"]).is_file()
    assert args.api_key_file == "/run/secrets/api-keys" and "api-keys" in document["secrets"]
    assert service["ports"] == ["127.0.0.1:8000:8000"], "other machines do not reach an example"
    assert [volume.split(":")[1] for volume in service["volumes"]] == ["/models"] and service["tmpfs"] == ["/tmp"]


def test_the_container_file() -> None:
    words = (DEPLOY / "Dockerfile").read_text()
    entry, command = (json.loads(re.search(rf"^{name} (\[.*\])$", words, re.MULTILINE)[1])  # type: ignore[index]
                      for name in ("ENTRYPOINT", "CMD"))
    assert entry[:2] == ["octavo", "serve"]
    args = serve([*entry[2:], *command])
    assert str(args.port) in re.findall(r"^EXPOSE (\d+)$", words, re.MULTILINE) and args.host == "0.0.0.0"
    assert re.search(r"^USER (?!root|0\b)", words, re.MULTILINE)
    probe = re.search(r"urlopen\('http://127\.0\.0\.1:8000(/\w+)'", words)
    assert probe is not None and probe[1] in OPEN_PATHS
    assert re.search(r"^COPY --from=build", words, re.MULTILINE) and "constraints.txt" in words


def test_the_kubernetes_file() -> None:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Deployment", "PersistentVolumeClaim", "Service"]
    pod = documents[0]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    args = serve(container["args"])
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause + args.shutdown_timeout
    assert pod["enableServiceLinks"] is False and pod["securityContext"]["runAsNonRoot"] is True
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/health", "liveness": "/livez", "readiness": "/ready"} and set(paths.values()) <= OPEN_PATHS
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert args.api_key_file.startswith(tuple(mount["mountPath"] for mount in container["volumeMounts"]))
    assert documents[2]["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]


def test_the_systemd_unit() -> None:
    lines = (DEPLOY / "octavo.service").read_text().replace("\\\n", "").splitlines()
    values = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    words = values["ExecStart"].split()
    assert words[0].endswith("/octavo") and words[1] == "serve"
    args = serve(words[2:])
    assert int(values["TimeoutStopSec"]) > args.shutdown_timeout
    assert values["KillMode"] == "mixed" and "1" in values["RestartPreventExitStatus"].split()


def test_the_proxies() -> None:
    nginx, caddy = ((DEPLOY / name).read_text() for name in ("nginx.conf", "Caddyfile"))
    config = ServerConfig()
    assert "proxy_buffering off;" in nginx and "flush_interval -1" in caddy
    assert f"client_max_body_size {config.max_body_bytes >> 20}m;" in nginx
    assert f"max_size {config.max_body_bytes >> 20}MiB" in caddy
    for words, kept in ((nginx, r"keepalive_timeout (\d+)s;"), (caddy, r"keepalive (\d+)s")):
        seconds = re.search(kept, words)
        server = re.search(r"--keep-alive (\d+)", words)
        assert seconds is not None and server is not None and int(server[1]) > int(seconds[1])
    for words in (nginx, caddy):
        assert words.count("{") == words.count("}") and "X-Request-ID" in words and "127.0.0.1:8000" in words


def test_the_page_about_deployment_shows_every_file() -> None:
    shown = set(re.findall(r"literalinclude\} \.\./examples/deploy/(\S+)", text("deployment.md")))
    assert shown == {path.name for path in DEPLOY.iterdir()} - {"Dockerfile.dockerignore"}


def test_parsers_in_the_guide_are_those_that_exist() -> None:
    page = text("serving.md")
    assert {name for row in rows(section(page, "Tools")) for name in names(row[0])} == set(TOOL_FORMATS)
    assert set(REASONING_FORMATS) <= set(names(section(page, "Reasoning")))


def test_bounds_of_structured_outputs_in_the_guide() -> None:
    page = section(text("serving.md"), "Structured outputs")
    for bound in (
            f"at most {schema.DEFAULT.schema_bytes >> 10} KiB and {schema.DEFAULT.schema_depth} levels",
            f"a regex {schema.DEFAULT.regex_bytes >> 10} KiB",
            f"a grammar {grammar.MAX_GRAMMAR_BYTES >> 10} KiB", f"`multipleOf` at most {schema.MAX_MULTIPLE:,}"):
        assert bound in page, bound
