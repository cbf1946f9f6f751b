"""Start-up: importing octavo loads no torch, and neither import nor ``--help`` costs more than a moment.

The promises are 0.3 s for the import and 0.5 s for ``octavo --help``. The best of several runs counts, and may take twice
as long: a shared machine is slow at times, but hardly five times in a row.
"""

import json
import subprocess
import sys
import time

HEAVY = ("torch", "transformers", "tokenizers", "rich", "numpy", "huggingface_hub", "jinja2", "safetensors")


def seconds(*words: str) -> float:
    """The quickest of five runs of the interpreter."""
    found = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, *words], check=True, capture_output=True)
        found.append(time.perf_counter() - start)
    return min(found)


def loaded(code: str) -> set[str]:
    """Which heavy modules are loaded after ``code``."""
    tail = f"\nimport json, sys; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code + tail], check=True, capture_output=True, text=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_loads_nothing_heavy() -> None:
    assert loaded("import octavo; octavo.SamplingParams; octavo.EngineArgs; octavo.RequestOutput") == set()


def test_the_command_line_loads_nothing_heavy() -> None:
    assert loaded("import octavo.cli; octavo.cli.build_parser()") == set()


def test_the_engine_loads_no_torch() -> None:
    assert "torch" not in loaded("import octavo.engine.engine")


def test_heavy_modules_are_seen_when_they_are_loaded() -> None:
    """The check itself can fail."""
    assert "numpy" in loaded("import octavo.plan")


def test_import_is_quick() -> None:
    assert seconds("-c", "import octavo") - seconds("-c", "pass") < 0.3 * 2


def test_help_is_quick() -> None:
    assert seconds("-m", "octavo", "--help") < 0.5 * 2
