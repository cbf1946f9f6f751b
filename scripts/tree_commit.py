"""Which commit a tree holds, for results that are measured where git may not be.

    python scripts/tree_commit.py > COMMIT    # where git is: the commit's name, and git's id of every file in it
    make gpu-check                            # in a copy of the tree: finds COMMIT, and compares every file with its id

Owns the label of a tree: the commit's name where every file is as it is there, `-dirty` behind it where one differs or is
missing, and `unknown` where nothing can be compared. What git does not track is not looked at, nor is benchmarks/results, which
runs write. Invariant: a label without `-dirty` and `unknown` was proved by comparing contents, never taken from a name alone.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WRITTEN = "benchmarks/results/"  # by the runs themselves
UNKNOWN = "unknown"


def label(root: Path = ROOT, stated: str | None = None) -> str:
    """The label of a tree.

    Args:
        stated: a commit's name, or a file with what ``manifest`` gave; without it the file COMMIT counts, else git's HEAD.
    """
    path = root / "COMMIT" if stated is None else Path(stated)
    if path.is_file():
        stated, _, lines = path.read_text(encoding="utf-8").partition("\n")
        if lines.strip():
            return stated + ("-dirty" if differs(root, lines.splitlines()) else "")
        # a file with nothing but a name proves nothing
    name = _git(root, "rev-parse", "--short=12", f"{stated or 'HEAD'}^{{commit}}") if (root / ".git").exists() else None
    if name is None:
        return f"{UNKNOWN}, said to be {stated}" if stated else UNKNOWN
    same = _git(root, "diff", "--quiet", name, "--", ".", f":(exclude){WRITTEN}*") is not None
    return name if same else f"{name}-dirty"


def manifest(root: Path = ROOT) -> str:
    """The name of HEAD, then a line for each file as ``git ls-tree -r`` prints it: mode, type, id and path."""
    name, lines = _git(root, "rev-parse", "--short=12", "HEAD"), _git(root, "ls-tree", "-r", "HEAD")
    if name is None or lines is None:
        raise SystemExit(f"{root} is no checkout of git: there is no commit to name")
    return f"{name}\n{lines}\n"


def differs(root: Path, lines: list[str]) -> list[str]:
    """Paths of a manifest whose content is not what it was there."""
    found = []
    for line in lines:
        what, _, path = line.partition("\t")
        mode, kind, name = what.split()
        if kind == "blob" and not path.startswith(WRITTEN) and _id(root / path, mode == "120000") != name:
            found.append(path)
    return found


def _id(path: Path, is_link: bool) -> str | None:
    """git's id of a file's content; None for one that is not there."""
    try:
        content = os.readlink(path).encode() if is_link else path.read_bytes()
    except OSError:
        return None
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _git(root: Path, *words: str) -> str | None:
    """What a command of git printed; None when it failed or there is no git."""
    try:
        command = ("git", "-c", "core.quotepath=off", "-C", str(root), *words)
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.rstrip("\n")
    except (OSError, subprocess.SubprocessError):
        return None


if __name__ == "__main__":
    sys.stdout.write(manifest())
