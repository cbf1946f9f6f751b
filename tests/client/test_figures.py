"""Figures: every number against one that was worked out by hand."""

import math

import pytest

from octavo.client.connection import Refusal
from octavo.client.figures import (
    details,
    figures,
    parse_goodput,
    parse_metrics,
    parse_percentiles,
    peak_concurrency,
    peak_rate,
    table,
)
from octavo.client.load import Record
from octavo.errors import ConfigError

# Two answers and a failure. First: 100 ms to the first token, then 50, 50, 100 ms: tpot 200 / 3; whole after 300 ms.
# Second: 300 ms, then 100: two tokens, tpot 100; whole after 400 ms.
A = Record(1.0, 10, 1.1, [0.05, 0.05, 0.1], 1.3, 4, True, "abcd")
B = Record(1.2, 20, 1.5, [0.1], 1.6, 2, True, "ef")
C = Record(1.1, 30, 1.2, [], 1.3, 1, False, "g", Refusal("the server answered 500: no"))
ALL = [A, B, C]


def test_figures() -> None:
    found = figures(ALL, 2.0, ["ttft", "tpot", "itl", "e2el"], [50, 99, 99.9], {"ttft": 300.0, "tpot": 70.0})
    assert (found["completed"], found["failed"], found["duration"]) == (2, 1, 2.0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 6)
    assert found["request_throughput"] == 1.0 and found["output_throughput"] == 3.0 and found["total_token_throughput"] == 18.0
    assert found["request_goodput"] == 0.5, "A keeps both limits; B's tpot is 100 ms"
    expected = {"mean_ttft_ms": 200, "median_ttft_ms": 200, "std_ttft_ms": 100, "p50_ttft_ms": 200, "p99_ttft_ms": 298,
                "p99.9_ttft_ms": 299.8, "mean_tpot_ms": (200 / 3 + 100) / 2, "mean_itl_ms": 75, "median_itl_ms": 75,
                "std_itl_ms": 25, "mean_e2el_ms": 350, "std_e2el_ms": 50}
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["max_concurrent_requests"] == 2 and found["max_output_tokens_per_s"] == 6.0


def test_only_the_metrics_that_were_asked_for() -> None:
    found = figures(ALL, 2.0, ["ttft"], [99], {})
    assert {name for name in found if name.endswith("_ms")} == {
        "mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p99_ttft_ms"}
    assert found["request_goodput"] is None


@pytest.mark.parametrize(("limits", "good"), [
    ({"ttft": 99.9}, 0), ({"ttft": 100.001}, 1), ({"ttft": 300.001}, 2), ({"e2el": 350.0}, 1), ({"tpot": 66.0}, 0),
    ({"tpot": 67.0}, 1), ({"ttft": 1000.0, "tpot": 1000.0, "e2el": 399.0}, 1),
])
def test_goodput(limits: dict[str, float], good: int) -> None:
    assert figures(ALL, 4.0, [], [], limits)["request_goodput"] == good / 4.0


def test_nothing_was_answered() -> None:
    found = figures([C], 2.0, ["ttft", "itl"], [99], {"ttft": 1.0})
    assert found["completed"] == 0 and found["mean_ttft_ms"] == 0.0 and found["p99_itl_ms"] == 0.0
    assert found["request_goodput"] == 0.0 and found["max_concurrent_requests"] == 0
    assert not any(isinstance(value, float) and math.isnan(value) for value in found.values())
    assert "Failed requests:                         1" in table(found, ["ttft"], [99], math.inf, None)


def test_a_single_token_has_no_tpot() -> None:
    one = Record(0.0, 1, 0.5, [], 0.5, 1)
    assert one.tpot == 0.0 and figures([one], 1.0, ["tpot"], [], {"tpot": 1.0})["request_goodput"] == 1.0


def test_peaks() -> None:
    many = Record(0.0, 1, 0.5, [0.2, 0.6, 0.1], 1.5, 8)  # four chunks of two tokens, two in each second
    assert peak_rate([many]) == 4.0
    assert peak_rate([]) == 0.0
    assert peak_concurrency([Record(0.0, 1, end=1.0), Record(1.0, 1, end=2.0), Record(1.5, 1, end=3.0)]) == 2


def test_details() -> None:
    found = details(ALL)
    assert set(found) == {"input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors"}
    assert found["output_lens"] == [4, 2, 1] and found["errors"] == ["", "", "the server answered 500: no"]
    assert found["ttfts"] == pytest.approx([0.1, 0.3, 0.1]) and found["itls"][1] == [0.1]


def test_the_table() -> None:
    found = figures(ALL, 2.0, ["ttft"], [99], {"ttft": 1.0})
    lines = table(found, ["ttft"], [99], 5.0, 16).splitlines()
    assert lines[0] == "============ Serving Benchmark Result ============"
    assert "Successful requests:                     2" in lines and "Maximum request concurrency:             16" in lines
    assert "Request rate configured (RPS):           5.00" in lines and "Mean TTFT (ms):                          200.00" in lines
    assert "P99 TTFT (ms):                           298.00" in lines and "Request goodput (req/s):                 0.00" in lines
    assert "---------------Time to First Token----------------" in lines and lines[-1] == "=" * 50


def test_flags() -> None:
    assert parse_metrics("ttft, e2el,ttft") == ["ttft", "e2el"] and parse_percentiles("50,99.9") == [50.0, 99.9]
    assert parse_goodput(["ttft:300", "tpot:50.5"]) == {"ttft": 300.0, "tpot": 50.5}


@pytest.mark.parametrize(("parse", "value", "name"), [
    (parse_metrics, "ttft,speed", "speed"), (parse_percentiles, "99,x", "'x'"), (parse_percentiles, "101", "101"),
    (parse_percentiles, "nan", "nan"), (parse_goodput, ["itl:3"], "itl:3"), (parse_goodput, ["ttft"], "ttft"),
    (parse_goodput, ["ttft:-1"], "ttft:-1"), (parse_goodput, ["ttft:nan"], "ttft:nan"),
])
def test_bad_flags_are_named(parse: object, value: object, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        parse(value)  # type: ignore[operator]
