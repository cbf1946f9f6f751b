"""Which reports of racecheck count, on outputs as compute-sanitizer prints them."""

import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import hazards

ROOT = Path(__file__).resolve().parents[1]
OLD, NEW = (2025, 3, 1, 0), (2026, 3, 0, 0)
DECODE = (ROOT / "csrc" / "cuda" / "attention_decode.cuh").read_text().splitlines()
KERNEL = "void octavo::cuda::decode_kernel<__nv_bfloat16, (bool)0, (int)128, (int)1>(octavo::cuda::AttentionParams)+0x5a0 in"
EXCUSED = "reports about flags of the decode kernel, which racecheck does not follow: "


def line(words: str) -> str:
    """The place in attention_decode.cuh where these words are."""
    (number,) = (number for number, text in enumerate(DECODE, 1) if words in text)
    return f"attention_decode.cuh:{number}"


STEP, QUERY = line("words[1] = make_int4(kv_head"), line("shared.queries[buffer] + swizzled<dim * 2>(at / q_chunks")
FLAG, POLL = line("int seen(const int* p)"), line("if (n < seen(&shared.progress.written)) break;")
READ, STATS = line("const int flags = step.flags, rows"), line("= make_float2(m[i][e], sum);")
OWN = line("&shared.progress.step) = n;")


def output(*reports: tuple[str, ...], severity: str = "Error", displayed: int | None = None) -> list[str]:
    """What racecheck prints, among what pytest prints: of every report the places of its accesses."""
    said = ["========= COMPUTE-SANITIZER", "begins t.py::a", "..."]
    for first, *others in reports:
        said.append(f"========= {severity}: Race reported between Write access at {KERNEL} {first}")
        said += [f"=========     and {'Read' if i % 2 == 0 else 'Write'} access at {KERNEL} {other} [{64 * i + 1} hazards]"
                 for i, other in enumerate(others)]
        said.append("========= ")
    count = len(reports) if displayed is None else displayed
    return [*said, "3 passed in 9 s", f"========= RACECHECK SUMMARY: {count} hazards displayed ({count} errors, 0 warnings)"]


def test_a_run_without_reports() -> None:
    assert hazards.judge(0, output(), NEW) == ("", [])
    assert hazards.judge(1, output(), NEW) == ("exit code 1", [])
    assert hazards.judge(1, output((STEP, READ)), NEW) == ("exit code 1", []), "a test that fails is no report"
    assert hazards.judge(0, ["1 passed"], NEW) == ("", [])


@pytest.mark.parametrize("pair", [(STEP, READ), (READ, STEP), (QUERY, "mma.cuh:57"), (FLAG, OWN), (OWN, POLL), (STEP, "")])
def test_flags_of_the_decode_kernel_do_not_count(pair: tuple[str, str]) -> None:
    for severity in ("Error", "Warning", "ERROR"):
        assert hazards.judge(hazards.FOUND, output(pair, severity=severity), NEW) == ("", [f"{EXCUSED}1"])
    assert hazards.judge(0, output(pair, pair, severity="Warning"), NEW) == ("", [f"{EXCUSED}2"])


@pytest.mark.parametrize("pair", [(STATS, READ), (OWN, READ), ("mma.cuh:57", "mma.cuh:86"), ("norm.cu:12", "norm.cu:14"),
                                  ("attention_prefill.cuh:250", "mma.cuh:57"), ("", "")])
def test_other_races_count(pair: tuple[str, str]) -> None:
    for code in (0, hazards.FOUND):
        why, notes = hazards.judge(code, output((STEP, READ), pair), NEW)
        first = " and ".join(place or "an unnamed line" for place in pair)
        assert why == f"races: 1, the first between {first}" and notes == [f"{EXCUSED}1"]


def test_every_pair_of_a_report_is_looked_at() -> None:
    assert hazards.judge(hazards.FOUND, output((READ, STEP, QUERY)), NEW)[0] == ""
    assert hazards.judge(hazards.FOUND, output((STEP, READ, STATS)), NEW)[0] == ""
    assert hazards.judge(hazards.FOUND, output((READ, STEP, STATS)), NEW) == (
        f"races: 1, the first between {READ} and {STATS}", [f"{EXCUSED}1"])


def test_reports_on_lines_that_pytest_began() -> None:
    dotted = [f".{text}" if text.startswith("=") else text for text in output((STEP, READ))]
    assert hazards.judge(hazards.FOUND, dotted, NEW) == ("", [f"{EXCUSED}1"])


def test_the_lines_of_another_file_are_no_flags() -> None:
    assert "races: 1," in hazards.judge(hazards.FOUND, output((STEP.replace("decode", "prefill"), "mma.cuh:57")), NEW)[0]


MBARRIERS = [("gemm_tile_sm90.cu:140", "mma.cuh:57"), ("mma.cuh:57", "hopper.cuh:81"), ("attention_prefill_sm90.cu:433",) * 2,
             ("sampling_row.cuh:46", "sampling_row.cuh:65")]


@pytest.mark.parametrize("pair", MBARRIERS)
def test_mbarriers_are_judged_by_a_tool_that_follows_them(pair: tuple[str, str]) -> None:
    said = output(pair, (STEP, READ))
    assert hazards.judge(hazards.FOUND, said, NEW) == (f"races: 1, the first between {pair[0]} and {pair[1]}", [f"{EXCUSED}1"])
    words = "not judged: compute-sanitizer {} does not follow mbarriers (reports: 1)"
    assert hazards.judge(hazards.FOUND, said, OLD) == ("", [f"{EXCUSED}1", words.format("2025.3.1")])
    assert hazards.judge(hazards.FOUND, said, ()) == ("", [f"{EXCUSED}1", words.format("of unknown version")])
    assert "races" in hazards.judge(hazards.FOUND, output(pair, ("norm.cu:1", "norm.cu:2")), OLD)[0]


def test_of_sampling_only_the_copies_are_about_mbarriers() -> None:
    assert "races: 1," in hazards.judge(hazards.FOUND, output(("sampling_row.cuh:90", "sampling_row.cuh:120")), OLD)[0]


def test_what_cannot_be_read_counts() -> None:
    assert hazards.judge(hazards.FOUND, output(), NEW)[0] == "exit code 86, reports: 0, of which 0 could be read"
    assert hazards.judge(hazards.FOUND, output((STEP, READ), displayed=2), NEW)[0].endswith(": 2, of which 1 could be read")
    assert "could be read" in hazards.judge(hazards.FOUND, output((STEP,)), NEW)[0], "a report without its second line"
    assert "could be read" in hazards.judge(hazards.FOUND, output((STEP, READ))[:-1], NEW)[0], "a run that was cut off"
    for words in ("Warning: Maximum number of hazards reached. Environment variable X can be used to increase this count.",
                  "Warning: Detected overflow of tracked cuda::barrier structures.", "ERROR SUMMARY: 3 errors"):
        assert hazards.judge(0, [f"========= {words}", *output((STEP, READ))], NEW) == (words, [])


def test_the_older_words_for_a_place() -> None:
    new = output((STEP, READ))
    old = [re.sub(r" at .*\+0x5a0 in (\S+)", r" at 0x278 in /octavo/csrc/cuda/\1:decode_kernel(float*)", text) for text in new]
    assert old != new and "/octavo/csrc" in "".join(old)
    places = [("attention_decode.cuh", int(place.partition(":")[2])) for place in (STEP, READ)]
    assert hazards.races(old) == hazards.races(new) == [places]


@pytest.mark.parametrize("said, found", [
    ("NVIDIA (R) Compute Sanitizer\nCopyright (c) 2020-2025 NVIDIA\nVersion 2025.3.1.0 (build 36400806) (public-release)\n", OLD),
    ("NVIDIA (R) Compute Sanitizer, Version 2024.3.0.0 (public-release)", (2024, 3, 0, 0)), ("no words", ()), (None, ()),
])
def test_the_version_of_the_tool(
    said: str | None, found: hazards.Version, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}")
    if said is not None:
        (tmp_path / "compute-sanitizer").write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / "compute-sanitizer").chmod(0o755)
    assert hazards.version() == found


def test_tests_of_nothing_but_mbarriers_are_not_begun_with_an_older_tool() -> None:
    assert hazards.unjudged(NEW) == {} == hazards.unjudged((2026, 3))
    words = "not judged: compute-sanitizer 2026.2.1 does not follow mbarriers"
    assert hazards.unjudged((2026, 2, 1, 0)) == {"test_gemm_tile": words, "test_attention_sm90": words}


def test_what_is_chosen_by_name_is_there() -> None:
    """The functions and files follow the kernels, and the table of mbarriers has all that use them."""
    for file, names in {**hazards.FLAGS, **hazards.MBARRIERS}.items():
        text = (ROOT / "csrc" / "cuda" / file).read_text()
        assert all(re.search(rf"__device__ .*\b{name}\(.*\{{", text) for name in names), file
    ahead = hazards.lines_of("attention_decode.cuh", ("look_ahead",))
    begin, end = min(ahead), DECODE.index("}", min(ahead)) + 1
    assert DECODE[begin - 1].startswith("__device__ __forceinline__ void look_ahead(") and end - begin > 100
    assert ahead == {*range(begin, end + 1), DECODE.index("    look_ahead(p, d, shared);") + 1}
    lists = dict.fromkeys(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu*") if "mbarrier." in path.read_text()
                          or '#include "hopper.cuh"' in path.read_text())
    assert set(hazards.MBARRIERS) == set(lists)
    assert {f"{name}.py" for name in hazards.TESTS} <= {path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py")}
