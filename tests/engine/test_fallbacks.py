"""What happens when a step cannot be compiled, or was told not to be: warnings, ``explain``, strict mode, the log."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from beside_torch import MATRICES, assert_equal, executions, parameters, train

import compiled_optim
from compiled_optim import (
    Adam,
    AdamW,
    CompileError,
    CompileFallbackWarning,
    Optimizer,
    cache_clear,
    cache_info,
    explain,
)
from compiled_optim._engine.executions import dispatch
from compiled_optim._engine.kernels import gradients, registry
from compiled_optim._engine.kernels.backends import cpu
from compiled_optim.declare import buffer, number

lenient = pytest.mark.usefixtures("lenient")


def warned(steps: int, *runs: tuple[torch.optim.Optimizer, list[Any]]) -> list[str]:
    """The fallback warnings of some steps; any other warning is an error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("error")
        warnings.simplefilter("always", CompileFallbackWarning)
        train(steps, *runs)
    return [str(w.message) for w in caught]


def refused_untouched(optimizer: Optimizer, params: list[Any], match: str) -> None:
    """Twice, for the first error must not count as a warning that was given."""
    before = [p.detach().clone() for p in params], copy.deepcopy([{**s} for s in optimizer.state.values()])
    for _ in range(2):
        with pytest.raises(CompileError, match=match) as caught:
            train(1, (optimizer, params))
        assert "COMPILED_OPTIM_STRICT=1" in str(caught.value)
    now = [p.detach() for p in params], [{**s} for s in optimizer.state.values()]
    torch.testing.assert_close(now, before, rtol=0, atol=0)


# ---- nothing can be compiled: the optimizer steps eagerly, and says so once


def no_compiler(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    monkeypatch.setenv("PATH", "")


def no_named_compiler(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(directory))


VERSION = 'test "$1" = --version && echo "g++ 13.2.0" && exit 0'


def failing_compiler(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    scripted(monkeypatch, directory, VERSION, "echo the compiler is broken >&2", "exit 3")


def unusable_compiler(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    scripted(monkeypatch, directory, "exit 3")


def silent_compiler(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    scripted(monkeypatch, directory, "exit 0")


def useless_compiler(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    scripted(monkeypatch, directory, VERSION, "exit 0")


def scripted(monkeypatch: pytest.MonkeyPatch, directory: Path, *lines: str) -> None:
    script = directory / "c++"
    script.write_text("\n".join(["#!/bin/sh", *lines, ""]))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))


def newer_torch(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setattr(torch, "__version__", "9.1.0+cpu")


def older_torch(monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    monkeypatch.setattr(torch, "__version__", "2.10.0")


# what is said of a compiler without a version depends on whether Inductor has asked another one before
BROKEN = {
    no_compiler: ["no C++ compiler", "/nonexistent/c++", "install g++"],
    no_named_compiler: ["no C++ compiler", "install g++"],
    failing_compiler: ["failed with status 3", "the compiler is broken", "compiled=False"],
    unusable_compiler: ["compiled=False"],
    silent_compiler: ["compiled=False"],
    useless_compiler: ["wrote no library", "compiled=False"],
    newer_torch: ["torch 9.1.0+cpu is not known to work", "2.11", "install"],
    older_torch: ["torch 2.10.0 is not known to work", "install"],
}


@pytest.fixture(params=BROKEN, ids=lambda f: f.__name__)
def words(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """An installation that cannot compile; what the warning must say."""

    registry.host_module()  # is kept
    monkeypatch.setenv("COMPILED_OPTIM_CACHE_DIR", str(tmp_path / "cache"))
    cache_clear()
    request.param(monkeypatch, tmp_path)
    yield BROKEN[request.param]
    cache_clear()


@lenient
def test_a_norm_that_cannot_be_compiled_is_torchs(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "_passes", None)
    ours, stock = parameters(2)
    mine, theirs = AdamW(ours, lr=0.1, compiled=True, max_grad_norm=0.1), torch.optim.AdamW(stock, lr=0.1)
    theirs.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(stock, 0.1) and None)
    (message,) = warned(3, (mine, ours), (theirs, stock))
    assert all(word in message for word in words)
    assert_equal(ours, stock)
    assert [*executions(mine)] == ["eager"]


@lenient
def test_it_falls_back_with_one_warning(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ours, stock = parameters(2)
    mine = AdamW(ours, lr=0.1, compiled=True)
    messages = warned(4, (mine, ours), (torch.optim.AdamW(stock, lr=0.1), stock))
    assert_equal(ours, stock)
    assert len(messages) == 1
    reason = executions(mine)["eager"]
    assert [w for w in words if w not in messages[0]] == []
    assert reason in messages[0]
    assert reason.splitlines()[0] in str(explain(mine))
    assert [row.tensors for row in explain(mine)] == [len(MATRICES)]
    assert cache_info().kernels == 0


@pytest.mark.usefixtures("words")
def test_it_is_an_error_in_strict_mode(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    params = parameters()
    optimizer = AdamW(params, lr=0.1, compiled=True)
    refused_untouched(optimizer, params, "the optimizer steps eagerly")
    assert not optimizer.state
    monkeypatch.setenv("COMPILED_OPTIM_DISABLE", "1")  # a way out
    train(1, (optimizer, params))
    assert executions(optimizer) == {"eager": "COMPILED_OPTIM_DISABLE=1"}


def test_what_is_loaded_needs_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    params = parameters()
    train(1, (AdamW(params, compiled=True), params))
    no_compiler(monkeypatch, tmp_path)
    optimizer = AdamW(params, compiled=True)
    train(2, (optimizer, params))
    assert executions(optimizer) == {"multi_tensor": ""}


@lenient
def test_a_torch_compile_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no torch.compile today")

    monkeypatch.setattr(torch, "compile", fail)
    ours, stock = parameters(2)
    mine = Adam(ours, lr=0.1, eps=1e-3, compiled="foreach")
    messages = warned(3, (mine, ours), (torch.optim.Adam(stock, lr=0.1, eps=1e-3), stock))
    assert_equal(ours, stock)
    assert len(messages) == 1
    assert "no torch.compile today" in messages[0]
    assert "compiled=False" in messages[0]
    monkeypatch.setenv("COMPILED_OPTIM_STRICT", "1")
    strict = Adam(ours, compiled="foreach")
    refused_untouched(strict, ours, "no torch.compile today")
    assert not strict.state


def test_a_compiler_with_arguments(tmp_path: Path) -> None:
    """In a process of its own: Inductor reads CXX when it is imported, and takes it for one word."""
    code = """
import torch, compiled_optim
p = torch.nn.Parameter(torch.ones(3))
p.grad = torch.ones(3)
optimizer = compiled_optim.SGD([p], compiled=True)
optimizer.step()
print([(row.execution, row.origin) for row in compiled_optim.explain(optimizer)])
"""
    environment = {**os.environ, "CXX": "env g++", "COMPILED_OPTIM_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout == "[('multi_tensor', 'compiled')]\n"


# ---- what torch.compile builds must be as private as the cache


@lenient
def test_foreach_does_not_build_where_others_can_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "inductor"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared))
    params = parameters()
    optimizer = AdamW(params, compiled="foreach")
    (message,) = warned(2, (optimizer, params))
    assert "cannot be trusted" in message
    assert "TORCHINDUCTOR_CACHE_DIR" in message
    assert not [path for path in shared.rglob("*") if path.is_file()]
    assert "cannot be trusted" in str(executions(optimizer))


# ---- a rule that is no single loop goes to the "foreach" lowering


class Normalised(Optimizer):
    """Steps along the gradient over its norm: a reduction."""

    elementwise = False
    lr: float = number(default=0.1, low=0)

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"lr": h.lr}

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        return p - g / g.norm() * k.lr


class Undeclared(Normalised):
    """The same, but for its declaration."""

    elementwise = True
    lr: float = number(default=0.1, low=0)


@pytest.mark.parametrize("count", [1, 3])
def test_a_reduction_that_is_not_declared_is_an_error_that_says_so(count: int) -> None:
    params = parameters()[:count]
    for p in params:
        p.grad = torch.randn_like(p)
    before = [p.detach().clone() for p in params]
    with pytest.raises(AttributeError, match=r"cannot use \.norm .* `elementwise = False`"):
        Undeclared(params).step()
    assert_equal(params, before)


def normalised_by_hand(p: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return p.detach() - grad / grad.norm() * 0.1


def test_a_reduction_is_taken_of_each_parameter_by_itself() -> None:
    params = parameters()
    for p in params:
        p.grad = torch.randn_like(p)
    expected = [normalised_by_hand(p, p.grad) for p in params]
    Normalised(params).step()
    assert_equal(params, expected)


@lenient
def test_a_rule_that_is_not_one_loop_is_compiled_as_foreach() -> None:
    params = parameters()
    for p in params:
        p.grad = torch.randn_like(p)
    expected = [normalised_by_hand(p, p.grad) for p in params]
    optimizer = Normalised(params, compiled=True)
    with pytest.warns(CompileFallbackWarning, match="not one fusible loop.*foreach") as caught:
        optimizer.step()
    assert sum(warning.category is CompileFallbackWarning for warning in caught) == 1
    assert_equal(params, expected)
    assert executions(optimizer) == {"foreach": ""}
    assert warned(2, (optimizer, params)) == []


def test_a_rule_that_is_not_one_loop_is_an_error_in_strict_mode() -> None:
    params = parameters()
    refused_untouched(Normalised(params, compiled=True), params, "not one fusible loop")


class Wrong(Optimizer):
    """With a bug."""

    lr: float = number(default=0.1, low=0)
    memory = buffer()

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"lr": h.lr}

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        return p - g * k.learning_rate


@pytest.mark.parametrize("compiled", [False, True])
def test_an_error_in_a_rule_is_raised(compiled: bool, lenient: None) -> None:
    params = parameters()
    optimizer = Wrong(params, compiled=compiled)
    # what only a trace raises is no error of a step, so it runs eagerly, and raises there
    told = pytest.warns(CompileFallbackWarning, match="learning_rate") if compiled else nullcontext()
    with told, pytest.raises(AttributeError, match="learning_rate"):
        train(1, (optimizer, params))
    assert not optimizer.state  # nothing was run


# ---- tensors that no kernel takes: they alone are stepped eagerly


class Tagged(torch.Tensor):
    pass


def with_gaps(values: torch.Tensor) -> Any:
    gaps = torch.zeros(4, 6, dtype=torch.float64)[:, ::2]
    return torch.nn.Parameter(gaps.copy_(values))


def of_a_subclass(values: torch.Tensor) -> Any:
    return torch.nn.Parameter(values.clone().as_subclass(Tagged))


UNSUPPORTED = {"gaps": with_gaps, "subclass": of_a_subclass}


@pytest.fixture(params=UNSUPPORTED)
def odd(request: pytest.FixtureRequest) -> Any:
    return UNSUPPORTED[request.param](torch.randn(4, 3, dtype=torch.float64))


def test_unsupported_tensors_are_stepped_eagerly(odd: Any, lenient: None) -> None:
    (ours, stock), stock_odd = parameters(2), torch.nn.Parameter(odd.detach().as_subclass(torch.Tensor).clone())
    mine = AdamW([*ours, odd], lr=0.1, compiled=True)
    theirs = torch.optim.AdamW([*stock, stock_odd], lr=0.1, foreach=False)
    messages = warned(3, (mine, [*ours, odd]), (theirs, [*stock, stock_odd]))
    assert_equal(ours, stock)
    torch.testing.assert_close(odd.detach().as_subclass(torch.Tensor), stock_odd.detach(), rtol=0, atol=1e-12)
    assert len(messages) == 1
    assert "a parameter of shape (4, 3) is updated eagerly, because" in messages[0]
    assert "; the others are compiled" in messages[0]
    assert {row.execution: row.tensors for row in explain(mine)} == {"multi_tensor": 3, "eager": 1}
    assert executions(mine)["eager"] in messages[0]


def test_unsupported_tensors_are_an_error_in_strict_mode(odd: Any) -> None:
    params = [*parameters(), odd]
    optimizer = AdamW(params, lr=0.1, compiled=True)
    refused_untouched(optimizer, params, r"a parameter of shape \(4, 3\) is updated eagerly")
    assert not optimizer.state


@lenient
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate:UserWarning")
def test_a_parameter_listed_twice() -> None:
    ours, stock = parameters(2)
    mine = AdamW([ours[0], *ours], lr=0.1, compiled=True)
    theirs = torch.optim.AdamW([stock[0], *stock], lr=0.1, foreach=False)
    messages = warned(3, (mine, ours), (theirs, stock))
    assert_equal(ours, stock)
    assert len(messages) == 1
    assert "listed more than once" in messages[0]


def test_each_device_has_its_execution(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without a backend, played by float64: lists in a graph beside the launch of the others."""
    monkeypatch.setattr(dispatch, "GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(cpu, "dtypes", cpu.dtypes - {torch.float64})
    torch.manual_seed(0)
    mine = [torch.nn.Parameter(torch.randn(3, dtype=dtype)) for dtype in (torch.float32, torch.float64) * 2]
    stock = [torch.nn.Parameter(p.detach().clone()) for p in mine]
    ours, theirs = (
        compiled_optim.SGD(mine, lr=0.1, momentum=0.9, compiled=True),
        torch.optim.SGD(stock, lr=0.1, momentum=0.9),
    )
    for _ in range(3):
        for p, q in zip(mine, stock, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(mine, stock)
    rows = [(row.execution, row.dtype, row.tensors) for row in explain(ours)]
    assert rows == [("foreach", "float64", 2), ("multi_tensor", "float32", 2)]
