"""schemathesis against a live server: whatever the document allows, and whatever it forbids, is answered as it says.

The document is the server's own. What is generated depends on the seed alone; ``SCHEMATHESIS_EXAMPLES`` and
``SCHEMATHESIS_SEED`` make longer and other runs.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from served import Served
from web import KEY

EXAMPLES = os.environ.get("SCHEMATHESIS_EXAMPLES", "8")
SEED = os.environ.get("SCHEMATHESIS_SEED", "1")
CHECKS = "not_a_server_error,response_schema_conformance,status_code_conformance"
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/generate")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Served]:
    """Answers without max_tokens end soon, and a prompt of tools fits."""
    with Served(model, "--max-model-len", "256") as served:
        yield served
        served.settle()
        served.check_descriptors()
        assert served.end() == 0


def run(server: Served, report: Path, mode: str, *options: str) -> Counter[tuple[str, str, int]]:
    """How often (phase, operation, status) came; fails where a check fails."""
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"http://127.0.0.1:{server.port}/openapi.json",
        "--header", f"Authorization: Bearer {KEY}", "--mode", mode, "--max-examples", EXAMPLES, "--seed", SEED,
        "--phases", "examples,coverage,fuzzing", "--checks", CHECKS, "--continue-on-failure", "--no-shrink",
        "--suppress-health-check", "all", "--request-timeout", "30", "--report", "ndjson", "--report-ndjson-path", str(report),
        *options]
    folder = Path(__file__).parent
    environment = {**os.environ, "SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=report.parent, env=environment, capture_output=True, text=True, timeout=280.0)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    found: Counter[tuple[str, str, int]] = Counter()
    for line in report.read_text().splitlines():
        scenario = json.loads(line).get("ScenarioFinished", {})
        recorder = scenario.get("recorder", {})
        for interaction in recorder.get("interactions", {}).values():
            response = interaction.get("response")
            assert response is not None, (recorder["label"], interaction["request"])
            found[scenario["phase"], recorder["label"], response["status_code"]] += 1
    return found


def share(found: Counter[tuple[str, str, int]], phase: str, operation: str, good: range) -> float:
    """Which part of an operation's answers had such a status."""
    counts = {status: count for (in_phase, label, status), count in found.items() if (in_phase, label) == (phase, operation)}
    return sum(count for status, count in counts.items() if status in good) / sum(counts.values())


def test_what_the_document_allows(server: Served, tmp_path: Path) -> None:
    found = run(server, tmp_path / "report", "positive")
    assert sum(found.values()) > 400
    assert not [key for key in found if key[2] >= 500]
    document = server.ask("/openapi.json", method="GET").json
    labels = {f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item}
    assert {label for _, label, _ in found} == labels - {"GET /openapi.json"}  # it tests no document by itself
    for path in GENERATING:
        assert share(found, "examples", f"POST {path}", range(200, 300)) == 1.0
        assert share(found, "fuzzing", f"POST {path}", range(200, 300)) >= 0.3, path


def test_what_the_document_forbids(server: Served, tmp_path: Path) -> None:
    # Where there is nothing to say but a key, which is given, nothing can be said wrongly.
    found = run(server, tmp_path / "report", "negative", "--include-method", "POST", "--include-path", "/v1/models/{model}")
    assert sum(found.values()) > 400
    assert not [key for key in found if key[2] >= 500]
    for path in GENERATING:
        assert share(found, "fuzzing", f"POST {path}", range(400, 500)) >= 0.8, path
        assert share(found, "coverage", f"POST {path}", range(400, 500)) >= 0.98, path
