"""The order, the limits and the results of `make gpu-check`, with commands that need no GPU."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import gpu_check
from gpu_check import Check, Step

GOOD = """print('words'); print('{"a/us": {"value": 3, "unit": "us", "floor": 2}}')"""
NOTED = """print('{"figures": {"b/tok_s": {"value": 5, "unit": "tok/s"}}, "notes": ["c did not fit"]}')"""


@pytest.fixture(autouse=True)
def logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path / "logs")
    (tmp_path / "logs").mkdir()


def step(name: str, code: str, limit: int = 60, figures: bool = True) -> Step:
    return Step("kernels", name, limit, (sys.executable, "-c", code), figures=figures)


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
    assert check.notes == ["c did not fit"]
    said = capsys.readouterr().out
    assert "    why" in said and "exits: exit code 3" in said and "hangs: out of time" in said and "mute: its last line" in said


def test_no_step_outlives_the_whole() -> None:
    check = Check(2)
    check.run([step("first", "import time; time.sleep(60)"), step("second", "import time; time.sleep(60)")])
    check.run([step("third", GOOD)])
    assert check.failed == ["kernels/first", "kernels/second", "kernels/third"] and not check.figures


def test_parts_and_their_order(tmp_path: Path) -> None:
    benchmarks = ("kernels_norm", "kernels_attention", "engine_gpu", "server_gpu", "ceiling")
    tests = ("test_norm", "test_gemm", "test_engine")
    for name in (*(f"benchmarks/{name}.py" for name in benchmarks), *(f"tests/gpu/{name}.py" for name in tests)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("from support import DEVICE\n" if "test_engine" in name else "")
    groups = gpu_check.grouped(gpu_check.steps(gpu_check.PARTS, root=tmp_path))
    assert [[step.name for step in group] for group in groups] == [
        ["C++ kernels"], ["CUDA kernels"], ["test_gemm", "test_norm"], ["engine"],
        ["kernels_attention"], ["kernels_norm"], ["engine_gpu"], ["server_gpu"],
        ["memcheck test_gemm", "memcheck test_norm", "racecheck test_gemm", "racecheck test_norm"],
    ]
    assert [step.name for step in gpu_check.steps(["engine"], root=tmp_path)] == ["engine_gpu"]
    assert "--quick" in gpu_check.steps(["engine"], root=tmp_path)[0].command
    assert "--quick" not in gpu_check.steps(["engine"], gpu_check.FULL, root=tmp_path)[0].command
    assert "--quick" in gpu_check.steps(["server"], root=tmp_path)[0].command
    assert "--quick" not in gpu_check.steps(["server"], root=tmp_path, server_args=())[0].command


def test_the_server_is_left_out_where_its_packages_are_not() -> None:
    assert gpu_check.default_parts() == (list(gpu_check.PARTS), [])
    parts, notes = gpu_check.default_parts(("json", "no_such_package", "nor_this"))
    assert parts == ["build", "tests", "kernels", "engine", "sanitizer"]
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
    assert asked == [[part for part in gpu_check.PARTS if part != "server"], ["server"]]


def test_the_results_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("octavo.bench.report.gpus", lambda: ("NVIDIA H100 80GB HBM3", "580.1"))
    check = Check(60)
    check.run([step("good", GOOD)])
    results = gpu_check.document(check, "abc", ["--only", "kernels"])
    assert list(results) == ["machine", "gpu", "driver", "versions", "commit", "date", "command", "figures", "failed", "notes"]
    assert results["commit"] == "abc" and results["command"] == "python scripts/gpu_check.py --only kernels"
    assert gpu_check.place(results, tmp_path).name == f"{results['date'][:10]}-nvidia-h100-80gb-hbm3.json"
    json.dumps(results)


def test_the_table_names_what_a_figure_is_measured_against() -> None:
    figures = {"a/us": {"value": 3, "unit": "us", "floor": 2, "peer": None}, "b": {"value": 1, "unit": "x"}}
    line = gpu_check.table(figures).splitlines()[0]
    assert line.split() == ["a/us", "3", "us", "floor", "2", "(1.50)"]


def test_unknown_parts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_check.main(["--only", "build,test"])
    assert "unknown part test" in capsys.readouterr().err


def test_one_of_each_test_function() -> None:
    import first_of_each

    class Item:
        def __init__(self, nodeid: str) -> None:
            self.nodeid = nodeid

    class Config:
        dropped: tuple[str, ...] = ()

        @property
        def hook(self) -> "Config":
            return self

        def pytest_deselected(self, items: list[Item]) -> None:
            self.dropped = tuple(item.nodeid for item in items)

    names = ("f.py::a[1]", "f.py::a[2-[]]", "f.py::b", "g.py::a[model]", "g.py::a[odd]", "g.py::a[small]")
    items, config = [Item(name) for name in names], Config()
    first_of_each.pytest_collection_modifyitems(config, items)
    assert [item.nodeid for item in items] == ["f.py::a[1]", "f.py::b", "g.py::a[odd]"]
    assert config.dropped == ("f.py::a[2-[]]", "g.py::a[model]", "g.py::a[small]")


def test_nothing_begins_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    import first_of_each

    first_of_each.pytest_runtest_setup(None)
    monkeypatch.setattr(first_of_each, "SECONDS", -1)
    with pytest.raises(pytest.skip.Exception):
        first_of_each.pytest_runtest_setup(None)
