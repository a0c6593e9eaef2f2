"""A private part of torch that is gone: the package is imported, steps are eager and outside of graphs, and say why."""

from __future__ import annotations

import ast
import builtins
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import compiled_optim
from compiled_optim import graphs
from compiled_optim._engine.cache.compiler import BuildError
from compiled_optim._engine.kernels import registry
from compiled_optim._engine.kernels.backends import backend_named
from compiled_optim._engine.kernels.trace import trace
from compiled_optim._engine.torch_private import version

PACKAGE = Path(compiled_optim.__file__).parent


FOR_GPUS = {"triton.py", "absent_gpu.py"}  # whose imports only the lowering for a GPU needs
WITH_ANOTHER_WAY = {"streams.py"}


def private_imports(for_gpus: bool = False) -> list[tuple[str, str]]:
    """Each module, and each name in it, that is private to torch, as torch_private/ imports them."""
    found: dict[tuple[str, str], None] = {}
    for file in sorted((PACKAGE / "_engine" / "torch_private").glob("*.py")):
        if (file.name in FOR_GPUS) != for_gpus or file.name in WITH_ANOTHER_WAY:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
                module, name = (alias.name, "") if isinstance(node, ast.Import) else (node.module or "", alias.name)
                if module.startswith("torch") and "._" in f"{module}.{name}":
                    found[module, name] = None
    return [*found]


# In a child for each part, which is missing for this package only: torch itself must go on. Steps are taken in one way
# after the other until the part was asked for.
CHILD = """
import builtins, json, os, sys, warnings
import torch, torch._dynamo, torch._inductor.compile_fx, torch._inductor.async_compile
stock, asked = builtins.__import__, []
def lacking(module, name):
    def find(wanted, globals=None, locals=None, names=(), level=0):
        who = (globals or {}).get("__name__", "")
        if who.startswith("compiled_optim.") and wanted == module and (not name or name in (names or ())):
            asked.append(who)
            raise ImportError(f"cannot import name {name!r} from {module!r}" if name else f"No module named {module!r}")
        return stock(wanted, globals, locals, names, level)
    return find
def step(compiled, graph=False):
    import compiled_optim
    from compiled_optim.declare import number
    class Rule(compiled_optim.Optimizer):  # of which no kernel is kept
        lr: float = number(default=0.5, low=0)
        scalars = staticmethod(lambda h, step: {"lr": h.lr})
        update = staticmethod(lambda p, g, s, k, on: p - g * k.lr)
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Rule([p], compiled=compiled)
    def once(x):
        p.grad = x * 2
        optimizer.step()
    (torch.compile(once, backend="eager") if graph else once)(torch.ones(3))
    assert p.tolist() == [0, 0, 0], p
    (row,) = compiled_optim.explain(optimizer)
    assert row.execution == "eager" or not asked or graph, row
    return row.reason
def average():
    os.environ["COMPILED_OPTIM_DISK_CACHE"] = "0"  # another child may have kept the kernel
    from compiled_optim.swa_utils import AveragedModel
    model = torch.nn.Linear(2, 2)
    def lists(averages, current, count):
        torch._foreach_lerp_(averages, current, 0.25)
    averaged = AveragedModel(model, multi_avg_fn=lists, compiled=True)
    for _ in range(2):
        averaged.update_parameters(model)
    return "an average"
def report(module, name):
    builtins.__import__ = lacking(module, name)
    said = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for compiled, graph in ((False, False), (False, True), (True, False), ("foreach", False)):
            said.append(step(compiled, graph))
            if asked and (compiled or graph):
                break
        if asked == ["compiled_optim._engine.torch_private.dynamo"] and not graph:
            step(False, graph=True)
        if not asked:
            said.append(average())
    return bool(asked), [str(w.message) for w in caught] + said
for module, name in json.loads(sys.argv[1]):
    read, write = os.pipe()
    if os.fork() == 0:
        try:
            facts = report(module, name)
        except BaseException as error:
            facts = True, [f"raised {type(error).__name__}: {error}"]
        os.write(write, json.dumps(facts).encode())
        os._exit(0)
    os.close(write)
    print(json.dumps([module, name, *json.loads(os.fdopen(read).read())]), flush=True)
    os.wait()
"""


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str], tuple[bool, list[str]]]:
    registry.host_module()  # is on disk then
    command = [sys.executable, "-c", CHILD, json.dumps(private_imports())]
    environment = {**os.environ, "COMPILED_OPTIM_STRICT": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = map(json.loads, done.stdout.splitlines())
    return {(module, name): (asked, messages) for module, name, asked, messages in lines}


# the names of torch 2.14 and later, and those before
OTHERS = [{"torch._opaque_base", "register_opaque_type"}, {"torch._custom_class_base", "register_custom_class"}]


@pytest.mark.parametrize(("module", "name"), private_imports(), ids="-".join)
def test_a_missing_part_is_the_reason(module: str, name: str, outcomes: dict) -> None:  # type: ignore[type-arg]
    asked, messages = outcomes[module, name]
    if not asked and {module, name} & OTHERS[version.torch_version() < (2, 14)]:
        pytest.skip("another version of torch has this")
    assert asked, "no step needs this: take it out, or a step that does in here"
    assert not [m for m in messages if m.startswith("raised")]
    assert [m for m in messages if module in m], messages


@pytest.mark.parametrize(("module", "name"), private_imports(for_gpus=True), ids="-".join)
def test_a_part_that_gpus_need_is_named(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    signature = replace(dict(graphs.signatures())["SGD"], backend="sm_90")
    traced = trace(signature, "cuda")
    stock = builtins.__import__

    def lacking(wanted: str, scope: Any = None, *args: Any) -> Any:
        if str((scope or {}).get("__name__")).startswith("compiled_optim.") and wanted == module:
            raise ImportError(f"No module named {module!r}")
        return stock(wanted, scope, *args)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", lacking)
        with pytest.raises(BuildError, match=module):
            backend_named("sm_90").lower(traced)
