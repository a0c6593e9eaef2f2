"""Schedules that move with the optimizer's own steps."""

from __future__ import annotations

import contextlib
import copy
import types
from typing import Any

import pytest
import torch
from schedule_cases import CASES, LRS, theirs
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import compiled_optim
from compiled_optim import lr_scheduler
from compiled_optim.testing import assert_compiles

each_schedule = pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())
kinds = pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])


def groups(tensor: bool = False) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    rates = [torch.tensor(lr, dtype=torch.float64) if tensor else lr for lr in LRS]
    return [{"params": [torch.nn.Parameter(torch.randn(3, dtype=torch.float64))], "lr": lr} for lr in rates]


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    optimizer.step()


def parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.detach() for group in optimizer.param_groups for p in group["params"]]


def rates(values: Any) -> Tensor:
    return torch.tensor([float(v) for v in values], dtype=torch.float64)


def assert_close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)


@kinds
@each_schedule
def test_trains_as_with_a_scheduler_that_is_stepped(build: Any, tensor: bool) -> None:
    stock = torch.optim.SGD(groups(), lr=0.1, momentum=0.9)
    schedule = build(theirs, stock)
    ours = compiled_optim.SGD(groups(tensor), lr=0.1, momentum=0.9, compiled=True)
    attached = build(lr_scheduler, ours)
    ours.attach(attached)
    given = [group["lr"] for group in ours.param_groups]
    step(ours, 0)
    step(stock, 0)
    schedule.step()
    with assert_compiles(0):
        for i in range(1, 120):
            assert_close(rates(attached.get_last_lr()), rates(schedule.get_last_lr()))
            assert_close(rates(g["lr"] for g in ours.param_groups), rates(g["lr"] for g in stock.param_groups))
            step(ours, i)
            step(stock, i)
            schedule.step()
    assert_close(parameters(ours), parameters(stock))
    for lr, before in zip((group["lr"] for group in ours.param_groups), given, strict=True):
        assert lr is before if tensor else type(lr) is float


@each_schedule
def test_resumes_from_a_checkpoint_attached_or_not(build: Any) -> None:
    def make() -> tuple[Any, Any]:
        optimizer = compiled_optim.SGD(groups(), lr=0.1, momentum=0.9)
        return optimizer, build(lr_scheduler, optimizer)

    first, schedule = make()
    first.attach(schedule)
    for i in range(60):
        step(first, i)
    saved = copy.deepcopy((first.state_dict(), schedule.state_dict(), parameters(first)))
    for i in range(60, 90):
        step(first, i)
    for attach in (True, False):
        optimizer, resumed = make()
        if attach:
            optimizer.attach(resumed)
        optimizer.load_state_dict(copy.deepcopy(saved[0]))  # which it goes on to write to
        resumed.load_state_dict(saved[1])
        for p, value in zip((p for g in optimizer.param_groups for p in g["params"]), saved[2], strict=True):
            p.data.copy_(value)
        for i in range(60, 90):
            step(optimizer, i)
            if not attach:
                resumed.step()
        assert_close(parameters(optimizer), parameters(first))


def test_momentum_moves_too() -> None:
    def make(tensor: bool) -> Any:
        betas: Any = (torch.tensor(0.9), torch.tensor(0.99)) if tensor else (0.9, 0.99)
        optimizer = compiled_optim.AdamW(groups(), betas=betas)
        return optimizer, lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=50)

    for tensor in (False, True):
        (stepped, schedule), (ours, attached) = make(tensor), make(tensor)
        ours.attach(attached)
        beta1 = ours.param_groups[0]["betas"][0]
        for i in range(40):
            step(stepped, i)
            schedule.step()
            step(ours, i)
            assert_close(rates(ours.param_groups[0]["betas"]), rates(stepped.param_groups[0]["betas"]))
        assert_close(parameters(ours), parameters(stepped))
        assert not tensor or ours.param_groups[0]["betas"][0] is beta1


def test_a_step_that_is_skipped_does_not_count() -> None:
    optimizer = compiled_optim.AdamW(groups(), fused=True)
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.attach(schedule)
    step(optimizer, 0)
    optimizer.found_inf = torch.tensor(1.0)
    step(optimizer, 1)
    assert schedule.last_epoch == 1
    assert_close(rates(schedule.get_last_lr()), rates(LRS) * 0.5)


class _NothingRead(TorchDispatchMode):
    """Forbids what would wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not torch.ops.aten._local_scalar_dense.default, "a value was read from a tensor"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("captured", [False, True], ids=["stepped", "captured"])
@each_schedule
def test_on_a_device_nothing_is_read_back(build: Any, captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a CUDA graph the count and the formula stay on the device; here the CPU stands in for it."""
    optimizer = compiled_optim.AdamW(groups(tensor=True), capturable=True)
    schedule = build(lr_scheduler, optimizer)
    optimizer.attach(schedule)
    optimizer._opt_called = True
    attached: Any = optimizer._attached
    attached.advance()
    monkeypatch.setattr("compiled_optim.attached.is_capturing", lambda device: captured)
    host = compiled_optim.AdamW(groups(), lr=0.1)
    reference = build(lr_scheduler, host)
    host.attach(reference)
    for i in range(60):
        step(host, i)
        assert_close(rates(schedule.get_last_lr()), rates(reference.get_last_lr()))
        with contextlib.ExitStack() as stack:
            if not schedule.schedules[1:]:  # beta1 of this optimizer is a number, which the host computes
                stack.enter_context(_NothingRead())
            attached.check()
            attached.advance()


def test_a_function_of_the_user_is_not_called_by_a_captured_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count that is a tensor goes into its formula, and a replay calls nothing."""
    calls: list[Any] = []

    def decay(i: Any) -> Any:
        calls.append(i)
        return 0.98**i

    optimizer = compiled_optim.AdamW(groups(tensor=True), capturable=True)
    schedule = lr_scheduler.LambdaLR(optimizer, decay)
    optimizer.attach(schedule)
    optimizer._opt_called = True
    attached: Any = optimizer._attached
    attached.advance()
    monkeypatch.setattr("compiled_optim.attached.is_capturing", lambda device: True)
    attached.check()
    attached.advance()
    calls.clear()
    for _ in range(3):
        attached.check()
        attached.advance()
    assert not calls
    assert_close(rates(schedule.get_last_lr()), rates(LRS) * 0.98**5)


@each_schedule
def test_is_not_stepped_by_hand(build: Any) -> None:
    optimizer = compiled_optim.SGD(groups(), lr=0.1, momentum=0.9)
    schedule = build(lr_scheduler, optimizer)
    optimizer.attach(schedule)
    step(optimizer, 0)
    before = copy.deepcopy(schedule.get_last_lr())
    with pytest.raises(RuntimeError, match="attached, and moves with"):
        schedule.step()
    assert schedule.get_last_lr() == before


def test_refusals() -> None:
    optimizer, other = (compiled_optim.AdamW(groups()) for _ in range(2))
    with pytest.raises(TypeError, match="ReduceLROnPlateau is not symbolic"):
        optimizer.attach(lr_scheduler.ReduceLROnPlateau(optimizer))
    with pytest.raises(TypeError, match="ReduceLROnPlateau is not symbolic"):
        optimizer.attach(torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer))
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.lr_scheduler\.LRScheduler, got a types\.SimpleNames"):
        optimizer.attach(types.SimpleNamespace(optimizer=optimizer))  # type: ignore[arg-type]
    mixed = lr_scheduler.SequentialLR(optimizer, [theirs.StepLR(optimizer, 3)], [])
    with pytest.raises(TypeError, match=r"torch\.optim\.lr_scheduler\.StepLR has no formula: take the one here"):
        optimizer.attach(mixed)
    assert mixed.optimizer is optimizer
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.9)
    with pytest.raises(ValueError, match="of another"):
        other.attach(schedule)
    with pytest.raises(ValueError, match="that is attached, got a ExponentialLR that is not"):
        optimizer.detach(schedule)
    optimizer.attach(schedule)
    with pytest.raises(ValueError, match="not be attached twice"):
        optimizer.attach(schedule)
    with pytest.raises(ValueError, match="got a StepLR beside a ExponentialLR: attach a ChainedScheduler"):
        optimizer.attach(lr_scheduler.StepLR(optimizer, 3))


def test_a_copy_has_nothing_attached() -> None:
    optimizer = compiled_optim.AdamW(groups())
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.9)
    optimizer.attach(schedule)
    duplicate = copy.deepcopy(optimizer)
    step(duplicate, 0)
    assert [group["lr"] for group in duplicate.param_groups] == list(LRS)
    assert schedule.last_epoch == 0
