"""The rules of the code itself: sizes and budgets."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from code_lines import by_folder, in_working_tree

import compiled_optim

PACKAGE = Path(compiled_optim.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


@pytest.mark.parametrize("file", [*FILES, *PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.h")], ids=lambda f: f.name)
def test_no_file_over_400_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400


# A number that rises is argued in the commit that raises it.
BUDGETS = {
    "compiled_optim": 1850,
    "compiled_optim/_engine": 1180,
    "compiled_optim/_engine/cache": 640,
    "compiled_optim/_engine/executions": 2770,
    "compiled_optim/_engine/in_graph": 470,
    "compiled_optim/_engine/kernels": 1030,
    "compiled_optim/_engine/kernels/backends": 530,
    "compiled_optim/_engine/kernels/host": 2500,
    "compiled_optim/_engine/torch_private": 750,
    "compiled_optim/algorithms": 590,
    "compiled_optim/integrations": 60,
    "compiled_optim/lbfgs": 640,
    "compiled_optim/lr_scheduler": 1280,
    "compiled_optim/swa_utils": 510,
}


def test_each_folder_keeps_its_budget() -> None:
    lines = by_folder(in_working_tree())
    assert set(lines) == set(BUDGETS)
    assert not {folder: n for folder, n in lines.items() if n > BUDGETS[folder]}


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
