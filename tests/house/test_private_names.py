"""Private names of torch stand in `_engine/torch_private/`, and in the short list below with a reason for each."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
import torch
from test_floors import MODULES

# By module or folder. ``torch._foreach_*`` may stand anywhere: torch.optim's own documentation is what keeps it stable.
ALLOWED = {
    "_engine.executions.state": {"._version"},  # whether a tensor was written
    "_engine.in_graph.counts": {"._version"},
    # what torch's LBFGS is made of, which ours overrides or calls
    "lbfgs": {
        *("._add_grad", "._clone_param", "._directional_evaluate", "._gather_flat_grad"),
        *("._numel_cache", "._params", "._set_param"),
    },
    "attached": {"._last_lr"},  # what a scheduler of torch has set
    # what torch's schedulers keep and step by
    "lr_scheduler": {
        *("._get_closed_form_lr", "._get_lr_called_within_step", "._initial_step", "._is_initial"),
        *("._last_lr", "._step_count", "._update_lr"),
        "torch.optim.lr_scheduler._LRScheduler",  # which scripts import under this name
    },
}
# Private attributes of the objects that an optimizer is given or overrides.
OBJECTS = (
    torch.zeros(0),
    torch.zeros(0).untyped_storage(),
    torch.nn.Module(),
    torch.optim.SGD([torch.zeros(1, requires_grad=True)]),
    torch.optim.LBFGS([torch.zeros(1, requires_grad=True)]),
    torch.optim.lr_scheduler.ExponentialLR(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0), 0.9),
)
ATTRIBUTES = {name for value in OBJECTS for name in (*dir(value), *vars(type(value)))} - {*dir(object())}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def defined(tree: ast.Module) -> Iterator[str]:
    """The methods of a module's classes and the attributes that these assign."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr


def private_names(tree: ast.Module, *, in_engine: bool) -> Iterator[str]:
    """The private names of torch that a module imports, or reads from what it imported or was given.

    Outside of the engine, where classes derive from those of torch, what they define counts too.
    """
    known = {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                path = f"{node.module}.{alias.name}"
                known[alias.asname or alias.name] = path
                if any(map(is_private, path.split("."))):
                    yield path
    own = {*defined(tree)} if in_engine else set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not is_private(node.attr):
            continue
        path = ast.unparse(node.value)
        root = path.split(".")[0]
        if root in known and path.replace(".", "").isidentifier():
            yield f"{known[root]}{path.removeprefix(root)}.{node.attr}"
        elif node.attr in ATTRIBUTES - own:
            yield f".{node.attr}"


FOUND = {
    module: {
        name
        for name in private_names(ast.parse(file.read_text()), in_engine=module.startswith("_engine"))
        if not name.startswith("torch._foreach_")
    }
    for module, file in MODULES.items()
    if not module.startswith("_engine.torch_private")
}


def allowed(module: str) -> set[str]:
    return ALLOWED.get(module) or ALLOWED.get(module.rpartition(".")[0], set())


@pytest.mark.parametrize("module", FOUND, ids=lambda m: m or "__init__")
def test_private_names_of_torch(module: str) -> None:
    assert FOUND[module] <= allowed(module)


@pytest.mark.parametrize("place", ALLOWED)
def test_each_exception_is_needed(place: str) -> None:
    found = [names for module, names in FOUND.items() if place in (module, module.rpartition(".")[0])]
    assert set().union(*found) == ALLOWED[place]
