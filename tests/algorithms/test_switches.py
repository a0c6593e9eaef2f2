"""Switches that choose an execution, and what is said of it: the environment, stances, names, ``explain``, the log."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from beside_torch import MATRICES, assert_equal, executions, parameters, train

from compiled_optim import (
    SGD,
    AdamW,
    Optimizer,
    cache_clear,
    cache_info,
    explain,
)

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
    assert sum(row.tensors for row in explain(mine)) == len(MATRICES)


@pytest.mark.parametrize("value", ["maybe", "2", " 1", "on"])
@pytest.mark.parametrize("variable", ["COMPILED_OPTIM_DISABLE", "COMPILED_OPTIM_STRICT", "COMPILED_OPTIM_DISK_CACHE"])
def test_invalid_environment_values_are_named(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = AdamW(params, compiled=True)
    cache_clear()
    monkeypatch.setenv("CXX", "/nonexistent/c++")  # or strict mode would not be asked for
    monkeypatch.setenv("COMPILED_OPTIM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=variable) as caught:
        train(1, (optimizer, params))
    assert f"{variable}={value!r}: expected 0, 1, true, false or nothing" in str(caught.value)
    assert_equal(params, before)
    assert not optimizer.state


@pytest.mark.parametrize(
    ("value", "execution"), [("1", "eager"), ("TRUE", "eager"), ("0", "multi_tensor"), ("", "multi_tensor")]
)
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
