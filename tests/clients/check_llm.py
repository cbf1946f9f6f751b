"""llm: its command line, as its documentation configures it."""

import atexit
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from recipes import BASE, MODEL, recipe, run

FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="octavo-llm-"))
atexit.register(shutil.rmtree, FOLDER)
(FOLDER / "extra-openai-models.yaml").write_text(json.dumps([{
    "model_id": "octavo", "model_name": MODEL, "api_base": BASE, "supports_schema": True, "supports_tools": True}]))
SCHEMA = json.dumps({"type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
                     "required": ["age"], "additionalProperties": False})


def llm(*arguments: str) -> str:
    """What the program prints."""
    environment = {**os.environ, "LLM_USER_PATH": str(FOLDER), "OPENAI_API_KEY": "x"}
    program = str(pathlib.Path(sys.executable).with_name("llm"))
    command = [program, "-m", "octavo", "-o", "max_tokens", "64", "-o", "temperature", "0"]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=120,
                          stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@recipe
def prompt() -> None:
    assert "Paris" in llm("What is the capital of France?")
    assert "Paris" in llm("--no-stream", "What is the capital of France?")


@recipe
def schema() -> None:
    found = json.loads(llm("--schema", SCHEMA, "How old is the oldest cat?"))
    assert isinstance(found["age"], int)


run()
