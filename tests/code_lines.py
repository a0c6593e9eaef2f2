"""Counts the lines of code of the package: without blank lines, comments and docstrings.

    python tests/code_lines.py [REVISION]

prints them by folder, with the difference to a revision (default: the last commit).
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
SUFFIXES = (".py", ".cpp", ".h")


def code_lines(text: str, suffix: str) -> int:
    """The lines of a file that are neither blank nor comment nor docstring."""
    documentation: set[int] = set()
    if suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                documentation.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return sum(
        bool(line.strip()) and not line.strip().startswith(("#", "//")) and number not in documentation
        for number, line in enumerate(text.splitlines(), 1)
    )


def by_folder(files: Iterator[tuple[Path, str]]) -> Counter[str]:
    """The lines of code in each folder of the package; the demo is not counted."""
    lines: Counter[str] = Counter()
    for path, text in files:
        if path.suffix in SUFFIXES and path.name != "demo.py":
            lines[str(path.parent)] += code_lines(text, path.suffix)
    return lines


def in_working_tree() -> Iterator[tuple[Path, str]]:
    for path in sorted((ROOT / "compiled_optim").rglob("*")):
        if path.suffix in SUFFIXES:
            yield path.relative_to(ROOT), path.read_text()


def at_revision(revision: str) -> Iterator[tuple[Path, str]]:
    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout

    for name in git("ls-tree", "-r", "--name-only", revision, "compiled_optim").splitlines():
        if Path(name).suffix in SUFFIXES:
            yield Path(name), git("show", f"{revision}:{name}")


def main() -> None:
    revision = sys.argv[1] if len(sys.argv) > 1 else "HEAD~1"
    now = by_folder(in_working_tree())
    try:
        before = by_folder(at_revision(revision))
    except subprocess.CalledProcessError:  # a shallow checkout has no commit before
        before = now
    print(f"lines of code, and the difference to {revision}")
    for folder in sorted(now | before):
        print(f"{now[folder]:6} {now[folder] - before[folder]:+5}  {folder}")
    print(f"{now.total():6} {now.total() - before.total():+5}  in all")


if __name__ == "__main__":
    main()
