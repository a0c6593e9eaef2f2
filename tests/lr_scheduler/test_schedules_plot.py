"""plot_schedule and the command line."""

from __future__ import annotations

import builtins
import re
from pathlib import Path
from typing import Any

import pytest
from schedule_cases import CASES, STATEFUL, make_optimizer, near

import compiled_optim
from compiled_optim import lr_scheduler as ours
from compiled_optim.lr_scheduler.__main__ import NAMES, main


@pytest.fixture
def _no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    stock = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return stock(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)


@pytest.mark.parametrize("case", ["OneCycleLR", "LambdaLR-of-numbers", "StepLR"])
def test_draws_the_values(case: str, tmp_path: Path) -> None:
    scheduler = (CASES | STATEFUL)[case](ours, make_optimizer())
    file = tmp_path / "schedule.png"
    ax = compiled_optim.plot_schedule(scheduler, 50, path=file)
    assert file.read_bytes().startswith(b"\x89PNG")
    for group, line in enumerate(ax.get_lines()):
        assert list(line.get_ydata()) == near([scheduler.value(i, group) for i in range(50)])
    assert len(ax.get_lines()) == 2
    assert scheduler.last_epoch == 0
    again = compiled_optim.plot_schedule(scheduler, 50, ax=ax)
    assert again is ax
    assert len(ax.get_lines()) == 4


def test_equal_groups_are_one_line() -> None:
    scheduler = ours.OneCycleLR(make_optimizer(), 0.1, total_steps=50)
    ax = compiled_optim.plot_schedule(scheduler, 50, of="momentum")
    assert len(ax.get_lines()) == 1
    assert ax.get_ylabel() == "momentum"


def test_refusals() -> None:
    scheduler = CASES["StepLR"](ours, make_optimizer())
    for steps in (0, 2.5):
        with pytest.raises(ValueError, match=f"steps must be a positive integer, got {steps}"):
            ours.plot_schedule(scheduler, steps)
    with pytest.raises(TypeError, match=r"schedule must be a scheduler of .* got SGD"):
        ours.plot_schedule(scheduler.optimizer, 3)
    with pytest.raises(TypeError, match="depends on the metric"):
        ours.plot_schedule(ours.ReduceLROnPlateau(make_optimizer()), 3)


@pytest.mark.usefixtures("_no_matplotlib")
def test_without_matplotlib(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ImportError, match="needs matplotlib"):
        ours.plot_schedule(CASES["StepLR"](ours, make_optimizer()), 3)
    with pytest.raises(SystemExit):
        main(["StepLR", "step_size=3", "--plot", "x.png"])
    assert "needs matplotlib" in capsys.readouterr().err


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "out.svg"
    main(["OneCycleLR", "max_lr=0.1", "total_steps=1000", "--plot", str(file)])
    output = capsys.readouterr().out
    assert output.startswith("lr(t) = Piecewise(")
    assert r"\eta_{t} = \begin{cases}" in output
    assert output.splitlines()[-1].split() == ["999", "4e-07"]
    assert "<svg" in file.read_text()
    main(["SymbolicLR", "expression=base_lr*exp(-t/10)", "--lr", "0.5", "--steps", "11"])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["10", "0.18394"]
    main(["SWALR", "swa_lr=0.05", "anneal_strategy=linear", "--steps", "1"])
    assert capsys.readouterr().out.splitlines()[-1].split() == ["0", "0.1"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["NoLR"], "scheduler must be one of .*OneCycleLR.*; got 'NoLR'"),
        (["StepLR", "size=3"], "StepLR takes step_size=..., gamma=..., last_epoch=...; got 'size=3'"),
        (["StepLR", "3"], "got '3'"),
        (["StepLR"], "step_size"),
        (["ConstantLR", "factor=3"], "factor expected to be between 0 and 1"),
        (["SymbolicLR", "expression=x*t"], "got 'x'"),
        (["StepLR", "step_size=3", "--steps", "-1"], "--steps must be positive, got -1"),
        (["StepLR", "step_size=3", "--plot", "/nowhere/x.png"], "nowhere"),
    ],
)
def test_command_line_names_what_is_wrong(arguments: list[str], match: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(match, error), error


@pytest.mark.parametrize("name", NAMES)
def test_command_line_knows(name: str) -> None:
    assert hasattr(ours, name)
