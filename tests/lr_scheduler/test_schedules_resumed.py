"""An attached schedule after checkpoints were loaded: its own, the optimizer's, or both, in any order."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from schedule_cases import CASES, near, scheduled

import compiled_optim
from compiled_optim import lr_scheduler

each = pytest.mark.parametrize("build", CASES.values(), ids=CASES)
Build = Callable[[Any, Any], Any]


def make(build: Build, dtype: torch.dtype | None = None, optim: Any = compiled_optim.Adam) -> tuple[Any, Any]:
    rates = [torch.tensor(lr, dtype=dtype) if dtype else lr for lr in (0.1, 0.02)]
    groups = [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": lr} for lr in rates]
    optimizer = compiled_optim.SGD(groups, momentum=0.9) if optim is compiled_optim.SGD else optim(groups)
    schedule = build(lr_scheduler, optimizer)
    optimizer.attach(schedule)
    return optimizer, schedule


def run(optimizer: Any, steps: int) -> list[list[float]]:
    seen = []
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, 0.5)
        optimizer.step()
        seen.append(scheduled(optimizer))
    return seen


def trained(build: Build, steps: int, **kind: Any) -> tuple[list[list[float]], dict[str, Any], dict[str, Any]]:
    """The values of ten more steps, and the checkpoints before them."""
    optimizer, schedule = make(build, **kind)
    run(optimizer, steps)
    saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    return run(optimizer, 10), *saved


def rows(values: list[list[float]], rel: float = 1e-9) -> Any:
    return [near(row, rel) for row in values]


@each
def test_of_the_schedule_alone(build: Build) -> None:
    expected, _, saved = trained(build, 12)
    for dtype in (None, torch.float64):
        optimizer, schedule = make(build, dtype)
        now = scheduled(optimizer)
        schedule.load_state_dict(saved)
        assert list(map(float, schedule.get_last_lr())) == near(scheduled(optimizer)[:2])
        assert scheduled(optimizer) != now or build is not CASES["ExponentialLR"]
        assert run(optimizer, 10) == rows(expected)


@each
def test_of_both(build: Build) -> None:
    expected, *saved = trained(build, 12)
    for order in ((0, 1), (1, 0)):
        pair = make(build)
        for i in order:
            pair[i].load_state_dict(copy.deepcopy(saved[i]))
        assert run(pair[0], 10) == rows(expected)


def test_of_both_a_change_by_hand_stays() -> None:
    build = CASES["CosineAnnealingLR"]
    optimizer, schedule = make(build)
    run(optimizer, 5)
    optimizer.param_groups[0]["lr"] = 0.3
    saved = copy.deepcopy((optimizer.state_dict(), schedule.state_dict()))
    expected = run(optimizer, 5)
    for order in ((0, 1), (1, 0)):
        pair = make(build)
        for i in order:
            pair[i].load_state_dict(copy.deepcopy(saved[i]))
        assert run(pair[0], 5) == rows(expected)


@each
def test_of_the_optimizer_alone(build: Build) -> None:
    """Its count of steps is the place, which the learning rates confirm."""
    for dtype in (None, torch.float32):
        expected, saved, _ = trained(build, 12, dtype=dtype)
        optimizer, schedule = make(build, dtype)
        optimizer.load_state_dict(saved)
        with pytest.warns(
            UserWarning, match=f"the attached {type(schedule).__name__} did not: it goes on from step 12,"
        ):
            run(optimizer, 1)
        assert run(optimizer, 9) == rows(expected[1:], 1e-5 if dtype == torch.float32 else 1e-9)


def test_of_an_optimizer_that_counts_no_steps() -> None:
    """Then the learning rates must tell the place alone."""
    unique, repeated = CASES["OneCycleLR"], CASES["CosineAnnealingLR"]
    expected, saved, _ = trained(unique, 12, optim=compiled_optim.SGD)
    optimizer, _ = make(unique, optim=compiled_optim.SGD)
    optimizer.load_state_dict(saved)
    with pytest.warns(UserWarning, match="goes on from step 12,"):
        assert run(optimizer, 10) == rows(expected)
    _, saved, _ = trained(repeated, 12, optim=compiled_optim.SGD)
    optimizer, schedule = make(repeated, optim=compiled_optim.SGD)
    optimizer.load_state_dict(saved)
    with pytest.warns(UserWarning, match="goes on from step 0, for the .* do not tell its place. Load its state_dict"):
        run(optimizer, 1)
    assert schedule.last_epoch == 1
    run(optimizer, 3)  # which was said once


def test_a_place_that_the_rates_contradict_is_not_taken() -> None:
    """As of a schedule that was attached in the middle, or with other constants."""
    _, saved, _ = trained(CASES["ExponentialLR"], 12)
    optimizer, _ = make(lambda m, o: m.ExponentialLR(o, 0.5))
    optimizer.load_state_dict(saved)
    with pytest.warns(UserWarning, match="goes on from step 0, for"):
        run(optimizer, 1)
    assert scheduled(optimizer)[0] == near(0.1 * 0.97**12 * 0.5)


def test_going_back_in_one_run() -> None:
    optimizer, _ = make(CASES["CosineAnnealingLR"])
    run(optimizer, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(copy.deepcopy(saved))  # where it is
        expected = run(optimizer, 3)
    optimizer.load_state_dict(saved)
    with pytest.warns(UserWarning, match="from step 4"):
        assert run(optimizer, 3) == rows(expected)


def test_a_schedule_of_fewer_groups() -> None:
    """The group that is missing is added after the schedule has been restored."""

    def add(optimizer: Any) -> None:
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": 0.05})

    build = CASES["ExponentialLR"]
    first, schedule = make(build)
    run(first, 2)
    add(first)
    run(first, 2)
    optimizer, resumed = make(build)
    resumed.load_state_dict(copy.deepcopy(schedule.state_dict()))
    add(optimizer)
    optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
    assert run(optimizer, 3) == rows(run(first, 3))


@pytest.mark.parametrize("module", [lr_scheduler, torch.optim.lr_scheduler], ids=["ours", "torch"])
def test_a_checkpoint_of_what_it_has_is_no_news(module: Any) -> None:
    """As Accelerate's ``prepare`` loads one: of a schedule without a formula, too."""
    optimizer = compiled_optim.Adam([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    optimizer.attach(module.LambdaLR(optimizer, {0: 1.0, 1: 0.5, 2: 0.25, 3: 0.1}.__getitem__))
    for before, after in ((1.0, 0.5), (0.5, 0.25), (0.25, 0.1)):
        assert scheduled(optimizer)[0] == pytest.approx(0.1 * before)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert run(optimizer, 1)[0][0] == pytest.approx(0.1 * after)
