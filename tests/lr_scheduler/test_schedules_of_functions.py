"""Attached schedules that are no formula: functions with branches and tables, objects of torch and transformers.

The oracle is torch's scheduler, stepped by hand after each step of torch's optimizer.
"""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ready_cases import READY, of_torch
from schedule_cases import CASES, STATEFUL, near, scheduled, theirs

import compiled_optim
from compiled_optim import explain
from compiled_optim import lr_scheduler as ours

Build = Callable[[Any, Any], Any]
EVERY = CASES | STATEFUL
TABLE = [1.0, 0.5, 0.25, 0.7]
kinds = pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])
modules = pytest.mark.parametrize("module", [ours, theirs], ids=["ours", "torch's"])


def cosine(step: int, *, warmup: int, total: int) -> float:
    if step < warmup:
        return step / max(1, warmup)
    progress = float(step - warmup) / float(max(1, total - warmup))
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


FUNCTIONS: dict[str, Callable[[int], float]] = {
    "if": lambda i: 1.0 if i < 4 else 0.1,
    "min, max, math": lambda i: max(0.2, min(1.0, math.exp(-i / 9) + math.sqrt(i) / 50)),
    "a table": lambda i: TABLE[i % len(TABLE)],
    "a partial": functools.partial(cosine, warmup=5, total=30),
    "a formula": lambda i: 0.9**i,
}


def make(optim: Any = compiled_optim, tensor: bool = False, **options: Any) -> Any:
    rates = [torch.tensor(lr, dtype=torch.float64) if tensor else lr for lr in (0.1, 0.02)]
    groups = [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": lr} for lr in rates]
    return optim.SGD(groups, lr=0.1, momentum=0.9, **options)


def run(optimizer: Any, steps: int, schedule: Any = None, before: Any = None) -> list[list[float]]:
    """What the steps set; ``schedule`` is stepped by hand, and ``before`` called with the number of each step."""
    seen = []
    for i in range(steps):
        if before is not None:
            before(i)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, 0.5)
        optimizer.step()
        if schedule is not None:
            schedule.step()
        seen.append(scheduled(optimizer))
    return seen


def rows(values: list[list[float]]) -> Any:
    return [near(row) for row in values]


@modules
@kinds
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_any_function_does_what_it_does_by_hand(compiled: bool, tensor: bool, module: Any) -> None:
    for function in FUNCTIONS.values():
        stock = make(torch.optim)
        expected = run(stock, 12, theirs.LambdaLR(stock, function))
        optimizer = make(tensor=tensor, compiled=compiled)
        schedule = module.LambdaLR(optimizer, function)
        optimizer.attach(schedule)
        assert run(optimizer, 12) == rows(expected)
        assert list(map(float, schedule.get_last_lr())) == near(expected[-1][:2])
        for mine, theirs_ in zip(optimizer.param_groups, stock.param_groups, strict=True):
            torch.testing.assert_close(mine["params"][0], theirs_["params"][0])


@modules
def test_a_function_is_called_once_a_step_and_what_it_reads_may_change(module: Any) -> None:
    """As torch calls it: with the number of the step, for each param group."""
    asked: list[int] = []
    factor = 1.0

    def read(step: int) -> float:
        asked.append(step)
        assert type(step) is int
        return factor

    def change(i: int) -> None:
        nonlocal factor
        factor = 1 / (2 + i)

    stock, optimizer = make(torch.optim), make()
    reference = theirs.LambdaLR(stock, read)
    expected = run(stock, 8, reference, change)
    by_hand = asked.copy()
    asked.clear()
    factor = 1.0
    optimizer.attach(module.LambdaLR(optimizer, read))
    assert run(optimizer, 8, before=change) == rows(expected)
    assert asked == by_hand
    before = len(asked)
    str(explain(optimizer))
    assert len(asked) == before


def test_explain_says_that_it_is_no_formula() -> None:
    def notes(schedule: Any) -> list[str]:
        optimizer = schedule.optimizer
        optimizer.attach(schedule)
        run(optimizer, 1)
        found = explain(optimizer)
        assert str(found).splitlines()[-len(found.notes) :] == found.notes or not found.notes
        optimizer.detach(schedule)
        assert not explain(optimizer).notes
        return found.notes

    (called,) = notes(ours.LambdaLR(make(), lambda i: 1.0 if i < 4 else 0.1))
    assert called == "the attached LambdaLR moves on the host and by no formula: each step calls lr_lambda"
    (called,) = notes(ours.warmup(ours.MultiplicativeLR(make(), lambda i: 0.9), 5))
    assert called == "the attached Warmup moves on the host and by no formula: each step calls lr_lambda"
    (called,) = notes(ours.CyclicLR(make(), 0.1, 0.2, scale_fn=lambda x: 0.9**x))
    assert called.endswith("each step calls scale_fn")
    (called,) = notes(theirs.StepLR(make(), 3))
    assert called.endswith("a torch.optim.lr_scheduler.StepLR has none: take the one of compiled_optim.lr_scheduler")
    (called,) = notes(STATEFUL["SequentialLR-SWALR"](ours, make()))
    assert "MultiplicativeLR at index 1 goes on from the lr it finds" in called
    for build in (lambda o: ours.StepLR(o, 3), lambda o: ours.warmup(ours.get_rex_schedule(o, 1, 9), 3)):
        assert not notes(build(make()))


@pytest.mark.parametrize("case", EVERY)
def test_objects_of_torch_are_attached(case: str) -> None:
    stock, optimizer = make(torch.optim), make()
    reference, schedule = EVERY[case](theirs, stock), EVERY[case](theirs, optimizer)
    cls = type(schedule)
    optimizer.attach(schedule)
    assert isinstance(schedule, cls)
    assert type(schedule).__name__ == cls.__name__
    assert run(optimizer, 15) == rows(run(stock, 15, reference))
    with pytest.raises(RuntimeError, match=f"this {cls.__name__} is attached, and moves with"):
        schedule.step()
    assert schedule.state_dict().keys() == reference.state_dict().keys()
    optimizer.detach(schedule)
    assert type(schedule) is cls
    assert run(optimizer, 5, schedule) == rows(run(stock, 5, reference))


@pytest.mark.parametrize("case", READY)
def test_schedules_as_transformers_builds_them_are_attached(case: str) -> None:
    stock, optimizer = make(torch.optim), make()
    reference = of_torch(stock, case)
    optimizer.attach(of_torch(optimizer, case))
    assert run(optimizer, 30) == rows(run(stock, 30, reference))


# ---- checkpoints, copies, groups, ends


@modules
@kinds
def test_both_checkpoints_in_any_order(module: Any, tensor: bool) -> None:
    def build() -> Any:
        optimizer = make(tensor=tensor)
        schedule = module.LambdaLR(optimizer, FUNCTIONS["a partial"])
        optimizer.attach(schedule)
        return optimizer, schedule

    optimizer, schedule = build()
    run(optimizer, 7)
    file = io.BytesIO()
    torch.save([optimizer.state_dict(), schedule.state_dict()], file)
    expected = run(optimizer, 10)
    for order in ((0, 1), (1, 0), (1,)):
        pair = build()
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        for i in order:
            pair[i].load_state_dict(saved[i])
        assert list(map(float, pair[1].get_last_lr())) == near(scheduled(pair[0])[:2])
        assert run(pair[0], 10) == rows(expected)


def test_the_checkpoint_of_the_optimizer_alone() -> None:
    """Its count of steps is the place, if the function gives the learning rates that were loaded there."""

    def build(module: Any, function: Any) -> Any:
        groups = [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": lr} for lr in (0.1, 0.02)]
        optimizer = compiled_optim.AdamW(groups)
        optimizer.attach(module.LambdaLR(optimizer, function))
        return optimizer

    for module, other, place in ((ours, "if", "12, where"), (ours, "a table", "0, for"), (theirs, "if", "0, for")):
        optimizer, resumed = build(module, FUNCTIONS["if"]), build(module, FUNCTIONS[other])
        run(optimizer, 12)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        with pytest.warns(UserWarning, match=f"the attached LambdaLR did not: it goes on from step {place}"):
            run(resumed, 1)


def test_copies_and_pickles_of_an_attached_object_of_torch_are_plain() -> None:
    optimizer = make()
    schedule = theirs.LambdaLR(optimizer, FUNCTIONS["a partial"])
    optimizer.attach(schedule)
    run(optimizer, 7)
    for duplicate in (copy.deepcopy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert type(duplicate) is theirs.LambdaLR
        assert duplicate.optimizer is not optimizer
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen = run(duplicate.optimizer, 3, duplicate)
        stock = make(torch.optim)
        assert seen == rows(run(stock, 10, theirs.LambdaLR(stock, FUNCTIONS["a partial"]))[7:])
    assert schedule.last_epoch == 7


@modules
@pytest.mark.parametrize(
    ("build", "steps"),
    [
        (lambda m, o: m.OneCycleLR(o, 0.3, 6), 6),
        (lambda m, o: m.SequentialLR(o, [m.ConstantLR(o, 0.5, 9), m.OneCycleLR(o, 0.3, 6)], [3]), 9),
        (lambda m, o: m.ChainedScheduler([m.OneCycleLR(o, 0.3, 6), m.StepLR(o, 2)]), 6),
    ],
    ids=["alone", "in a sequence", "in a chain"],
)
def test_past_its_end_nothing_is_updated(module: Any, build: Build, steps: int) -> None:
    optimizer = make()
    schedule = build(module, optimizer)
    optimizer.attach(schedule)
    run(optimizer, steps)
    before = copy.deepcopy((optimizer.param_groups, optimizer.state_dict()["state"]))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"Tried to step 7 times\. The specified number of total steps is 6"):
            run(optimizer, 1)
    torch.testing.assert_close((optimizer.param_groups, optimizer.state_dict()["state"]), before, rtol=0, atol=0)


def test_a_second_object_that_is_stepped_is_told() -> None:
    optimizer = make()
    optimizer.attach(theirs.ExponentialLR(optimizer, 0.9))
    other = ours.StepLR(optimizer, 1, 0.5)
    with pytest.warns(UserWarning, match="the attached ExponentialLR moves"):
        run(optimizer, 3, other)
    with pytest.raises(ValueError, match="got a StepLR beside a ExponentialLR"):
        optimizer.attach(other)


# ---- graphs


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own
@pytest.mark.parametrize("compiled", [False, True], ids=["traced rule", "operator"])
@kinds
@modules
def test_in_a_compiled_loop(module: Any, tensor: bool, compiled: bool) -> None:
    torch.compiler.reset()
    factor = 1.0

    def read(step: int) -> float:
        return factor / (step + 1) if step < 5 else 0.5

    model = torch.nn.Linear(3, 1).double()
    lr = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
    optimizer = compiled_optim.SGD(model.parameters(), lr=lr, momentum=0.9, compiled=compiled)
    optimizer.attach(module.LambdaLR(optimizer, read))

    @torch.compile(backend="eager")
    def train(x: torch.Tensor) -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    for i in range(8):
        assert float(optimizer.param_groups[0]["lr"]) == near(0.1 * (1.0 if i == 0 else read(i)))
        factor = 1 / (i + 1)
        train(torch.ones(2, 3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda o: ours.LambdaLR(o, FUNCTIONS["if"]), "lr_lambda of param group 0 is not symbolic: it takes no symbol"),
        (lambda o: theirs.StepLR(o, 3), "a torch.optim.lr_scheduler.StepLR has none: take the one of compiled_optim"),
        (lambda o: STATEFUL["ChainedScheduler-cosines"](ours, o), "ChainedScheduler is not symbolic"),
    ],
)
def test_in_a_cuda_graph_a_formula_is_needed(build: Any, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is said before a step; here the CPU stands in for the device."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": torch.tensor(0.1)} for _ in range(2)]
    optimizer = compiled_optim.AdamW(groups, capturable=True)
    optimizer.attach(build(optimizer))
    optimizer._opt_called = True
    attached: Any = optimizer._attached
    attached.check()
    attached.advance()
    before = [float(group["lr"]) for group in optimizer.param_groups]
    with monkeypatch.context() as capturing:
        capturing.setattr("compiled_optim.attached.is_capturing", lambda device: True)
        for _ in range(2):
            with pytest.raises(TypeError, match=f"in a CUDA graph a schedule needs a formula, and {why}"):
                attached.check()
    assert [float(group["lr"]) for group in optimizer.param_groups] == before
    attached.check()
    attached.advance()
    assert optimizer._attached.schedule.get_last_lr() == [float(group["lr"]) for group in optimizer.param_groups]


def test_a_learning_rate_on_a_device_is_set_from_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function of the host gives it, and nothing is read back; here the CPU stands in for the device."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(3))], "lr": torch.tensor(0.1)} for _ in range(2)]
    optimizer = compiled_optim.AdamW(groups, capturable=True)
    given = [group["lr"] for group in optimizer.param_groups]
    schedule = ours.LambdaLR(optimizer, FUNCTIONS["if"])
    optimizer.attach(schedule)
    optimizer._opt_called = True
    attached: Any = optimizer._attached

    def refuse(*_: Any) -> None:
        raise AssertionError("a value was read from a tensor")

    for i in range(8):
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "item", refuse)
            patch.setattr(torch.Tensor, "__float__", refuse)
            attached.check()
            attached.advance()
        assert [float(lr) for lr in given] == near([0.1 * FUNCTIONS["if"](i + 1)] * 2, 1e-6)
