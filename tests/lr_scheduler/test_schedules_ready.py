"""The ready-made schedules beside the formulas of transformers and of papers, in every form that schedules have."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from ready_cases import LR, READY, of_torch, reference
from schedule_cases import near

import compiled_optim
from compiled_optim import lr_scheduler as ours
from compiled_optim.lr_scheduler.symbolic import t

STEPS = 140
each = pytest.mark.parametrize("case", READY)


def make_optimizer(optim: Any = torch.optim, dtype: torch.dtype | None = None) -> Any:
    lr = LR if dtype is None else torch.tensor(LR, dtype=dtype)
    groups = [
        {"params": [torch.nn.Parameter(torch.zeros(2))]},
        {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 0.03},
    ]
    return optim.SGD(groups, lr=lr)


def build(case: str, optimizer: Any, **more: Any) -> Any:
    name, arguments = READY[case]
    return getattr(ours, name)(optimizer, **arguments, **more)


def rates(optimizer: Any) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def step(schedule: Any, attached: bool = False) -> None:
    for group in schedule.optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    schedule.optimizer.step()
    if not attached:
        schedule.step()


@pytest.mark.parametrize("form", ["stepped", "attached", "tensor lr"])
@each
def test_steps(case: str, form: str) -> None:
    optimizer = make_optimizer(compiled_optim, torch.float64 if form == "tensor lr" else None)
    schedule, factor = build(case, optimizer), reference(case)
    if form == "attached":
        optimizer.attach(schedule)
    for i in range(STEPS):
        assert rates(optimizer) == near([LR * factor(i), 0.03 * factor(i)]), i
        step(schedule, form == "attached")


@each
def test_values(case: str) -> None:
    """Of numbers, of a tensor, of the expression."""
    schedule, factor = build(case, make_optimizer()), reference(case)
    expected = [LR * factor(i) for i in range(STEPS)]
    assert [schedule.value(i) for i in range(STEPS)] == near(expected)
    assert schedule.value(torch.arange(STEPS, dtype=torch.float64)).tolist() == near(expected)
    expression = schedule.expression()
    places = (0, 5, 16, 17, 48, 79, 92, 93, 109, 110, 139)
    assert [float(expression.subs(t, i)) for i in places] == near([expected[i] for i in places])
    assert schedule.latex().startswith(r"\eta_{t} = ")
    assert schedule.value(torch.empty(3, device="meta"), group=1).shape == (3,)


@each
def test_checkpoints_and_copies_go_both_ways(case: str) -> None:
    """With the LambdaLR that transformers builds, through a file."""
    mine, stock = build(case, make_optimizer()), of_torch(make_optimizer(), case)
    for _ in range(25):
        step(mine)
        step(stock)
    loaded = build(case, make_optimizer()), of_torch(make_optimizer(), case)
    for new, old in zip(loaded, (stock, mine), strict=True):
        file = io.BytesIO()
        torch.save((old.optimizer.state_dict(), old.state_dict()), file)
        file.seek(0)
        states = torch.load(file, weights_only=True)
        new.optimizer.load_state_dict(states[0])
        new.load_state_dict(states[1])
    others = [*loaded, copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), build(case, mine_at_25(), last_epoch=24)]
    for _ in range(40):
        step(stock)
        for schedule in others:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(schedule.optimizer, "_opt_called", True, raising=False)
                step(schedule)
            assert rates(schedule.optimizer) == near(rates(stock.optimizer))


def mine_at_25() -> Any:
    optimizer = make_optimizer()
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


@pytest.mark.parametrize(
    ("name", "arguments", "match"),
    [
        ("get_linear_schedule_with_warmup", (-1, 9), "num_warmup_steps must be at least 0, got -1"),
        ("get_rex_schedule", (1, float("nan")), "num_training_steps must be at least 0, got nan"),
        (
            "get_cosine_with_min_lr_schedule_with_warmup",
            (1, 9),
            "one of min_lr and min_lr_rate must be given, got None",
        ),
        ("get_cosine_with_min_lr_schedule_with_warmup", (1, 9, 0.5, -1, 0.1, 0.1), "must be given, got 0.1 and 0.1"),
        ("get_cosine_with_min_lr_schedule_with_warmup", (1, 9, 0.5, -1, -0.1), "min_lr must be at least 0, got -0.1"),
        (
            "get_polynomial_decay_schedule_with_warmup",
            (1, 9, 0.2),
            "lr_end must be below the learning rate 0.1, got 0.2",
        ),
        ("get_inverse_sqrt_schedule", (1, 0), "timescale must be above 0, got 0"),
        ("get_noam_schedule", (0, 9), "d_model must be above 0, got 0"),
        ("get_noam_schedule", (512, 0), "num_warmup_steps must be above 0, got 0"),
        ("get_wsd_schedule", (5, 9), "num_training_steps or num_stable_steps must be given"),
        ("get_wsd_schedule", (5, 9, 13), r"num_training_steps must be at least .* = 14, got 13"),
        ("get_wsd_schedule", (5, 9, 20, None, "steep"), r"warmup_type must be one of .*'1-sqrt'\], got 'steep'"),
        ("get_wsd_schedule", (5, 9, 20, None, "linear", "polynomial"), "decay_type must be one of .* got 'polynomial'"),
    ],
)
def test_refusals(name: str, arguments: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        getattr(ours, name)(make_optimizer(), *arguments)


def test_of_two_numbers_of_steps_one_counts() -> None:
    with pytest.warns(UserWarning, match="num_stable_steps is used, and num_training_steps is not"):
        schedule = ours.get_wsd_schedule(make_optimizer(), 0, 10, num_training_steps=500, num_stable_steps=10)
    assert schedule.value(15) == near(LR / 2)


def test_a_floor_does_not_follow_a_learning_rate_that_is_a_tensor() -> None:
    """It is the optimizer's default too, which a schedule or a checkpoint may have moved."""
    optimizer = make_optimizer(compiled_optim, torch.float64)
    first = build("floor", optimizer)
    for _ in range(50):
        step(first)
    assert rates(optimizer)[0] != near(LR)
    for case in ("floor", "polynomial, power"):
        again = build(case, optimizer)
        assert again.value(130) == near(LR * reference(case)(130))


def test_numbers_of_numpy() -> None:
    schedule = ours.get_linear_schedule_with_warmup(make_optimizer(), np.int64(10), np.int64(50))
    step(schedule)
    assert {type(group["lr"]) for group in schedule.optimizer.param_groups} == {float}
    assert schedule.expression().subs(t, 30) == near(LR / 2)
    assert ours.warmup(ours.StepLR(make_optimizer(), 5), np.int64(4)).value(2) == near(LR / 2)


def test_they_are_drawn() -> None:
    ax = ours.plot_schedule(build("rex", make_optimizer()), 120)
    factor = reference("rex")
    assert list(ax.get_lines()[0].get_ydata()) == near([LR * factor(i) for i in range(120)])


# ---- the decay of averages


def test_ema_decay_on_numbers_tensors_and_symbols() -> None:
    decay = ours.get_ema_decay_fn(0.99)
    expected = [min(0.99, (1 + i) / (10 + i)) for i in range(2000)]
    assert [decay(i) for i in range(2000)] == near(expected)
    assert decay(torch.arange(2000, dtype=torch.float64)).tolist() == near(expected)
    assert [float(decay(t).subs(t, i)) for i in (0, 10, 890, 1999)] == near([expected[i] for i in (0, 10, 890, 1999)])
    assert pickle.loads(pickle.dumps(decay))(5) == decay(5)
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="decay must be at least 0 and at most 1, got"):
            ours.get_ema_decay_fn(wrong)


@pytest.mark.parametrize("compiled", [False, True])
def test_ema_decay_of_an_optimizer(compiled: bool) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    decay = ours.get_ema_decay_fn(0.3)
    optimizer = compiled_optim.SGD([p], lr=0.5, ema_decay=decay, compiled=compiled)
    average = torch.zeros(3)
    for i in range(1, 6):
        p.grad = torch.full((3,), float(i))
        optimizer.step()
        kept = 0.0 if i == 1 else min(0.3, (1 + i) / (10 + i))
        average = kept * average + (1 - kept) * p.detach()
        torch.testing.assert_close(optimizer.state[p]["ema"], average)


@pytest.mark.parametrize("compiled", [False, True])
def test_ema_decay_of_an_averaged_model(compiled: bool) -> None:
    decay = ours.get_ema_decay_fn(0.3)
    model = torch.nn.Linear(2, 1, bias=False)
    fn = compiled_optim.swa_utils.get_ema_avg_fn(decay)
    average = compiled_optim.swa_utils.AveragedModel(model, avg_fn=fn, compiled=compiled)
    expected = torch.zeros(1, 2)
    for n in range(6):
        average.update_parameters(model)
        kept = min(0.3, (1 + n) / (10 + n)) if n else 0.0
        expected = kept * expected + (1 - kept) * model.weight.detach()
        torch.testing.assert_close(average.module.weight.detach(), expected)
        model.weight.data.add_(1.0)
