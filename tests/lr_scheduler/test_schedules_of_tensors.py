"""Learning rates, betas and momenta that are tensors stay those tensors, and nothing shares their memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from schedule_cases import CASES, OPTIMIZERS, STATEFUL, Build, make_optimizer, near, scheduled, step, theirs

from compiled_optim import cache_info, explain
from compiled_optim import lr_scheduler as ours
from compiled_optim.lr_scheduler.scheduler import Scheduler

EVERY = CASES | STATEFUL
every = pytest.mark.parametrize("case", EVERY)
MOMENTA = [case for case in EVERY if case.startswith(("OneCycle", "Cyclic"))]


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors in what a scheduler or a param group holds, those of its schedulers too."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Scheduler):
        value = {k: v for k, v in vars(value).items() if k != "optimizer"}
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else []
    return [tensor for part in parts for tensor in tensors(part)]


@every
@pytest.mark.parametrize("shape", [(), (1,)], ids=["0-d", "1-element"])
def test_filled_in_place_and_never_aliased(case: str, shape: tuple[int, ...]) -> None:
    optimizer = make_optimizer(dtype=torch.float32)
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].reshape(shape).clone()
    lrs = [group["lr"] for group in optimizer.param_groups]
    scheduler = EVERY[case](ours, optimizer)
    reference = EVERY[case](theirs, make_optimizer())
    last = scheduler.get_last_lr()
    for _ in range(40):
        step(scheduler)
        step(reference)
        assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, lrs, strict=True))
        assert scheduled(optimizer) == near(scheduled(reference.optimizer), 1e-5)
        found = tensors(scheduler) + tensors(last) + tensors(scheduler.get_last_lr()) + tensors(scheduler.state_dict())
        for group in optimizer.param_groups:
            found += tensors({k: v for k, v in group.items() if k not in ("params", "lr")})
        assert found
        assert not {t.data_ptr() for t in found} & {lr.data_ptr() for lr in lrs}
    assert {lr.dtype for lr in lrs} == {torch.float32}
    assert {lr.shape for lr in lrs} == {shape}
    for returned in scheduler.get_last_lr():  # what a caller does to it is his business
        returned.fill_(9.0)
    assert max(map(float, scheduler.get_last_lr())) < 9


@pytest.mark.parametrize("case", MOMENTA)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_tensor_momenta(case: str, kind: str) -> None:
    """torch replaces them by numbers."""
    optimizer, stock = make_optimizer(kind), make_optimizer(f"torch.{kind.removeprefix('torch.')}")
    given = []
    for group in optimizer.param_groups:
        given.append(torch.tensor(0.9, dtype=torch.float64))
        if "betas" in group:
            group["betas"] = (given[-1], torch.tensor(0.999, dtype=torch.float64))
        else:
            group["momentum"] = given[-1]
    scheduler, reference = EVERY[case](ours, optimizer), EVERY[case](theirs, stock)
    for _ in range(30):
        now = [g["betas"][0] if "betas" in g else g["momentum"] for g in optimizer.param_groups]
        assert all(a is b for a, b in zip(now, given, strict=True))
        assert scheduled(optimizer) == near(scheduled(stock))
        scheduler.optimizer._opt_called = reference.optimizer._opt_called = True
        scheduler.step()
        reference.step()


@pytest.mark.parametrize("case", [case for case in MOMENTA if case != "CyclicLR"])
def test_a_float_stays_a_float(case: str) -> None:
    """Also where the limits of a cycle are tensors; torch puts a tensor in its place."""
    arguments = {"OneCycleLR": {"max_lr": 0.3, "total_steps": 50}}.get(
        case.split("-")[0], {"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 20}
    )
    limits = {k: torch.tensor(v, dtype=torch.float64) if k.endswith("_lr") else v for k, v in arguments.items()}
    optimizer = make_optimizer()
    scheduler = getattr(ours, case.split("-")[0])(optimizer, **limits)
    reference = getattr(theirs, case.split("-")[0])(make_optimizer(), **arguments)
    for _ in range(30):
        assert {type(group["lr"]) for group in optimizer.param_groups} == {float}
        assert scheduled(optimizer) == near(scheduled(reference.optimizer))
        assert scheduler.value(torch.tensor(scheduler.last_epoch)).shape == ()
        step(scheduler)
        step(reference)
    assert limits["max_lr"].item() == 0.3


@every
def test_a_learning_rate_that_requires_grad(case: str) -> None:
    optimizer = make_optimizer(dtype=torch.float64)
    for group in optimizer.param_groups:
        group["lr"].requires_grad_()
    scheduler, reference = EVERY[case](ours, optimizer), EVERY[case](theirs, make_optimizer())
    for _ in range(30):
        step(scheduler)
        step(reference)
        assert scheduled(optimizer) == near(scheduled(reference.optimizer))
    assert all(group["lr"].requires_grad and group["lr"].is_leaf for group in optimizer.param_groups)
    assert not any(t.requires_grad for t in tensors(scheduler) + tensors(scheduler.get_last_lr()))


@every
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_checkpoint_of_floats(case: str, kind: str) -> None:
    saved = EVERY[case](theirs, make_optimizer(f"torch.{kind}"))
    for _ in range(17):
        step(saved)
    optimizer = make_optimizer(kind, torch.float64)
    lrs = [group["lr"] for group in optimizer.param_groups]
    scheduler = EVERY[case](ours, optimizer)
    optimizer.load_state_dict(saved.optimizer.state_dict())
    scheduler.load_state_dict(copy.deepcopy(saved.state_dict()))
    for _ in range(40):
        assert scheduled(optimizer) == near(scheduled(saved.optimizer))
        step(scheduler)
        step(saved)
    assert all(group["lr"] is lr for group, lr in zip(optimizer.param_groups, lrs, strict=True))


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["float", "tensor"])
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad:UserWarning")  # torch's float(lr)
def test_plateau(dtype: torch.dtype | None) -> None:
    metrics = [1.0, 0.9, 0.95, 0.96, 0.97, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    schedulers = []
    for module in (ours, theirs):
        scheduler = module.ReduceLROnPlateau(make_optimizer(dtype=dtype), factor=0.5, patience=1, min_lr=[0.02, 0.001])
        schedulers.append(scheduler)
    mine, stock = schedulers
    before = [group["lr"] for group in mine.optimizer.param_groups]
    for metric in metrics:
        mine.step(metric)
        stock.step(torch.tensor(metric, dtype=torch.float64))
        assert scheduled(mine.optimizer) == scheduled(stock.optimizer)
        assert mine.get_last_lr() == stock.get_last_lr()
        stock.load_state_dict(mine.state_dict())
        mine.load_state_dict(stock.state_dict())
    assert scheduled(mine.optimizer)[0] == 0.02
    if dtype is not None:
        assert all(group["lr"] is lr for group, lr in zip(mine.optimizer.param_groups, before, strict=True))
        mine.optimizer.param_groups[0]["lr"].fill_(1.0).requires_grad_()
        for _ in range(3):
            mine.step(9.0)
        assert mine.optimizer.param_groups[0]["lr"].item() == 0.5
    with pytest.raises(TypeError, match="depends on the metric"):
        mine.expression()
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        ours.SequentialLR(mine.optimizer, [mine], milestones=[])


# ---- compiled steps


ONE_CYCLE: dict[str, Build] = {
    f"OneCycleLR-{phases}": lambda m, o, phases=phases: m.OneCycleLR(o, 0.3, total_steps=1001, three_phase=phases == 3)
    for phases in (2, 3)
}


@pytest.mark.parametrize("dtype", [None, torch.float32], ids=["float", "tensor"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_a_thousand_steps_make_no_new_kernel(kind: str, dtype: torch.dtype | None) -> None:
    misses = 0
    for case, build in {k: v for k, v in EVERY.items() if "OneCycleLR" not in k}.items() | ONE_CYCLE.items():
        if kind == "SGD" and case not in [*MOMENTA, *ONE_CYCLE]:
            continue
        optimizer = make_optimizer(kind, dtype, compiled=True)
        for group in optimizer.param_groups:
            group["params"][0].grad = torch.full((2,), 1e-3)
        scheduler = build(ours, optimizer)
        for _ in range(1000):
            step(scheduler)
            misses = misses or cache_info().misses
        assert cache_info().misses == misses, case
        assert {row.execution for row in explain(optimizer)} == {"multi_tensor"}
        assert len(explain(optimizer).rebuilt) == 1
