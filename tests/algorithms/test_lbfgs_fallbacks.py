"""LBFGS where it is not compiled, what `explain` says of it, and fresh processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from beside_torch import executions
from minimizing import assert_alike, initial, least_squares, network, pair

from compiled_optim import CompileError, CompileFallbackWarning, explain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_step_eagerly(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(least_squares, True, initial(least_squares, dtype), max_iter=5)
    for _ in range(2):
        with pytest.raises(CompileError, match="it is compiled for float32 and float64 on the CPU"):
            ours.step()
    assert_alike(ours, theirs, 0)
    assert not ours.optimizer.state
    monkeypatch.setenv("COMPILED_OPTIM_STRICT", "0")
    with pytest.warns(CompileFallbackWarning, match=f"{dtype} on cpu; build the optimizer with compiled=False"):
        ours.step()
    ours.step()  # no second warning: it would be an error
    theirs.step(2)
    assert_alike(ours, theirs, 0)
    (row,) = explain(ours.optimizer)
    assert row.execution == "eager"
    assert str(dtype) in row.reason


SWITCHES = {"COMPILED_OPTIM_DISABLE": "COMPILED_OPTIM_DISABLE=1", "TORCH_COMPILE_DISABLE": "TORCH_COMPILE_DISABLE=1"}


@pytest.mark.parametrize("variable", SWITCHES)
def test_switched_off_and_on_between_steps(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(network, compiled=True, max_iter=5)
    seen = []
    for value in ("0", "1", "0"):
        monkeypatch.setenv(variable, value)
        ours.step()
        theirs.step()
        seen.append(executions(ours.optimizer))
    assert seen == [{"lbfgs": ""}, {"eager": SWITCHES[variable]}, {"lbfgs": ""}]
    assert_alike(ours, theirs)


def test_explain() -> None:
    run, _ = pair(network, compiled=True)
    assert executions(run.optimizer) == {"eager": "no step was taken yet"}
    run.step()
    (row,) = explain(run.optimizer)
    assert (row.execution, row.device, row.dtype, row.tensors, row.elements) == ("lbfgs", "cpu", "float64", 4, 66)
    assert row.kernel == "lbfgs_float64"
    assert row.origin in ("compiled", "disk", "memory")
    eager, _ = pair(network, compiled=False)
    assert executions(eager.optimizer) == {"eager": "compiled=False"}


SCRIPT = """
import json, os, sys, torch, warnings
from compiled_optim import LBFGS, explain
def train(n):
    p = torch.nn.Parameter(torch.linspace(0, 1, n))
    optimizer = LBFGS([p], lr=0.1, max_iter=5, compiled=True)
    def closure():
        p.grad = p.detach() * p.detach()
        return p.detach()[-1]
    optimizer.step(closure)
    return optimizer.step(closure).item(), optimizer
"""


def run_script(code: str, **environment: str) -> Any:
    command = [sys.executable, "-W", "error", "-c", SCRIPT + code]
    result = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=1200, check=False
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_without_a_compiler(tmp_path: Path) -> None:
    code = """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loss, optimizer = train(10)
(row,) = explain(optimizer)
print(json.dumps([[str(w.message) for w in caught], row.execution, row.reason]))
"""
    missing = {"CXX": "/nonexistent/c++", "PATH": "", "COMPILED_OPTIM_STRICT": "0"}
    messages, execution, reason = run_script(code, COMPILED_OPTIM_CACHE_DIR=str(tmp_path / "cache"), **missing)
    assert len(messages) == 1
    assert "the optimizer steps eagerly: no C++ compiler" in messages[0]
    assert (execution, reason in messages[0]) == ("eager", True)


def test_a_warm_start_and_a_fork(tmp_path: Path) -> None:
    """The child must do with one thread, for OpenMP's do not survive a fork: the same, to within rounding."""
    code = """
loss, optimizer = train(10_000)
modules = [m for m in ("torch._inductor", "torch._dynamo") if m in sys.modules]
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, json.dumps(train(10_000)[0]).encode())
    os._exit(0)
child = json.loads(os.read(read, 100))
print(json.dumps([explain(optimizer).rows[0].origin, modules, loss, child]))
"""
    results = [run_script(code, COMPILED_OPTIM_CACHE_DIR=str(tmp_path / "cache")) for _ in range(2)]
    assert [origin for origin, *_ in results] == ["compiled", "disk"]
    for _, modules, loss, child in results:
        assert modules == []
        assert child == pytest.approx(loss, rel=1e-5)
