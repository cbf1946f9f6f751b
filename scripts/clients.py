"""Clients that nobody here wrote, against the real server: python scripts/clients.py [--only NAME ...] [--url URL].

Makes an environment per set of clients under build/clients (kept until its requirements change), starts ``octavo serve smollm2``,
runs the recipes of tests/clients in all of them one after the other, has the chat page driven by Chromium where there is one, and
prints a table. Exit status 1 where a recipe fails or a client could not be installed. Needs PyPI and npm the first time.
"""

import argparse
import hashlib
import json
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from octavo.config import EngineConfig
from octavo.models.hub import resolve
from octavo.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "tests" / "clients"
BUILD = ROOT / "build" / "clients"
MODEL = "smollm2"
# Environment -> its recipes. Those of one environment agree on the versions of what they need; the others would not.
PYTHON = {
    "sdk": ("openai", "anthropic", "langchain", "pydantic_ai", "llm"), "litellm": ("litellm",), "instructor": ("instructor",),
    "lm-eval": ("lm_eval",)}
NODE = ("openai", "ai")
MAX_MODEL_LEN = 1024
"""A model this small may ramble until nothing more fits."""
PATIENCE = 300.0
"""Seconds for the recipes of one client."""


@dataclass(frozen=True)
class Row:
    """A line of the table; trouble is empty where all is well."""

    client: str
    recipe: str
    seconds: float
    trouble: str


class Unable(Exception):
    """An environment that could not be made; the message says why."""


def main() -> int:
    """Run all; 0 where nothing failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    names = [*(check for checks in PYTHON.values() for check in checks), *(f"node-{name}" for name in NODE), "page"]
    parser.add_argument("--only", nargs="+", choices=names, help="these clients")
    parser.add_argument("--url", help="of a server that runs already, as http://127.0.0.1:8000")
    args = parser.parse_args()
    wanted = set(args.only or names)
    start = time.monotonic()
    BUILD.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(2) as pool:
        # The largest first; while others are still being installed, the recipes of the first ones run.
        made = {name: pool.submit(python_environment, name) for name in reversed(PYTHON) if wanted & set(PYTHON[name])}
        if any(f"node-{name}" in wanted for name in NODE):
            made["node"] = pool.submit(node_folder)
        with serving(args.url) as url:
            rows = [row for name, future in made.items() for row in _checked(name, future, wanted, url)]
            if "page" in wanted:
                rows += page(url)
    show(rows)
    failed = sum(bool(row.trouble) for row in rows)
    print(f"{len(rows)} recipes, {failed} failed, {time.monotonic() - start:.0f} s")
    return int(failed > 0 or not rows)


def _checked(name: str, future: "Future[Path]", wanted: set[str], url: str) -> list[Row]:
    try:
        where = future.result()
    except Unable as error:
        return [Row(name, "(installing)", 0.0, str(error))]
    rows: list[Row] = []
    if name == "node":
        for check in NODE:
            if f"node-{check}" in wanted:
                rows += recipes(f"node-{check}", ["node", str(where / f"check_{check}.mjs")], url)
    else:
        for check in PYTHON[name]:
            if check in wanted:
                rows += recipes(check, [str(where / "bin" / "python"), str(RECIPES / f"check_{check}.py")], url)
    return rows


def python_environment(name: str) -> Path:
    """A virtual environment with what tests/clients/python/NAME.txt asks for, in the versions of its constraints."""
    folder, wanted = BUILD / name, RECIPES / "python" / f"{name}.txt"
    constraints = wanted.with_suffix(".constraints.txt")

    def install() -> None:
        _call([sys.executable, "-m", "venv", str(folder)])
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "-q"]
        _call([*pip, "-r", str(wanted), "-c", str(constraints)])

    return _made(folder, [wanted, constraints], install)


def node_folder() -> Path:
    """A folder with the packages of tests/clients/package-lock.json, and the recipes beside them."""
    folder = BUILD / "node"
    sources = [RECIPES / "package.json", RECIPES / "package-lock.json"]

    def install() -> None:
        folder.mkdir(parents=True)
        for source in sources:
            shutil.copy(source, folder)
        _call(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts"], folder)

    _made(folder, sources, install)
    for recipe in RECIPES.glob("*.mjs"):
        shutil.copy(recipe, folder)
    return folder


def _made(folder: Path, sources: list[Path], install: Callable[[], None]) -> Path:
    """Make a folder again unless it was made of the same sources."""
    parts = [platform.python_version().encode(), *(path.read_bytes() for path in sources)]
    made_of = hashlib.sha256(b"\0".join(parts)).hexdigest()
    stamp = folder / ".stamp"
    if not (stamp.is_file() and stamp.read_text() == made_of):
        shutil.rmtree(folder, ignore_errors=True)
        install()
        stamp.write_text(made_of)
    return folder


def _call(command: list[str], folder: Path | None = None) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Unable(f"{command[0]} is not installed") from error
    if done.returncode:
        raise Unable(" ".join(command[:4]) + ": " + (done.stderr or done.stdout).strip()[-600:])


@contextmanager
def serving(url: str | None) -> Iterator[str]:
    """The address of a server that is ready."""
    if url is not None:
        yield url.rstrip("/")
        return
    environment = {"OMP_NUM_THREADS": "2", **os.environ}
    command = [sys.executable, "-m", "octavo", "serve", MODEL, "--port", "0", "--max-model-len", str(MAX_MODEL_LEN)]
    with open(BUILD / "server.log", "wb") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT)
    said: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_pass_on, args=(server.stdout, said), daemon=True).start()
    try:
        while not (found := re.search(r"listens on (http://\S+);", said.get(timeout=60.0))):
            pass
        until_ready(found[1])
        yield found[1]
    finally:
        server.terminate()
        server.wait(60.0)


def _pass_on(lines: Iterable[str], said: "queue.Queue[str]") -> None:
    """Read all that the server prints, so that it never waits for a reader."""
    for line in lines:
        said.put(line)


def until_ready(url: str) -> None:
    """Wait until the server takes requests."""
    end = time.monotonic() + 120.0
    while time.monotonic() < end:
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=5.0):
                return
        except urllib.error.HTTPError:
            time.sleep(0.1)
    raise SystemExit(f"The server at {url} is not ready; see {BUILD / 'server.log'}.")


def recipes(client: str, command: list[str], url: str) -> list[Row]:
    """Run the recipes of one client."""
    environment = {**os.environ, "OCTAVO_URL": url, "OCTAVO_MODEL": MODEL, "OCTAVO_TOKENIZER": str(tokenizer())}
    for name in ("PYTHONPATH", "OPENAI_API_KEY", "OPENAI_BASE_URL", "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL"):
        environment.pop(name, None)
    log, rows = BUILD / f"{client}.log", list[Row]()
    with open(log, "w") as file:
        try:
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=file, text=True, timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            return [Row(client, "(all)", PATIENCE, f"not done in time; see {log}")]
    for line in done.stdout.splitlines():
        if line.startswith('{"recipe":'):
            rows.append(Row(client, **json.loads(line)))
    if not rows or (done.returncode and not any(row.trouble for row in rows)):
        rows.append(Row(client, "(all)", 0.0, f"ended with status {done.returncode}; see {log}"))
    return rows


def tokenizer() -> Path:
    """The model's tokenizer as a folder that transformers reads, for clients that count tokens themselves."""
    folder = BUILD / "tokenizer"
    if not (folder / "tokenizer_config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        config = EngineConfig(model=MODEL)
        found = load_tokenizer(resolve(config), config)
        found.backend.save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **found.special_tokens}))
    return folder


def page(url: str) -> list[Row]:
    """The chat page in a browser."""
    if shutil.which("chromium") is None:
        print("The chat page is not tried: there is no chromium here.")
        return []
    start, command = time.monotonic(), [sys.executable, str(ROOT / "tests" / "browser" / "drive.py"), f"{url}/"]
    done = subprocess.run([*command, "--out", str(BUILD / "page")], capture_output=True, text=True, timeout=PATIENCE)
    trouble = "" if done.returncode == 0 else (done.stdout + done.stderr).strip()[-300:]
    return [Row("chromium", "page", time.monotonic() - start, trouble)]


def show(rows: list[Row]) -> None:
    """Print the table."""
    for row in rows:
        result = " ".join(row.trouble.split())[:200] if row.trouble else "ok"
        print(f"{row.client:<12} {row.recipe:<30} {row.seconds:6.1f} s  {result}")


if __name__ == "__main__":
    sys.exit(main())
