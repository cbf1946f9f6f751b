"""What racecheck's reports mean for our kernels: which of them count, and which the tool cannot judge.

Owns the reading of what is printed under compute-sanitizer; it starts no kernel and knows no step. racecheck follows barriers.
It does not follow flags in shared memory, with fences, of which the decode kernel has some (`Progress` in attention_decode.cuh);
and before 2026.3 it had false alarms at mbarriers and at the copies that complete them (its release notes). Invariant: what is
not recognised counts, and what does not count is named in a note.

A report has an access and those that it may race with, each with its file and line (-lineinfo):
    ========= Error: Race reported between Write access at decode_kernel<...>(...)+0x5a0 in attention_decode.cuh:257
    =========     and Read access at decode_kernel<...>(...)+0xc10 in mma.cuh:31 [64 hazards]
    =========     and Read access at decode_kernel<...>(...)+0xc40 in mma.cuh:31 [64 hazards]
    ========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEGINS, LEFT = "begins ", "no time left for "  # words of first_of_each.py: before a case; in front of those that were left out
FOUND = 86  # racecheck's exit code when what it ran succeeded and it has something to report
# All reports are read, so all are printed. A block of a product has up to 27 mbarriers, of prefill attention 21, of sampling 20.
OPTIONS = (f"--error-exitcode={FOUND}", "--print-limit=0", "--num-cuda-barriers=32")
FOLLOWS = (2026, 3)  # the first compute-sanitizer whose racecheck can judge mbarriers
# Functions whose accesses are to flags, or to what a flag announces; and the places of mbarriers: of a file (): all of it.
FLAGS = {"attention_decode.cuh": ("look_ahead", "seen")}
MBARRIERS: dict[str, tuple[str, ...]] = {
    "gemm_tile_sm90.cu": (), "attention_prefill_sm90.cu": (), "hopper.cuh": (),
    "sampling_row.cuh": ("fetch",), "sampling_team.cuh": ("expect", "report", "wait_for"),
}
TESTS = ("test_gemm_tile", "test_attention_sm90")  # of kernels with mbarriers; what else they launch has tests of its own

RACE = re.compile(r"=+ (?:\w+: )?Race reported between \w+ access at (.*)")
OTHER = re.compile(r"=+\s+and \w+ access at (.*)")
PLACE = re.compile(r"([\w.-]+\.(?:cuh?|hp*|cpp)):(\d+)")
SUMMARY = re.compile(r"=+ RACECHECK SUMMARY: (\d+) hazards? displayed")
TROUBLE = re.compile(r"=+ (.*(?:Maximum number of hazards reached|[Oo]verflow of tracked).*|ERROR SUMMARY: [1-9].*)")

Place = tuple[str, int]  # file and line; ("", 0): the report names none
Version = tuple[int, ...]


def version() -> Version:
    """Of the compute-sanitizer on PATH; () when there is none, or when it does not say."""
    try:
        said = subprocess.run(("compute-sanitizer", "--version"), capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    found = re.search(r"Version (\d+(?:\.\d+)+)", said)
    return tuple(map(int, found[1].split("."))) if found else ()


def blind(tool: Version) -> str:
    """Why reports about mbarriers are not judged; "" when they are."""
    name = ".".join(map(str, tool[:3])) or "of unknown version"
    return "" if tool >= FOLLOWS else f"not judged: compute-sanitizer {name} does not follow mbarriers"


def unjudged(tool: Version) -> dict[str, str]:
    """The tests for which racecheck is not begun, and why."""
    return dict.fromkeys(TESTS, blind(tool)) if blind(tool) else {}


def races(lines: Sequence[str]) -> list[list[Place]]:
    """Of every report the places: first that of the access that it is about."""
    found = list[list[Place]]()
    for line in lines:
        access = RACE.search(line)  # a line may begin with what pytest printed
        if access:
            found.append([])
        else:
            access = OTHER.search(line)
        if access and found:
            place = PLACE.search(access[1])
            found[-1].append((place[1], int(place[2])) if place else ("", 0))
    return found


@cache
def lines_of(file: str, names: tuple[str, ...]) -> frozenset[int]:
    """The lines of these functions in a file of csrc/cuda, and those that call them: whichever a tool names."""
    found, end = set[int](), ""
    calls = re.compile(rf"\b(?:{'|'.join(names)})\(")
    for number, line in enumerate((ROOT / "csrc" / "cuda" / file).read_text(encoding="utf-8").splitlines(), 1):
        code = line.partition("//")[0].rstrip()
        if end or calls.search(code):
            found.add(number)
        if not end and calls.search(code) and "__device__" in code and code.endswith("{"):
            end = re.match(r"\s*", code)[0] + "}"  # type: ignore[index]
        elif code == end:
            end = ""
    return frozenset(found)


def within(place: Place, where: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether an access is at one of these places."""
    file, line = place
    return file in where and (not where[file] or line in lines_of(file, where[file]))


def judge(code: int, lines: Sequence[str], tool: Version) -> tuple[str, list[str]]:
    """Why a run of racecheck with this exit code has failed, "" when it has not; and what did not count."""
    if code not in (0, FOUND):
        return f"exit code {code}", []
    trouble = [found[1] for found in map(TROUBLE.search, lines) if found]
    if trouble:
        return trouble[0], []
    found, displayed = races(lines), sum(int(shown[1]) for shown in map(SUMMARY.search, lines) if shown)
    if len(found) != displayed or (code and not found) or any(len(places) < 2 for places in found):
        return f"exit code {code}, reports: {displayed}, of which {len(found)} could be read", []
    counted, flags, mbarriers = list[str](), 0, 0
    for places in found:
        pairs = [(places[0], other) for other in places[1:]]
        seen = [pair for pair in pairs if not any(within(place, FLAGS) for place in pair)]
        left = [pair for pair in seen if not (blind(tool) and any(within(place, MBARRIERS) for place in pair))]
        flags += len(seen) < len(pairs)
        mbarriers += len(left) < len(seen)
        counted += [" and ".join(f"{file}:{line}" if file else "an unnamed line" for file, line in pair) for pair in left]
    notes = [f"reports about flags of the decode kernel, which racecheck does not follow: {flags}"] if flags else []
    notes += [f"{blind(tool)} (reports: {mbarriers})"] if mbarriers else []
    return (f"races: {len(counted)}, the first between {counted[0]}" if counted else ""), notes
