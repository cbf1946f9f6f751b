"""The order, the limits and the results of `make gpu-check`, with commands that need no GPU."""

import ast
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import first_of_each
import gpu_check
import hazards
from gpu_check import Check, Step

ROOT = Path(__file__).resolve().parents[1]
GOOD = """print('words'); print('{"a/us": {"value": 3, "unit": "us", "floor": 2}}')"""
NOTED = """print('{"figures": {"b/tok_s": {"value": 5, "unit": "tok/s"}}, "notes": ["c did not fit"]}')"""


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path / "logs")
    monkeypatch.setattr(gpu_check, "missing", lambda _: "")
    monkeypatch.setattr(hazards, "version", lambda: hazards.FOLLOWS)
    (tmp_path / "logs").mkdir()


def step(name: str, code: str, limit: float = 60, figures: bool = True, **more: Any) -> Step:
    return Step("kernels", name, limit, (sys.executable, "-c", code), figures=figures, **more)


def test_a_failure_hides_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    check = Check(120)
    for one in (
        step("exits", "print('why'); raise SystemExit(3)"), step("hangs", "import time; time.sleep(60)", limit=1),
        step("mute", "print('no figures')"), Step("kernels", "absent", 5, ("/no/such/program",)),
        step("good", GOOD), step("noted", NOTED),
    ):
        check.run([one])
    assert check.failed == ["kernels/exits", "kernels/hangs", "kernels/mute", "kernels/absent"]
    assert check.figures == {"a/us": {"value": 3, "unit": "us", "floor": 2}, "b/tok_s": {"value": 5, "unit": "tok/s"}}
    assert check.notes == ["noted: c did not fit"]
    said = capsys.readouterr().out
    assert "    why" in said and "exits: exit code 3" in said and "hangs: out of time" in said and "mute: its last line" in said


def test_no_step_outlives_the_whole() -> None:
    check = Check(2)
    check.run([step("first", "import time; time.sleep(60)"), step("second", "import time; time.sleep(60)")])
    check.run([step("third", GOOD)])
    assert sorted(check.failed) == ["kernels/first", "kernels/second", "kernels/third"] and not check.figures


@pytest.mark.parametrize("deaf", ["step", "child"])
def test_a_step_that_does_not_end_is_killed_with_its_children(deaf: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu_check, "GRACE", 0.3)
    ignore = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    child = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'child')!r}).write_text(str(os.getpid())); time.sleep(60)"
    code = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {ignore + child!r}]); time.sleep(60)"
    check, began = Check(60), time.monotonic()
    check.run([step("endless", (ignore if deaf == "step" else "") + code, limit=1.5)])
    assert check.failed == ["kernels/endless"] and time.monotonic() - began < 10
    pid = int((tmp_path / "child").read_text())
    for _ in range(500):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
            return
        time.sleep(0.01)
    raise AssertionError("the child of a step outlived it")


def test_so_many_run_at_once_and_each_has_its_own_limit(tmp_path: Path) -> None:
    """Five side by side, two at once: never three, and waiting does not count as running."""
    code = f"""import os, pathlib, time
mine = pathlib.Path({str(tmp_path)!r}) / f"{{os.getpid()}}.here"; mine.touch(); time.sleep(0.4)
print(len(list(mine.parent.glob("*.here")))); mine.unlink(); print('{{}}')"""
    check = Check(60, beside=2)
    check.run([step(f"n{i}", code, limit=3, beside="x") for i in range(5)])
    assert check.failed == []
    seen = [int((gpu_check.LOGS / f"kernels-n{i}.log").read_text().split()[0]) for i in range(5)]
    assert max(seen) == 2, seen


def test_words_that_are_known_late(capsys: pytest.CaptureFixture[str]) -> None:
    check = Check(60)
    check.run([step("echo", "import sys; print(sys.argv[1:]); print('{}')", late=lambda c: ["--of", str(len(c.failed))])])
    assert (gpu_check.LOGS / "kernels-echo.log").read_text().startswith("['--of', '0']")
    check.run([step("none", GOOD, late=lambda _: None)])
    assert check.failed == ["kernels/none"] and not check.figures and "none: no time left" in capsys.readouterr().out


def test_arrivals_are_a_share_of_the_whole_offline_figure_only() -> None:
    check = Check(60)
    assert gpu_check.offline(check) == []
    check.figures[gpu_check.OFFLINE] = {"value": 40000.0, "unit": "tok/s", "requests": 200}
    assert gpu_check.offline(check) == []  # of some requests: a tail in which the GPU is half empty
    check.figures[gpu_check.OFFLINE] = {"value": 49000.0, "unit": "tok/s"}
    assert gpu_check.offline(check) == ["--offline", "49000.0"]


def test_a_soak_takes_what_is_left_of_the_time() -> None:
    def minutes(left: float, wanted: float = 6.0) -> list[str] | None:
        return gpu_check.soak(wanted, Check(gpu_check.SOAK_ENDS + left))

    assert minutes(500) == ["--minutes", "6.00", "--rounds", "12"]
    assert minutes(90.1) == ["--minutes", "1.50", "--rounds", "4"]
    assert minutes(10) is None
    assert minutes(10, wanted=0.1) == ["--minutes", "0.10", "--rounds", "4"]


def test_the_commit_reaches_every_step_and_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    check = Check(60, "0123456789ab-dirty")
    check.run([step("says", "from octavo.bench.report import commit; print(commit()); print('{}')")])
    assert (gpu_check.LOGS / "kernels-says.log").read_text().splitlines()[0] == "0123456789ab-dirty"
    assert gpu_check.document(check, [])["commit"] == "0123456789ab-dirty"
    assert gpu_check.document(Check(60), [])["commit"] == "unknown"
    seen = list[str]()
    monkeypatch.setattr(gpu_check, "EXTENSIONS", ())
    monkeypatch.setattr(gpu_check, "steps", lambda *_, **__: [])
    monkeypatch.setattr(gpu_check, "Check", lambda limit, commit, beside: seen.append(commit) or Check(limit, commit, beside))
    assert gpu_check.main(["--commit", "no such commit", "--only", "tests"]) == 0
    assert seen == ["unknown, said to be no such commit"]


def tree(root: Path, *files: str) -> Path:
    """A tree with empty files; tests named test_engine run engines."""
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("from support import DEVICE\n" if "test_engine" in name else "")
    return root


def test_parts_and_their_order(tmp_path: Path) -> None:
    names = ("kernels_norm", "kernels_attention", "engine_gpu", "server_gpu", "idle", "poisson", "soak_gpu", "ceiling")
    tests = ("test_norm", "test_gemm", "test_engine", "test_sampling")
    tree(tmp_path, *(f"benchmarks/{name}.py" for name in names), *(f"tests/gpu/{name}.py" for name in tests))
    groups = gpu_check.grouped(gpu_check.steps(gpu_check.PARTS, root=tmp_path))
    assert [[step.name for step in group] for group in groups] == [
        ["C++ kernels"], ["CUDA kernels"], ["test_gemm", "test_norm", "test_sampling"], ["engine"],
        ["kernels_attention"], ["kernels_norm"], ["engine_gpu"], ["idle"], ["poisson"], ["server_gpu"],
        ["soak_gpu", "racecheck test_gemm", "racecheck test_sampling", "memcheck test_gemm", "memcheck test_sampling",
         "racecheck test_norm", "memcheck test_norm"],
    ]
    assert {step.part for group in groups for step in group} == set(gpu_check.PARTS)
    assert [step.name for step in gpu_check.steps(["engine"], root=tmp_path)] == ["engine_gpu"]
    assert "--quick" in gpu_check.steps(["engine"], root=tmp_path)[0].command
    assert "--quick" not in gpu_check.steps(["engine"], gpu_check.FULL, root=tmp_path)[0].command
    assert "--quick" in gpu_check.steps(["server"], root=tmp_path)[0].command
    assert "--quick" not in gpu_check.steps(["server"], root=tmp_path, server_args=())[0].command
    (soak,) = gpu_check.steps(["soak"], root=tmp_path, minutes=2)
    assert soak.limit == 120 + gpu_check.SOAK_ENDS and "--memory" in soak.command
    assert [step.figures for step in gpu_check.steps(["steps", "soak"], root=tmp_path)] == [True] * 3


def test_every_kernel_test_goes_under_both_sanitizers() -> None:
    found = [step.name for step in gpu_check.steps(["sanitizer"])]
    kernels = {path.stem for path in (ROOT / "tests" / "gpu").glob("test_*.py") if gpu_check.ENGINE not in path.read_text()}
    assert sorted(found) == sorted(f"{tool} {name}" for tool in ("memcheck", "racecheck") for name in kernels)
    assert {"racecheck test_attention_prefill", "racecheck test_gemm", "racecheck test_gemm_tile"} <= set(found)
    assert {f"test_{name}" for name in gpu_check.SHARING} <= kernels
    assert all(step.limit <= 85 and step.environ["SANITIZER"] in step.name for step in gpu_check.steps(["sanitizer"]))


def test_a_sanitizer_that_did_not_end_names_the_case(capsys: pytest.CaptureFixture[str]) -> None:
    check = Check(60)
    for name, code, limit in (
        ("hangs", "import time; print('begins t.py::a[1]'); print('begins t.py::b[x]', flush=True); time.sleep(60)", 1.0),
        ("short", "print('begins t.py::a'); print('no time left for b, c'); print('1 passed, 2 skipped in 3 s')", 60.0),
        ("whole", "print('begins t.py::a'); print('1 passed in 3 s')", 60.0),
    ):
        check.run([Step("sanitizer", name, limit, (sys.executable, "-c", code))])
    assert check.failed == ["sanitizer/hangs (out of time in b[x])", "sanitizer/short (no time left for b, c)"]
    assert "whole: ok (1 passed in 3 s)" in capsys.readouterr().out


def test_reports_of_racecheck_are_judged_and_those_of_memcheck_count(capsys: pytest.CaptureFixture[str]) -> None:
    steps = {step.name.partition(" ")[0]: step for step in gpu_check.steps(["sanitizer"], sanitizer=(2025, 3))}
    assert {"--print-limit=0", "--num-cuda-barriers=32", f"--error-exitcode={hazards.FOUND}"} <= set(steps["racecheck"].command)
    assert "--error-exitcode=1" in steps["memcheck"].command
    check = Check(60)
    for tool, name, place, code in (
        ("racecheck", "flag", "attention_decode.cuh:133", 86), ("racecheck", "race", "norm.cu:7", 86),
        ("racecheck", "barrier", "hopper.cuh:80", 86), ("racecheck", "test", "attention_decode.cuh:133", 1),
        ("racecheck", "quiet", "", 0), ("memcheck", "memory", "attention_decode.cuh:133", 86),
    ):
        said = [f"= Error: Race reported between Read access at f+0x1 in {place}",
                "=     and Write access at g+0x2 in x.cuh:1 [3 hazards]"]
        count = f"= RACECHECK SUMMARY: {int(bool(place))} hazards displayed"
        words = "\n".join(["1 passed", *(said if place else []), count])
        command = (sys.executable, "-c", f"print({words!r}); raise SystemExit({code})")
        check.run([Step("sanitizer", name, 60, command, judge=steps[tool].judge)])
    assert check.failed == [
        "sanitizer/race (races: 1, the first between norm.cu:7 and x.cuh:1)", "sanitizer/test (exit code 1)",
        "sanitizer/memory (exit code 86)",
    ]
    assert [note.partition(":")[0] for note in check.notes] == ["flag", "barrier"]
    assert "sanitizer: flag: ok" in capsys.readouterr().out


def test_racecheck_is_left_out_with_a_note_where_it_cannot_judge(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    every = {step.name for step in gpu_check.steps(["sanitizer"])}
    few = {step.name for step in gpu_check.steps(["sanitizer"], sanitizer=(2025, 3, 1))}
    assert every - few == {"racecheck test_gemm_tile", "racecheck test_attention_sm90"} and few < every
    monkeypatch.setattr(gpu_check, "EXTENSIONS", ())
    monkeypatch.setattr(hazards, "version", lambda: (2025, 3, 1, 0))
    monkeypatch.setattr(gpu_check, "steps", lambda *_, sanitizer, **__: [step("good", GOOD)] if sanitizer < (2026,) else [])
    monkeypatch.setattr(gpu_check, "place", lambda *_: gpu_check.LOGS / "results.json")
    assert gpu_check.main(["--only", "sanitizer"]) == 0
    note = "racecheck test_gemm_tile: not judged: compute-sanitizer 2025.3.1 does not follow mbarriers"
    assert f"note: {note}\n" in capsys.readouterr().out
    assert note in json.loads((gpu_check.LOGS / "results.json").read_text())["notes"]


def test_nothing_is_begun_where_something_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    begun = list[list[str]]()
    monkeypatch.setattr(gpu_check, "steps", lambda parts, *_, **__: begun.append(parts) or [])
    monkeypatch.setattr(gpu_check, "EXTENSIONS", ())
    monkeypatch.setattr(gpu_check, "missing", lambda parts: f"no GPU for {' '.join(parts)}.")
    for parts in ("tests", "build,soak"):
        assert gpu_check.main(["--only", parts]) == 1
        said = capsys.readouterr()
        assert said.err == f"gpu-check: no GPU for {parts.replace(',', ' ')}.\n" and said.out == ""
    assert gpu_check.main(["--only", "build"]) == 0, "kernels are built without a GPU"
    assert begun == [["build"]]


def test_a_python_without_pytest_is_told_so() -> None:
    blind = "import importlib.util, sys; sys.modules['pytest'] = sys.modules['torch'] = None; find = importlib.util.find_spec; "
    blind += "importlib.util.find_spec = lambda name: None if name in ('pytest', 'torch') else find(name); "
    code = blind + "sys.path.insert(0, 'scripts'); import gpu_check; sys.exit(gpu_check.main(['--only', 'tests']))"
    done = subprocess.run((sys.executable, "-c", code), cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.endswith(" has no torch and no pytest.\n") and done.stderr.count("\n") == 1


def test_the_server_is_left_out_where_its_packages_are_not() -> None:
    assert gpu_check.default_parts() == (list(gpu_check.PARTS), [])
    parts, notes = gpu_check.default_parts(("json", "no_such_package", "nor_this"))
    assert parts == ["build", "tests", "kernels", "engine", "steps", "soak", "sanitizer"]
    assert notes == ["the part server was left out: there is no no_such_package, no nor_this"]


def test_what_is_left_out_is_noted_and_what_is_asked_for_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = list[list[str]]()

    def steps(parts: list[str], *_: object, **__: object) -> list[Step]:
        asked.append(parts)
        return [step("good", GOOD)]

    monkeypatch.setattr(gpu_check, "steps", steps)
    monkeypatch.setattr(gpu_check, "EXTENSIONS", ())
    find = gpu_check.importlib.util.find_spec
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    words = ["--results", str(tmp_path), "--limit", "60"]
    assert gpu_check.main(words) == 0
    assert "note: the part server was left out: there is no uvicorn" in capsys.readouterr().out
    (kept,) = tmp_path.glob("*.json")
    assert json.loads(kept.read_text())["notes"] == ["the part server was left out: there is no uvicorn"]
    assert gpu_check.main([*words, "--only", "server"]) == 0
    assert "left out" not in capsys.readouterr().out
    assert kept.with_name(f"{kept.stem}-server.json").is_file(), "parts of a run overwrite no whole one"
    assert asked == [[part for part in gpu_check.PARTS if part != "server"], ["server"]]


def test_the_results_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.bench.report.gpus", lambda: ("NVIDIA H100 80GB HBM3", "580.1"))
    check = Check(60, "abc")
    check.run([step("good", GOOD)])
    results = gpu_check.document(check, ["--only", "kernels"])
    assert list(results) == ["machine", "gpu", "driver", "versions", "commit", "date", "command", "figures", "failed", "notes"]
    assert results["commit"] == "abc" and results["command"] == "python scripts/gpu_check.py --only kernels"
    assert gpu_check.place(results, tmp_path).name == f"{results['date'][:10]}-nvidia-h100-80gb-hbm3.json"
    assert gpu_check.place(results, tmp_path, ["soak"]).name == f"{results['date'][:10]}-nvidia-h100-80gb-hbm3-soak.json"
    json.dumps(results)


def test_the_table_names_what_a_figure_is_measured_against() -> None:
    figures = {"a/us": {"value": 3, "unit": "us", "floor": 2, "peer": None}, "b": {"value": 1, "unit": "x"}}
    line = gpu_check.table(figures).splitlines()[0]
    assert line.split() == ["a/us", "3", "us", "floor", "2", "(1.50)"]


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "build,test"])
    assert "unknown part test" in capsys.readouterr().err


# first_of_each.py: inner pytests, with tests that need no GPU

CASES = """
import time, pytest
ROWS = (1, 2, 3)
@pytest.mark.parametrize("n", [1, 2])
def test_a(n): assert ROWS == {rows} and n == 1
@pytest.mark.parametrize("case", ["model", "odd", "small"])
def test_b(case): assert case == "odd"
@pytest.mark.parametrize("vocab", [1, 49152])
def test_greedy_takes_the_best_and_the_lowest_of_equals(vocab): assert vocab == 49152
def test_in_a_graph(): raise AssertionError
def test_a_row_is_the_same_bits(): raise AssertionError
def test_every_wide_cut_is_last():
    {slow}
def test_z(): pass
"""


def sanitized(folder: Path, name: str, code: str, *, tool: str = "racecheck", seconds: float = 60) -> tuple[int, str]:
    """Exit code and output of pytest on one file with the plugin."""
    (folder / name).write_text(code)
    program = f"import sys, pytest, first_of_each; first_of_each.SECONDS = {seconds}; sys.exit(pytest.main(sys.argv[1:]))"
    words = (sys.executable, "-c", program, "-q", "-p", "no:cacheprovider", "-p", "first_of_each", "-o", "addopts=", name)
    environ = {**os.environ, "SANITIZER": tool, "PYTHONPATH": str(ROOT / "scripts")}
    done = subprocess.run(words, cwd=folder, env=environ, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def test_one_of_each_test_function(tmp_path: Path) -> None:
    code, said = sanitized(tmp_path, "test_any.py", CASES.format(rows=(1, 2, 3), slow="pass"))
    assert code == 0 and "5 passed, 6 deselected" in said, said
    begun = [line.rpartition("::")[2] for line in said.splitlines() if line.startswith(first_of_each.BEGINS)]
    assert begun == ["test_a[1]", "test_b[odd]", "test_greedy_takes_the_best_and_the_lowest_of_equals[49152]", "test_z",
                     "test_every_wide_cut_is_last"]
    code, said = sanitized(tmp_path, "test_any.py", CASES.format(rows=(1, 2, 3), slow="pass"), tool="memcheck")
    assert code == 1 and "FAILED test_any.py::test_a_row_is_the_same_bits" in said and "1 failed, 5 passed" in said, said


def test_loops_are_cut_down(tmp_path: Path) -> None:
    rows = first_of_each.LOOPS["test_gemm"]["ROWS"]
    code, said = sanitized(tmp_path, "test_gemm.py", CASES.format(rows=rows, slow="pass"))
    assert code == 0 and "5 passed" in said, said
    assert "test_gemm has no ROWS any more" in sanitized(tmp_path, "test_gemm.py", "def test_a(): pass")[1]


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    endless = "while True: time.sleep(0.01)"
    code, said = sanitized(tmp_path, "test_any.py", CASES.format(rows=(1, 2, 3), slow=endless), seconds=4)
    assert code == 0 and "4 passed, 1 skipped" in said and "no time left for test_every_wide_cut_is_last\n" in said, said
    code, said = sanitized(tmp_path, "test_any.py", "def test_a(): pass\ndef test_b(): pass\n", seconds=-1)
    assert code == 0 and "2 skipped" in said and "no time left for test_a, test_b\n" in said, said


def test_what_the_sanitizers_choose_by_name_is_there() -> None:
    """Names of tests, of cases and of loops follow the tests of kernels."""
    functions, names = set[str](), dict[str, set[str]]()
    for path in (ROOT / "tests" / "gpu").glob("test_*.py"):
        if gpu_check.ENGINE in (text := path.read_text()):
            continue
        body = ast.parse(text).body
        functions |= {node.name for node in body if isinstance(node, ast.FunctionDef)}
        targets = [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
        names[path.stem] = {target.id for target in targets if isinstance(target, ast.Name)}
    assert set(first_of_each.CASES) <= functions
    assert all(set(loops) <= names[module] for module, loops in first_of_each.LOOPS.items())
    words = {*first_of_each.NEVER, *first_of_each.LAST, *(w for some in first_of_each.REPEATS.values() for w in some)}
    assert [word for word in words if not any(word in name for name in functions)] == []


def test_the_cases_for_the_sanitizers_are_there(tmp_path: Path) -> None:
    """Of every function that a case is chosen for by a part of its id, a case has it: collected as on a GPU machine."""
    (tmp_path / "pretended.py").write_text("""
import torch
from octavo import ops
torch.cuda.is_available = lambda: True
torch.cuda.get_device_capability = lambda *_: (9, 0)
torch.cuda.mem_get_info = lambda *_: (80 << 30, 80 << 30)
ops.load_cuda = lambda: None
""")
    files = [path for path in sorted((ROOT / "tests" / "gpu").glob("test_*.py")) if gpu_check.ENGINE not in path.read_text()]
    words = ("-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "-p", "pretended", *map(str, files))
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run((sys.executable, *words), cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    cases = dict[str, list[str]]()
    for line in done.stdout.splitlines():
        name, _, case = line.rpartition("::")[2].partition("[")
        cases.setdefault(name, []).append(f"[{case}")
    assert [name for name, part in first_of_each.CASES.items() if not any(part in case for case in cases[name])] == []
