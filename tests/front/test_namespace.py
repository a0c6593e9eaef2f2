"""``compiled_optim`` offers what ``torch.optim`` of the installed torch offers, under the same paths."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import compiled_optim

# Modules that torch gained or gave a public name in the versions that are supported.
SUBMODULES = sorted({m.name for m in pkgutil.iter_modules(torch.optim.__path__) if m.name[0] != "_"} | {"functional"})
# Not in __all__, and in scripts all the same.
OLD_NAMES = {
    "lr_scheduler": ["EPOCH_DEPRECATION_WARNING", "_LRScheduler"],
    "optimizer": ["ParamsT", "required", "StateDict", "_RequiredParameter", "_use_grad_for_differentiable"],
    "swa_utils": ["PARAM_LIST"],
}
ANNOTATIONS = {"OptimizerPreHook", "OptimizerPostHook"}  # of Optimizer, which are no methods


def public_names(module: ModuleType) -> list[str]:
    return [*getattr(module, "__all__", ())]


def counterparts() -> Iterator[tuple[str, Any, Any]]:
    """Each public name of torch.optim with torch's object and ours, None for one that is missing."""
    for path in ("", *SUBMODULES):
        try:
            theirs = importlib.import_module(f"torch.optim.{path}".rstrip("."))
        except ModuleNotFoundError:  # this torch is older
            continue
        ours = importlib.import_module(f"compiled_optim.{path}".rstrip("."))
        names = {*public_names(theirs), *OLD_NAMES.get(path, ())} | ({*dir(theirs)} if not path else set())
        for name in sorted(names):
            if name[:2] != "__" and not (not path and name[0] == "_"):
                yield f"{path}.{name}".lstrip("."), getattr(theirs, name), getattr(ours, name, None)


NAMES = {name: (theirs, ours) for name, theirs, ours in counterparts()}
CLASSES = {name: pair for name, pair in NAMES.items() if inspect.isclass(pair[0])}
FUNCTIONS = {name: pair for name, pair in NAMES.items() if inspect.isfunction(pair[0])}


def parameters(function: Any) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values()]


def test_no_public_name_is_missing() -> None:
    assert not [name for name, (_, ours) in NAMES.items() if ours is None]


def test_import_paths() -> None:
    """In a process that has imported nothing else, both ways to write it."""
    lines = []
    for path in SUBMODULES:
        module = f"compiled_optim.{path}"
        names = public_names(importlib.import_module(module)) or ["Optimizer"]
        lines += [f"import {module} as module", f"from {module} import {', '.join(names)}"]
        lines += [f"assert module is compiled_optim.{path}, {path!r}"]
    program = "\n".join(["import compiled_optim", *lines])
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)


@pytest.mark.parametrize("name", CLASSES)
def test_methods_and_their_parameters(name: str) -> None:
    theirs, ours = CLASSES[name]
    missing = {}
    for method, function in inspect.getmembers(theirs, callable):
        if (method[0] == "_" and method != "__init__") or method in ANNOTATIONS:
            continue
        mine = getattr(ours, method, None)
        lacks = None if mine is None else [p for p in parameters(function) if p not in parameters(mine)]
        if mine is None or lacks:
            missing[method] = lacks
    assert not missing


@pytest.mark.parametrize("name", CLASSES)
def test_positional_arguments_stand_where_torchs_stand(name: str) -> None:
    theirs, ours = (
        [p.name for p in inspect.signature(cls).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
        for cls in CLASSES[name]
    )
    assert ours[: len(theirs)] == theirs


@pytest.mark.parametrize("name", [n for n, (theirs, _) in CLASSES.items() if issubclass(theirs, torch.optim.Optimizer)])
def test_every_optimizer_is_an_optimizer(name: str) -> None:
    assert issubclass(CLASSES[name][1], compiled_optim.Optimizer)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_parameters_of_functions(name: str) -> None:
    theirs, ours = FUNCTIONS[name]
    assert parameters(ours) == parameters(theirs)


def test_what_newer_torch_has_is_offered_on_all_versions() -> None:
    for name in ("functional", "swap_in_optimizer_params_and_state"):
        assert name in dir(compiled_optim)
        assert getattr(compiled_optim, name) is not None
