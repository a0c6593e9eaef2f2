"""The seven floors of the package: what stands on one knows nothing above it, annotations included."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import compiled_optim

PACKAGE = Path(compiled_optim.__file__).parent
# From the top; a name stands for a module or for all of a folder.
FLOORS = {
    "front": (
        *(
            "",
            "__main__",
            "demo",
            "functional",
            "graphs",
            "inspection",
            "integrations",
            "report",
            "stateless",
            "testing",
        ),
        # the import paths of torch.optim
        *("adadelta", "adagrad", "adam", "adamax", "adamw", "asgd"),
        *("nadam", "radam", "rmsprop", "rprop", "sgd", "sparse_adam"),
    ),
    "wings": ("algorithms", "lbfgs", "lr_scheduler", "swa_utils"),
    "optimizer": ("optimizer", "around_step", "attached", "backward"),
    "in graphs": ("_engine.in_graph",),
    "executions": ("_engine.executions",),
    "kernels": ("_engine.kernels",),
    "ground": ("_engine", "declare", "version"),
}


def name_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def floor_of(module: str) -> int:
    """The height of the floor whose longest name fits."""
    found = [
        (len(name), height)
        for height, names in enumerate(reversed(FLOORS.values()))
        for name in names
        if module == name or (name and module.startswith(f"{name}."))
    ]
    return max(found)[1]


def imports(module: str) -> set[str]:
    """The modules of the package that one imports: anywhere in it, for annotations too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import hides which floor it reaches for"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "compiled_optim":
                inner = name.removeprefix("compiled_optim").lstrip(".")
                found.add(inner if inner in MODULES else inner.rpartition(".")[0])
    return found - {module}


def test_every_module_stands_on_a_floor() -> None:
    assert {floor_of(module) for module in MODULES} == set(range(len(FLOORS)))


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m or "__init__")
def test_imports_point_downwards(module: str) -> None:
    upwards = [other for other in imports(module) if floor_of(other) > floor_of(module)]
    assert not upwards, f"{module} stands below {upwards} and must not know them"


def test_no_circle() -> None:
    sorter = TopologicalSorter({module: imports(module) for module in MODULES})
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(f"these import each other: {' -> '.join(error.args[1])}")
