"""A schedule that is attached does what the same schedule does that is stepped after each step, whatever happens."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from schedule_cases import CASES, near, scheduled, theirs

import compiled_optim
from compiled_optim import lr_scheduler as ours

kinds = pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])


def make(tensor: bool = False, optim: Any = compiled_optim, name: str = "SGD") -> Any:
    rates = [torch.tensor(lr, dtype=torch.float64) if tensor else lr for lr in (0.1, 0.02)]
    groups = [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": lr} for lr in rates]
    options = {"momentum": 0.9} if name == "SGD" else {}
    return getattr(optim, name)(groups, lr=0.1, **options)


def run(optimizer: Any, steps: int, *schedules: Any) -> list[list[float]]:
    """What the steps set; schedules that are not attached are stepped after each."""
    seen = []
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, 0.5)
        optimizer.step()
        for schedule in schedules:
            schedule.step()
        seen.append(scheduled(optimizer))
    return seen


def rows(values: list[list[float]]) -> Any:
    return [near(row) for row in values]


def set_rate(schedule: Any, value: float, group: int = 0) -> None:
    groups = schedule.optimizer.param_groups
    lr = groups[group]["lr"]
    groups[group]["lr"] = lr.fill_(value) if isinstance(lr, torch.Tensor) else value


def add_group(schedule: Any) -> None:
    lr = schedule.optimizer.param_groups[0]["lr"]
    added = torch.full_like(lr, 0.05) if isinstance(lr, torch.Tensor) else 0.05
    schedule.optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": added})


Build = Callable[[Any, Any], Any]
CHANGES: dict[str, tuple[Build, Callable[[Any], None]]] = {
    "last_epoch": (lambda m, o: m.LambdaLR(o, lambda i: 0.9**i), lambda s: setattr(s, "last_epoch", 9)),
    "last_epoch, back": (lambda m, o: m.PolynomialLR(o, 20), lambda s: setattr(s, "last_epoch", 0)),
    "base_lrs": (lambda m, o: m.LambdaLR(o, lambda i: 0.9**i), lambda s: setattr(s, "base_lrs", [1.0, 2.0])),
    "a base_lr in its list": (lambda m, o: m.CyclicLR(o, 0.01, 0.3, 4), lambda s: s.base_lrs.__setitem__(1, 0.02)),
    "lr_lambdas": (
        lambda m, o: m.LambdaLR(o, lambda i: 0.9**i),
        lambda s: setattr(s, "lr_lambdas", [lambda i: 0.5**i if i < 6 else 0.1, lambda i: 0.5]),
    ),
    "factors": (
        lambda m, o: m.MultiplicativeLR(o, lambda i: 0.9),
        lambda s: setattr(s, "lr_lambdas", [lambda i: 0.5, lambda i: 0.7]),
    ),
    "gamma": (lambda m, o: m.ExponentialLR(o, 0.9), lambda s: setattr(s, "gamma", 0.5)),
    "step_size": (lambda m, o: m.StepLR(o, 4, 0.5), lambda s: setattr(s, "step_size", 5)),
    "milestones": (lambda m, o: m.MultiStepLR(o, [100], 0.1), lambda s: setattr(s, "milestones", Counter([5]))),
    "a milestone": (lambda m, o: m.MultiStepLR(o, [100], 0.1), lambda s: s.milestones.update([6])),
    "T_max": (lambda m, o: m.CosineAnnealingLR(o, 50), lambda s: setattr(s, "T_max", 10)),
    "eta_min": (lambda m, o: m.CosineAnnealingWarmRestarts(o, 4), lambda s: setattr(s, "eta_min", 0.01)),
    "T_cur": (lambda m, o: m.CosineAnnealingWarmRestarts(o, 9), lambda s: setattr(s, "T_cur", 0.5)),
    "max_lrs": (lambda m, o: m.CyclicLR(o, 0.01, 0.3, 4), lambda s: setattr(s, "max_lrs", [0.6, 0.5])),
    "max_lr of a group": (
        lambda m, o: m.OneCycleLR(o, 0.3, 50),
        lambda s: s.optimizer.param_groups[0].update(max_lr=0.6),
    ),
    "a milestone of a sequence": (
        lambda m, o: m.SequentialLR(o, [m.ConstantLR(o, 0.5, 3), m.ExponentialLR(o, 0.9)], [9]),
        lambda s: s._milestones.__setitem__(0, 5),
    ),
    "a member of a chain": (
        lambda m, o: m.ChainedScheduler([m.ExponentialLR(o, 0.9), m.StepLR(o, 2, 0.5)]),
        lambda s: setattr(s._schedulers[0], "gamma", 0.5),
    ),
    "the rate": (lambda m, o: m.ExponentialLR(o, 0.9), lambda s: set_rate(s, 1.0)),
    "the rate, which is set again": (lambda m, o: m.LambdaLR(o, lambda i: 0.9**i), lambda s: set_rate(s, 1.0)),
    "the rate above a floor": (lambda m, o: m.CosineAnnealingLR(o, 20, 0.01), lambda s: set_rate(s, 1.0, 1)),
    "a group, exponential": (lambda m, o: m.ExponentialLR(o, 0.9), add_group),
    "a group, cosine": (lambda m, o: m.CosineAnnealingLR(o, 20), add_group),
    "a group, cosine with a floor": (lambda m, o: m.CosineAnnealingLR(o, 20, 0.01), add_group),
    "a group, polynomial": (lambda m, o: m.PolynomialLR(o, 20), add_group),
    "a group, chain": (lambda m, o: m.ChainedScheduler([m.ExponentialLR(o, 0.9), m.StepLR(o, 2, 0.5)]), add_group),
}


@kinds
@pytest.mark.parametrize("attach", [False, True], ids=["stepped", "attached"])
@pytest.mark.parametrize(("build", "change"), CHANGES.values(), ids=CHANGES)
def test_what_is_changed_counts(build: Build, change: Callable[[Any], None], attach: bool, tensor: bool) -> None:
    stock = make(optim=torch.optim)
    reference = build(theirs, stock)
    optimizer = make(tensor)
    schedule = build(ours, optimizer)
    if attach:
        optimizer.attach(schedule)
    stepped = () if attach else (schedule,)
    assert run(optimizer, 3, *stepped) == rows(run(stock, 3, reference))
    change(reference)
    change(schedule)
    assert run(optimizer, 5, *stepped) == rows(run(stock, 5, reference))
    assert list(map(float, schedule.get_last_lr())) == near(reference.get_last_lr())


@pytest.mark.parametrize("case", ["LambdaLR", "MultiplicativeLR", "OneCycleLR", "SWALR"])
def test_a_group_that_torch_does_not_schedule_is_refused(case: str) -> None:
    """It has no function, or no limits."""
    for attach in (False, True):
        optimizer = make()
        schedule = CASES[case](ours, optimizer)
        if attach:
            optimizer.attach(schedule)
        add_group(schedule)
        with pytest.raises((KeyError, ValueError)):
            run(optimizer, 1, *(() if attach else (schedule,)))


@kinds
@pytest.mark.parametrize(
    "build",
    [
        lambda m, o: m.OneCycleLR(o, 0.3, 6),
        lambda m, o: m.OneCycleLR(o, 0.3, 6, anneal_strategy="linear", three_phase=True),
        lambda m, o: m.SequentialLR(
            o, [m.ConstantLR(o, 0.5, 2), m.OneCycleLR(o, 0.3, 4, cycle_momentum=False)], milestones=[2]
        ),
    ],
    ids=["cosine", "linear", "in a sequence"],
)
def test_past_its_end_nothing_is_updated(build: Build, tensor: bool) -> None:
    stock = make(optim=torch.optim)
    reference = build(theirs, stock)
    run(stock, 6, reference)
    optimizer = make(tensor)
    schedule = build(ours, optimizer)
    optimizer.attach(schedule)
    run(optimizer, 6)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = copy.deepcopy((params, optimizer.state_dict()["state"], scheduled(optimizer), schedule.last_epoch))
    with pytest.raises(ValueError, match="Tried to step") as expected:
        run(stock, 1, reference)
    for _ in range(2):
        with pytest.raises(ValueError, match="Tried to step") as error:
            run(optimizer, 1)
        assert str(error.value) == str(expected.value)
    after = params, optimizer.state_dict()["state"], scheduled(optimizer), schedule.last_epoch
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize("multiple", [1, 2, 3])
def test_a_fraction_of_an_epoch_is_kept(multiple: int) -> None:
    optimizers = [make(optim=torch.optim), make()]
    reference, schedule = (
        m.CosineAnnealingWarmRestarts(o, 7, multiple) for m, o in zip((theirs, ours), optimizers, strict=True)
    )
    reference.step(30.25)
    schedule.step(30.25)
    optimizers[1].attach(schedule)
    assert run(optimizers[1], 40) == rows(run(optimizers[0], 40, reference))
    assert (schedule.last_epoch, schedule.T_cur, schedule.T_i) == (reference.last_epoch, reference.T_cur, reference.T_i)


# ---- two schedules of one quantity

PAIRS: dict[str, tuple[Build, Build]] = {
    "Linear, Cosine": (lambda m, o: m.LinearLR(o, 0.1, 1.0, 5), lambda m, o: m.CosineAnnealingLR(o, 10)),
    "Exponential, MultiStep": (lambda m, o: m.ExponentialLR(o, 0.9), lambda m, o: m.MultiStepLR(o, [1, 2, 4], 0.1)),
    "Exponential, Cyclic": (lambda m, o: m.ExponentialLR(o, 0.9), lambda m, o: m.CyclicLR(o, 0.01, 0.3, 4)),
    "Lambda, Restarts": (
        lambda m, o: m.LambdaLR(o, lambda i: 0.9**i),
        lambda m, o: m.CosineAnnealingWarmRestarts(o, 3),
    ),
}


@kinds
@pytest.mark.parametrize("of_torch", [False, True], ids=["ours", "torch's"])
@pytest.mark.parametrize(("first", "second"), PAIRS.values(), ids=PAIRS)
def test_one_beside_it_that_is_stepped_warns_once_and_takes_turns(
    first: Build, second: Build, of_torch: bool, tensor: bool
) -> None:
    """What torch's does looks like changes by hand, if it is not after each step that it does something."""
    stock = make(optim=torch.optim)
    expected = run(stock, 7, first(theirs, stock), second(theirs, stock))
    optimizer = make(tensor)
    attached, other = first(ours, optimizer), second(theirs if of_torch else ours, optimizer)
    optimizer.attach(attached)
    with pytest.warns(UserWarning, match=f"the attached {type(attached).__name__} moves") as told:
        seen = run(optimizer, 7, other)
    assert len(told) == 1
    assert seen == rows(expected)


def test_a_change_by_hand_now_and_then_is_no_schedule() -> None:
    optimizer = make()
    schedule = ours.ExponentialLR(optimizer, 0.9)
    optimizer.attach(schedule)
    for _ in range(3):
        set_rate(schedule, 0.3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            run(optimizer, 2)
    assert scheduled(optimizer)[0] == near(0.3 * 0.81)


# ---- detached, kept, copied


@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_detached_it_goes_on_by_hand(build: Build) -> None:
    stock, optimizer = make(optim=torch.optim), make()
    reference, schedule = build(theirs, stock), build(ours, optimizer)
    optimizer.attach(schedule)
    assert run(optimizer, 3) == rows(run(stock, 3, reference))
    optimizer.detach(schedule)
    assert run(optimizer, 3, schedule) == rows(run(stock, 3, reference))
    optimizer.attach(schedule)
    assert run(optimizer, 3) == rows(run(stock, 3, reference))
    assert schedule.optimizer is optimizer


@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_all_is_freed_without_the_collector(build: Build) -> None:
    def train(detach: bool) -> list[Any]:
        optimizer = make()
        schedule = build(ours, optimizer)
        optimizer.attach(schedule)
        run(optimizer, 2)
        if detach:
            optimizer.detach(schedule)
        return [weakref.ref(x) for x in (optimizer, schedule, optimizer.param_groups[0]["params"][0])]

    gc.collect()
    gc.disable()
    try:
        for detach in (False, True):
            assert [ref() for ref in train(detach)] == [None] * 3
    finally:
        gc.enable()


def test_the_optimizer_keeps_the_schedule() -> None:
    optimizer = make()
    optimizer.attach(ours.ExponentialLR(optimizer, 0.5))
    gc.collect()
    run(optimizer, 2)
    assert scheduled(optimizer)[0] == near(0.025)
    (schedule,) = [optimizer._attached.schedule]
    del optimizer
    with pytest.raises(AttributeError, match="ExponentialLR has no optimizer, or is attached to one that exists no mo"):
        schedule.optimizer  # noqa: B018  # it raises


@pytest.mark.parametrize("build", CASES.values(), ids=CASES)
def test_what_a_schedule_is_can_be_copied_and_compared(build: Build) -> None:
    optimizer = make()
    schedule = build(ours, optimizer)
    stock = build(theirs, make(optim=torch.optim))
    assert vars(copy.copy(schedule)) == vars(schedule)
    assert different(schedule, copy.deepcopy(schedule)) == different(stock, copy.deepcopy(stock))
    optimizer.attach(schedule)
    run(optimizer, 2)
    duplicate = copy.deepcopy(schedule)
    run(optimizer, 2)
    assert run(duplicate.optimizer, 2, duplicate)[-1] == near(scheduled(optimizer))


def different(schedule: Any, duplicate: Any) -> set[str]:
    assert vars(schedule).keys() == vars(duplicate).keys()
    return {key for key, value in vars(schedule).items() if value != vars(duplicate)[key]}
