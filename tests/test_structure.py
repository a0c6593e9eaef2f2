"""The rules of the code itself: layers, sizes, where private names may stand."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import compiled_optim

PACKAGE = Path(compiled_optim.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


@pytest.mark.parametrize("file", [*FILES, *PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.h")], ids=lambda f: f.name)
def test_no_file_over_400_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400


def test_private_torch_stands_in_one_folder() -> None:
    private = re.compile(r"torch\._(inductor|dynamo|C|utils|subclasses)\b|from torch[\w.]* import _|fx\.experimental")
    code = {f: "\n".join(ast.unparse(n) for n in ast.parse(f.read_text()).body) for f in FILES}
    docs = re.compile(r'""".*?"""|\'\'\'.*?\'\'\'|"[^"\n]*"|\'[^\'\n]*\'', re.S)
    found = {name_of(f.parent) for f, text in code.items() if private.search(docs.sub("", text))}
    assert found == {"_engine.torch_private"}


def code_lines(file: Path) -> int:
    """Lines that are neither blank nor comment nor docstring."""
    lines = file.read_text().splitlines()
    documentation: set[int] = set()
    if file.suffix == ".py":
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                documentation.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return sum(
        bool(line.strip()) and not line.strip().startswith(("#", "//")) and number not in documentation
        for number, line in enumerate(lines, 1)
    )


def test_size_of_the_package() -> None:
    files = [*FILES, *PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.h")]
    lines = sum(code_lines(file) for file in files if file.name != "demo.py")
    print(f"{lines} lines of code")
    assert lines < 7850


@pytest.mark.parametrize("name", compiled_optim.algorithms.__all__)
def test_an_algorithm_is_short(name: str) -> None:
    source = (PACKAGE / "algorithms").rglob("*.py")
    (body,) = [
        ast.get_source_segment(text, node) or ""
        for text in (f.read_text() for f in source)
        for node in ast.parse(text).body
        if isinstance(node, ast.ClassDef) and node.name == name
    ]
    assert sum(bool(line.strip()) for line in body.splitlines()) <= 50
