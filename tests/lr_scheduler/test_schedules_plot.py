"""plot_schedule and the command line."""

from __future__ import annotations

import builtins
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from schedule_cases import CASES, STATEFUL, make_optimizer, near

import compiled_optim
from compiled_optim import lr_scheduler as ours
from compiled_optim.lr_scheduler.__main__ import NAMES, main
from compiled_optim.lr_scheduler.text import read


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
    ("text", "last"),
    [
        ("warmup(CosineAnnealingLR(T_max=90), 10)", "0.0969846"),
        ("SequentialLR([LinearLR(0.1, total_iters=10), warmup(StepLR(step_size=5), 4)], milestones=[10])", "0.01"),
        ("ChainedScheduler([ConstantLR(0.5, 3), ExponentialLR(gamma=0.9)])", "0.0121577"),
        ("warmup(SymbolicLR('base_lr*exp(-t/10)'), steps=10, kind='cosine')", "0.0367879"),
        ("get_wsd_schedule(5, 10, num_stable_steps=5)", "0"),
    ],
)
def test_command_line_takes_compositions(text: str, last: str, tmp_path: Path, capsys: Any) -> None:
    main([text, "--steps", "21", "--plot", str(tmp_path / "out.png")])
    output = capsys.readouterr().out
    assert output.startswith("lr(t) = ")
    assert output.splitlines()[-1].split() == ["20", last]
    assert (tmp_path / "out.png").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["warmup(StepLR(), 3)"], "StepLR takes step_size=..., gamma=..., last_epoch=...; missing .* 'step_size'"),
        (["warmup(LinerLR(), 3)"], "scheduler must be one of .*, LinearLR, .*; got 'LinerLR'"),
        (["Warmup(StepLR(t))"], "scheduler must be one of .*, warmup; got 'Warmup'"),
        (["warmup(StepLR(step), 3)"], "arguments must be schedules, lists, numbers and texts in quotes, got 'step'"),
        (["warmup(StepLR(3), 3", "kind=linear"], r"has its arguments in parentheses; got 'kind=linear' after it"),
        (["warmup(StepLR(3), 3"], "it cannot be read: .*never closed"),
        (["StepLR(**{'step_size': 3})"], "arguments must be"),
        (["__import__('os').getcwd()"], "arguments must be"),
        (["warmup(3, 5)"], "schedule must be a scheduler of compiled_optim.lr_scheduler, got a builtins.int"),
        (["ChainedScheduler([3])"], "ChainedScheduler"),
        (["StepLR(5, last_epoch=3)"], "initial_lr"),
        (["(" * 300 + "StepLR(5)" + ")" * 300], "it cannot be read|arguments must be"),
        (["NoLR"], "scheduler must be one of .*OneCycleLR.*; got 'NoLR'"),
        (["StepLR", "size=3"], "StepLR takes step_size=..., gamma=..., last_epoch=...; got 'size=3'"),
        (["StepLR", "3"], "got '3'"),
        (["StepLR"], "step_size"),
        (["ConstantLR", "factor=3"], "factor expected to be between 0 and 1"),
        (["SymbolicLR", "expression=x*t"], "not 'x'; got 'x.t'"),
        (["SymbolicLR", "expression=9**9**9"], "an exponent must be at most 1000"),
        (["StepLR", "step_size=3", "--steps", "-1"], "--steps must be positive, got -1"),
        (["StepLR", "step_size=3", "--plot", "/nowhere/x.png"], "nowhere"),
    ],
)
def test_command_line_names_what_is_wrong(arguments: list[str], match: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    error = " ".join(capsys.readouterr().err.split())
    assert re.search(match, error), error


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("base_lr*(1 + cos(pi*t/50))/2", [0.5 * (1 + math.cos(math.pi * t / 50)) / 2 for t in range(11)]),
        (
            "base_lr*Piecewise((t/4, t < 4), ((1 - t/20)**2, True))",
            [t / 8 if t < 4 else 0.5 * (1 - t / 20) ** 2 for t in range(11)],
        ),
        ("Piecewise((1, 3 < t <= 5 or not t < 9), (0.25, True))", [0.25] * 4 + [1.0] * 2 + [0.25] * 3 + [1.0] * 2),
        (
            "floor(t/7) + Mod(t, 3) + Abs(t - 2) + Max(2, t) - Min(t, 3)",
            [t // 7 + t % 3 + abs(t - 2) + max(2, t) - min(t, 3) for t in range(11)],
        ),
        (
            "max(0, 1 - abs(t - 5)/5) + min(t, 3) + ceil(t/2)",
            [max(0, 1 - abs(t - 5) / 5) + min(t, 3) + (t + 1) // 2 for t in range(11)],
        ),
        ("2^t/2**10 + sqrt(2)*E - t % 4", [2.0**t / 1024 + math.sqrt(2) * math.e - t % 4 for t in range(11)]),
        ("7", [7.0] * 11),
    ],
)
def test_an_expression_from_text(text: str, values: list[float]) -> None:
    optimizer = make_optimizer()
    optimizer.param_groups[0]["lr"] = 0.5
    scheduler = ours.SymbolicLR(optimizer, text)
    assert [scheduler.value(i) for i in range(11)] == near(values)
    assert scheduler.value(torch.arange(11, dtype=torch.float64)).tolist() == near(values)


@pytest.mark.parametrize(
    "text",
    [
        *("__import__('os').getcwd()", "t.__class__", "(lambda: 1)()", "[t]", "t, t", "'a'*9", "open", "exp(x=1)", "x"),
        *("t < 3", "True", "1j*t", "sin()", "Piecewise(1)", "", "t +", "0.1 if t < 3 else 0.2", "t << 3", "~t", "*t"),
        *("9**9**9", "t**1000000000", "((2*t)**1000)**1000", "(Min(9, t + 20)**1000 + 1)**1000", "1e400", "10**400*t"),
        *("floor(exp(exp(3000)))", "(-8)**(1/3)*t", "2**1e9", "Min(9, exp(exp(exp(exp(9)))))"),
        *("(" * 400 + "t" + ")" * 400, "-" * 900 + "t", "sin(" * 100 + "t" + ")" * 100, "+".join("t" * 501)),
        "(1 + " * 14 + "t" + ")**8" * 14,
    ],
)
def test_text_that_is_no_expression_is_refused_at_once(text: str) -> None:
    """Nothing of it is run, and no number in it is larger than a float."""
    with pytest.raises(ValueError, match=r"expression|exponent|number"):
        read(text)


@pytest.mark.parametrize(
    "text",
    [
        "9**9**(9**(t+2))",
        "floor(exp(exp(3000*base_lr)))",
        "floor(t+9)**(floor(t+9)**floor(t+9))",
        "Min(9,t+2)**(Min(9,t+2)**Min(9,t+2))",
    ],
)
def test_a_power_that_only_a_step_makes_huge_overflows(text: str) -> None:
    with pytest.raises(OverflowError):
        ours.SymbolicLR(make_optimizer(), text).value(11)


@pytest.mark.parametrize("name", NAMES)
def test_command_line_knows(name: str) -> None:
    assert hasattr(ours, name)
