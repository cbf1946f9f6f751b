"""The results object: its keys, and that it always says where it was measured."""

import datetime
import json

import octavo
from octavo.bench.report import cpu_name, document, json_line, rounded


def test_document() -> None:
    found = json.loads(json_line(document("org/Tiny-1B", "single_8_4", {"ttft_s": (0.123456, "s")}, ["bench", "a b"])))
    assert set(found) == {"machine", "gpu", "driver", "versions", "commit", "date", "command", "figures"}
    assert found["figures"] == {"tiny-1b/single_8_4/ttft_s": {"value": 0.1235, "unit": "s"}}
    assert found["command"] == "octavo bench 'a b'"
    assert found["versions"]["octavo"] == octavo.__version__ and "torch" in found["versions"]
    assert datetime.datetime.fromisoformat(found["date"]).tzinfo is not None


def test_it_is_one_line() -> None:
    assert "\n" not in json_line(document("m", "w", {}, ["x\ny"]))


def test_rounded() -> None:
    assert [rounded(v) for v in (123456.0, 1.23456, 0.000123456, 0.0)] == [123500.0, 1.235, 0.0001235, 0.0]


def test_the_machine_has_a_name() -> None:
    assert cpu_name().endswith("threads") and len(cpu_name()) > 10
