"""The rules of the code itself: layers, sizes, where private names may stand."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import compiled_optim

PACKAGE = Path(compiled_optim.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Each layer may import the ones after it only.
LAYERS = [
    ("demo", "graphs"),
    ("lr_scheduler.__main__",),
    ("__init__",),
    ("swa_utils",),
    ("lr_scheduler.__init__",),
    ("lr_scheduler.compose", "lr_scheduler.plateau", "lr_scheduler.plot"),
    ("lr_scheduler.schedules", "lr_scheduler.cycles"),
    ("lr_scheduler.symbolic", "lr_scheduler.text"),
    ("lr_scheduler.code",),
    ("testing",),
    ("report",),
    ("lbfgs.__init__",),
    ("lbfgs.optimizer",),
    ("lbfgs.checks",),
    ("lbfgs.history",),
    ("algorithms.__init__",),
    tuple(f"algorithms.{file.stem}" for file in (PACKAGE / "algorithms").glob("*.py") if file.stem != "__init__"),
    ("optimizer",),
    ("attached", "checkpoint"),
    ("in_graph.steps",),
    ("in_graph.rule",),
    ("in_graph.inputs", "in_graph.counts"),
    ("execution",),
    ("launch.plan",),
    ("kernels",),
    ("launch.source",),
    ("trace",),
    ("foreach",),
    ("eager",),
    ("updates",),
    ("checks", "rule", "scalar"),
    ("dtensors", "tensor_list", "references", "memory"),
    ("lower",),
    ("torch_private",),
    ("declare",),
    ("fallback",),
    ("cache.libraries",),
    ("cache.tidy",),
    ("cache.store",),
    ("cache.build",),
    ("cache.trust",),
    ("settings", "process"),
    ("version", "launch.__init__", "cache.__init__", "in_graph.__init__"),
]
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


def imports(file: Path) -> set[str]:
    """The package's modules that a module imports, but for those it needs for annotations only."""
    tree = ast.parse(file.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing_only or not isinstance(node, ast.ImportFrom):
            continue
        base = node.module or ""
        if node.level:
            parts = ["compiled_optim", *name_of(file).split(".")][: -node.level]
            base = ".".join([*parts, base]).rstrip(".")
        if base.split(".")[0] == "compiled_optim":
            module = base.removeprefix("compiled_optim").lstrip(".")
            for alias in node.names:
                full = f"{module}.{alias.name}".lstrip(".")
                found.add(full if full in LEVEL else module if module in LEVEL else f"{module}.__init__".lstrip("."))
    return found


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_downwards(file: Path) -> None:
    upwards = [m for m in imports(file) if LEVEL[m] <= LEVEL[name_of(file)]]
    assert not upwards, f"{name_of(file)} must not import {upwards}"


@pytest.mark.parametrize("file", [*FILES, *PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.h")], ids=lambda f: f.name)
def test_no_file_over_400_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400


def test_private_torch_stands_in_two_files() -> None:
    private = re.compile(r"torch\._(inductor|dynamo|C|utils|subclasses)\b|from torch[\w.]* import _|fx\.experimental")
    code = {f: "\n".join(ast.unparse(n) for n in ast.parse(f.read_text()).body) for f in FILES}
    docs = re.compile(r'""".*?"""|\'\'\'.*?\'\'\'|"[^"\n]*"|\'[^\'\n]*\'', re.S)
    assert [name_of(f) for f, text in code.items() if private.search(docs.sub("", text))] == ["lower", "torch_private"]


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
    assert lines < 7700


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
