"""The label of a tree: proved by contents, with git and without, and `unknown` where nothing can be compared."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))

import tree_commit

RESULT = "benchmarks/results/a.json"


def git(root: Path, *words: str) -> str:
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(("git", *who, "-C", str(root), *words), capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Two commits."""
    root = tmp_path / "checkout"
    (root / "benchmarks" / "results").mkdir(parents=True)
    git(root.parent, "init", "-q", str(root))
    for text in ("one", "two"):
        (root / "ä b.txt").write_text(text)
        (root / RESULT).write_text(text)
        (root / "link").unlink(missing_ok=True)
        (root / "link").symlink_to(text)
        git(root, "add", ".")
        git(root, "commit", "-q", "-m", text)
    return root


def copied(checkout: Path, manifest: str | None) -> Path:
    """The tree without its .git."""
    copy = checkout.parent / "copy"
    shutil.copytree(checkout, copy, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    if manifest is not None:
        (copy / "COMMIT").write_text(manifest)
    return copy


def test_a_checkout(checkout: Path) -> None:
    head, before = (git(checkout, "rev-parse", "--short=12", name) for name in ("HEAD", "HEAD~1"))
    assert tree_commit.label(checkout) == tree_commit.label(checkout, "HEAD") == head
    assert tree_commit.label(checkout, before) == f"{before}-dirty"
    (checkout / "new.txt").write_text("git does not know it")
    (checkout / RESULT).write_text("a run wrote it")
    assert tree_commit.label(checkout) == head
    (checkout / "ä b.txt").write_text("three")
    assert tree_commit.label(checkout) == f"{head}-dirty"


def test_a_copy_is_compared_file_by_file(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "--short=12", "HEAD")
    copy = copied(checkout, tree_commit.manifest(checkout))
    (copy / RESULT).write_text("a run wrote it")
    assert tree_commit.label(copy) == head
    (copy / "ä b.txt").write_text("three")
    assert tree_commit.label(copy) == f"{head}-dirty"
    (copy / "ä b.txt").unlink()
    assert tree_commit.label(copy) == f"{head}-dirty"
    (copy / "ä b.txt").write_text("two")
    assert tree_commit.label(copy) == head
    (copy / "link").unlink()
    (copy / "link").symlink_to("elsewhere")
    assert tree_commit.label(copy) == f"{head}-dirty"


def test_a_manifest_counts_more_than_a_git_of_another_commit(checkout: Path) -> None:
    """A copy that travelled with the .git of yesterday."""
    manifest, head = tree_commit.manifest(checkout), git(checkout, "rev-parse", "--short=12", "HEAD")
    git(checkout, "reset", "-q", "--soft", "HEAD~1")
    assert tree_commit.label(checkout).endswith("-dirty")
    (checkout.parent / "manifest").write_text(manifest)
    assert tree_commit.label(checkout, str(checkout.parent / "manifest")) == head


def test_what_cannot_be_compared_is_unknown(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = copied(checkout, None)
    assert tree_commit.label(copy) == "unknown"
    assert tree_commit.label(copy, "abc") == "unknown, said to be abc"
    (copy / "COMMIT").write_text("def\n")
    assert tree_commit.label(copy) == "unknown, said to be def"
    assert tree_commit.label(checkout, "abc") == "unknown, said to be abc"
    with pytest.raises(SystemExit, match="no checkout"):
        tree_commit.manifest(copy)
    monkeypatch.setenv("PATH", "")
    assert tree_commit.label(checkout) == "unknown"
