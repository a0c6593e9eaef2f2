"""What happens when a step cannot be compiled, or was told not to be: warnings, ``explain``, strict mode, the log."""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from compiled_optim import (
    SGD,
    AdamW,
    CompileError,
    CompileFallbackWarning,
    Optimizer,
    cache_clear,
    cache_info,
    explain,
    kernels,
)
from compiled_optim.declare import buffer, number

lenient = pytest.mark.usefixtures("lenient")
SHAPES = [(3, 4), (5,), (2, 2)]


def parameters(copies: int = 1, dtype: torch.dtype = torch.float64) -> Any:
    values = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    lists = [[torch.nn.Parameter(v.clone()) for v in values] for _ in range(copies)]
    return lists[0] if copies == 1 else lists


def train(steps: int, *runs: tuple[torch.optim.Optimizer, list[Any]]) -> None:
    for _ in range(steps):
        for row in zip(*(params for _, params in runs), strict=True):
            grad = torch.randn(row[0].shape, dtype=row[0].dtype)
            for p in row:
                p.grad = grad.clone()
        for optimizer, _ in runs:
            optimizer.step()


def assert_equal(ours: list[Any], stock: list[Any]) -> None:
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in stock], rtol=0, atol=1e-12)


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


def executions(optimizer: Optimizer) -> dict[str, str]:
    return {row.execution: row.reason for row in explain(optimizer)}


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
    monkeypatch.setattr(torch, "__version__", "2.12.1")


BROKEN = {
    no_compiler: ["no C++ compiler", "/nonexistent/c++", "install g++"],
    no_named_compiler: ["no C++ compiler", "install g++"],
    failing_compiler: ["failed with status 3", "the compiler is broken", "compiled=False"],
    unusable_compiler: ["No working C++ compiler", "compiled=False"],
    silent_compiler: ["Inductor raised", "compiled=False"],
    useless_compiler: ["wrote no library", "compiled=False"],
    newer_torch: ["torch 9.1.0+cpu is not known to work", "2.13", "install"],
    older_torch: ["torch 2.12.1 is not known to work", "install"],
}


@pytest.fixture(params=BROKEN, ids=lambda f: f.__name__)
def words(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """An installation that cannot compile; what the warning must say."""
    import torch._inductor.config  # or torch.compile keeps this compiler for good: it reads CXX when it is imported

    kernels.host_module()  # is kept
    monkeypatch.setenv("COMPILED_OPTIM_CACHE_DIR", str(tmp_path / "cache"))
    cache_clear()
    request.param(monkeypatch, tmp_path)
    yield BROKEN[request.param]
    cache_clear()


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
    assert [row.tensors for row in explain(mine)] == [len(SHAPES)]
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


# ---- a rule that is no single loop goes to the "foreach" lowering


class Normalised(Optimizer):
    """Steps along the gradient over its norm: a reduction."""

    lr: float = number(default=0.1, low=0)

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"lr": h.lr}

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        return p - g / g.norm() * k.lr


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
    assert len(caught) == 1
    assert_equal(params, expected)
    assert executions(optimizer) == {"foreach": ""}
    assert warned(2, (optimizer, params)) == []


def test_a_rule_that_is_not_one_loop_is_an_error_in_strict_mode() -> None:
    params = parameters()
    refused_untouched(Normalised(params, compiled=True), params, "not one fusible loop")


class Wrong(Optimizer):
    """A bug in a user's rule is no reason to fall back."""

    lr: float = number(default=0.1, low=0)
    memory = buffer()

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"lr": h.lr}

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        return p - g * k.learning_rate


@pytest.mark.parametrize("compiled", [False, True])
def test_an_error_in_a_rule_is_raised(compiled: bool) -> None:
    params = parameters()
    optimizer = Wrong(params, compiled=compiled)
    with pytest.raises(AttributeError, match="learning_rate"):
        train(1, (optimizer, params))
    if compiled:  # nothing was run
        assert not optimizer.state


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


# ---- told not to compile: no warning, no error in strict mode


@pytest.fixture(params=["COMPILED_OPTIM_DISABLE", "TORCH_COMPILE_DISABLE", "stance"])
def switch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Any]]:
    """The reason that ``explain`` gives, and how to lift it."""
    if request.param == "stance":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, when it imports Dynamo
            torch.compiler.set_stance("force_eager")
        yield 'torch.compiler.set_stance("force_eager")', lambda: torch.compiler.set_stance("default")
        torch.compiler.set_stance("default")
    else:
        monkeypatch.setenv(request.param, "1")
        yield f"{request.param}=1", lambda: monkeypatch.setenv(request.param, "0")


@pytest.mark.parametrize("compiled", [True, "multi_tensor", "foreach"])
def test_switched_off(switch: tuple[str, Any], compiled: bool | str) -> None:
    reason, lift = switch
    ours, stock = parameters(2)
    mine, theirs = AdamW(ours, lr=0.1, compiled=compiled), torch.optim.AdamW(stock, lr=0.1)
    before = cache_info()
    train(2, (mine, ours), (theirs, stock))
    assert executions(mine) == {"eager": reason}
    assert reason in str(explain(mine))
    assert cache_info() == before
    lift()
    train(2, (mine, ours), (theirs, stock))
    assert_equal(ours, stock)
    assert executions(mine) == {"foreach" if compiled == "foreach" else "multi_tensor": ""}


def test_a_stance_holds_between_compiled_steps() -> None:
    ours, stock = parameters(2)
    mine, theirs = AdamW(ours, lr=0.1, compiled=True), torch.optim.AdamW(stock, lr=0.1)
    train(2, (mine, ours), (theirs, stock))
    with torch.compiler.set_stance("force_eager"):
        train(2, (mine, ours), (theirs, stock))
        assert set(executions(mine)) == {"eager"}
    train(2, (mine, ours), (theirs, stock))
    assert executions(mine) == {"multi_tensor": ""}
    assert_equal(ours, stock)


# ---- lowerings by name, and what may be set


@pytest.mark.parametrize("lowering", ["multi_tensor", "foreach"])
@pytest.mark.parametrize(("cls", "options"), [(AdamW, {}), (SGD, {"momentum": 0.9, "dampening": 0.5})], ids=str)
def test_lowerings_by_name(cls: type[Optimizer], options: dict[str, Any], lowering: str) -> None:
    ours, stock = parameters(2)
    mine = cls(ours, lr=0.1, compiled=lowering, **options)
    theirs = getattr(torch.optim, cls.__name__)(stock, lr=0.1, **options)
    train(3, (mine, ours), (theirs, stock))
    assert_equal(ours, stock)
    assert executions(mine) == {lowering: ""}
    assert sum(row.tensors for row in explain(mine)) == len(SHAPES)


@pytest.mark.parametrize("value", ["maybe", "2", " 1", "on"])
@pytest.mark.parametrize("variable", ["COMPILED_OPTIM_DISABLE", "COMPILED_OPTIM_STRICT", "COMPILED_OPTIM_DISK_CACHE"])
def test_invalid_environment_values_are_named(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = AdamW(params, compiled=True)
    cache_clear()
    no_compiler(monkeypatch, tmp_path)  # or strict mode would not be asked for
    monkeypatch.setenv("COMPILED_OPTIM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=variable) as caught:
        train(1, (optimizer, params))
    assert f"{variable}={value!r}: expected 0, 1, true, false or nothing" in str(caught.value)
    assert_equal(params, before)
    assert not optimizer.state


@pytest.mark.parametrize(("value", "execution"), [("1", "eager"), ("TRUE", "eager"), ("0", "multi_tensor"), ("", "multi_tensor")])  # fmt: skip
def test_valid_environment_values(value: str, execution: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMPILED_OPTIM_DISABLE", value)
    params = parameters()
    optimizer = AdamW(params, compiled=True)
    train(1, (optimizer, params))
    assert set(executions(optimizer)) == {execution}


# ---- what is said, and what is not


def test_explain_before_the_first_step_and_of_others() -> None:
    params = parameters()
    assert executions(AdamW(params)) == {"eager": "compiled=False"}
    assert executions(AdamW(params, compiled=True)) == {"eager": "no step was taken yet"}
    with pytest.raises(TypeError, match="AdamW"):
        explain(torch.optim.AdamW(params))  # type: ignore[arg-type]


def test_one_line_in_the_log_for_each_kernel_and_nothing_printed(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    doubles, singles = parameters(), parameters(dtype=torch.float32)
    cache_clear()
    caplog.set_level(logging.INFO, logger="compiled_optim")
    for _ in range(2):
        for params in (doubles, singles):
            train(2, (AdamW(params, compiled=True), params))
    train(1, (AdamW(doubles), doubles))
    lines = [r for r in caplog.records if r.name == "compiled_optim"]
    assert [r.levelno for r in lines] == [logging.INFO, logging.INFO]
    assert ["float64" in lines[0].getMessage(), "float32" in lines[1].getMessage()] == [True, True]
    assert all(r.getMessage().startswith("AdamW(") for r in lines)
    assert capfd.readouterr() == ("", "")


@lenient
def test_a_fallback_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    params = [*parameters(), with_gaps(torch.ones(4, 3))]
    optimizer = AdamW(params, compiled=True)
    messages = warned(2, (optimizer, params))
    assert [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING] == messages
    assert os.environ["COMPILED_OPTIM_STRICT"] == "0"
