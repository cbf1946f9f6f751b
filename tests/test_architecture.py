"""The shape of octavo, kept by tests: imports run downhill, no circles, short files, one door to the kernels."""

import ast
import graphlib
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[1] / "octavo"
RANK = {
    name: rank
    for rank, names in enumerate([
        "absent errors log config params outputs plan messages", "ops", "parallel", "layers", "models", "worker",
        "engine text", "llm async_llm server client bench", "cli commands", "__init__ __main__",
    ])
    for name in names.split()
}
FILES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
NO_TORCH = ("engine", "absent", "errors", "log", "config", "params", "outputs", "plan", "messages", "cli", "bench", "client")


def imports(tree: ast.AST) -> set[str]:
    """Modules of octavo imported anywhere in the file, function bodies included."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    names = {name.removeprefix("octavo.") for name in found if name.startswith("octavo.")}
    return {name for name in names | {f"{name}.__init__" for name in names} if name in FILES}


def top_level(tree: ast.Module) -> set[str]:
    """First names of what a file imports when it is loaded (TYPE_CHECKING blocks and functions left out)."""
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


GRAPH = {name: imports(tree) for name, tree in TREES.items()}


def rank(name: str) -> int:
    return RANK[name.split(".")[0]]


def test_every_file_has_a_rank() -> None:
    assert {name.split(".")[0] for name in FILES} <= set(RANK)


def test_imports_run_downhill() -> None:
    up = [f"{a} imports {b}" for a, bs in GRAPH.items() for b in bs if rank(b) > rank(a)]
    assert not up, up


def test_no_circles() -> None:
    graphlib.TopologicalSorter(GRAPH).prepare()  # raises CycleError with the circle


def test_only_library_touches_the_extension() -> None:
    bad = [n for n, p in FILES.items() if re.search(r"\b_C\b", p.read_text()) and n != "ops.library"]
    assert not bad, bad


def test_files_are_short_and_open_with_a_paragraph() -> None:
    long = [(n, k) for n, p in FILES.items() if (k := len(p.read_text().splitlines())) > 400]
    mute = [n for n, p in FILES.items() if p.stat().st_size and not ast.get_docstring(TREES[n])]
    assert not long and not mute, (long, mute)


def test_the_engine_and_the_words_know_no_torch() -> None:
    bad = [n for n, tree in TREES.items() if n.split(".")[0] in NO_TORCH and "torch" in top_level(tree)]
    assert not bad, bad


def test_functions_import_only_where_it_is_agreed() -> None:
    """Inside functions: heavy optional libraries and what the commands need; nothing else of octavo."""
    bad = []
    for name, tree in TREES.items():
        if rank(name) >= RANK["cli"]:
            continue
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef):
                bad += [f"{name}.{function.name} imports {module}" for module in imports(function)]
    assert not bad, bad


def test_folders_have_empty_init_files() -> None:
    full = [n for n, p in FILES.items() if n.endswith(".__init__") and p.stat().st_size and n != "ops.__init__"]
    assert not full, full


def test_no_file_without_a_subject() -> None:
    assert not [n for n in FILES if n.rsplit(".", 1)[-1] in {"utils", "helpers", "common", "misc"}]
