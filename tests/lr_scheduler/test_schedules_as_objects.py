"""What torch's schedulers are besides their values: names, checks, warnings, copies, and files."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from schedule_cases import ARGUMENTS, CASES, STATEFUL, make_optimizer, near, scheduled, step, theirs

from compiled_optim import lr_scheduler as ours
from compiled_optim.lr_scheduler.symbolic import t

EVERY = CASES | STATEFUL
NAMES = [name for name in ours.__all__ if hasattr(theirs, name)]


def test_all_of_torch_is_here() -> None:
    assert {*torch.optim.lr_scheduler.__all__, "SWALR"} == set(NAMES)
    assert ours.LRScheduler is torch.optim.lr_scheduler.LRScheduler


@pytest.mark.parametrize("name", NAMES)
def test_subclasses_with_the_same_arguments(name: str) -> None:
    mine, stock = getattr(ours, name), getattr(theirs, name)
    assert issubclass(mine, stock)
    assert inspect.signature(mine) == inspect.signature(stock)
    assert mine.__doc__


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("ConstantLR", {"factor": 2.0}),
        ("LinearLR", {"start_factor": 0.0}),
        ("OneCycleLR", {"max_lr": 0.1}),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 5, "pct_start": 2.0}),
        ("CyclicLR", {"base_lr": [0.1], "max_lr": 0.2}),
        ("CosineAnnealingWarmRestarts", {"T_0": 0}),
        ("SWALR", {"swa_lr": 0.1, "anneal_strategy": "steep"}),
        ("LambdaLR", {"lr_lambda": []}),
        ("MultiplicativeLR", {"lr_lambda": 3}),
        ("StepLR", {"step_size": 3, "last_epoch": 4}),
        ("StepLR", {}),
    ],
)
def test_refuses_what_torch_refuses(name: str, arguments: dict[str, Any]) -> None:
    messages = []
    for module in (ours, theirs):
        with pytest.raises((TypeError, ValueError, KeyError)) as error:
            getattr(module, name)(make_optimizer(), **arguments)
        messages.append((type(error.value), str(error.value)))
    assert messages[0] == messages[1]


def caught(scheduler: Any, call: str) -> list[Any]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        getattr(scheduler, call)()
    return [(w.category, str(w.message)) for w in found]


@pytest.mark.parametrize("case", ["StepLR", "LambdaLR", "OneCycleLR", "CyclicLR", "SWALR", "MultiplicativeLR"])
def test_warnings(case: str) -> None:
    """Of a step of the scheduler before one of the optimizer, of an overridden step, of get_lr called by hand."""
    seen = []
    for module in (ours, theirs):
        early = CASES[case](module, make_optimizer())
        replaced = CASES[case](module, make_optimizer())
        replaced.optimizer.step = lambda: None
        seen.append([caught(early, "step"), caught(early, "step"), caught(replaced, "step"), caught(early, "get_lr")])
    assert seen[0] == seen[1]
    assert [len(s) for s in seen[0]] == [1, 0, 1, 1]


@pytest.mark.filterwarnings("ignore:Seems like `optimizer.step:UserWarning")  # torch does not watch a copy's steps
@pytest.mark.parametrize("case", EVERY)
def test_copies(case: str) -> None:
    scheduler = EVERY[case](ours, make_optimizer(dtype=torch.float64))
    reference = EVERY[case](theirs, make_optimizer())
    for _ in range(20):
        step(scheduler)
        step(reference)
    scheduler.expression() if case in CASES else None
    copies = [copy.deepcopy(scheduler)]
    if not {"lr_lambda", "scale_fn"} & set(ARGUMENTS.get(case, [])) and case not in STATEFUL:  # lambdas, here
        copies.append(pickle.loads(pickle.dumps(scheduler)))
    before = scheduled(scheduler.optimizer)
    for other in copies:
        for _ in range(20):
            step(other)
    assert scheduled(scheduler.optimizer) == before
    for _ in range(20):
        step(reference)
    for other in copies:
        assert scheduled(other.optimizer) == near(scheduled(reference.optimizer))
        assert other.optimizer is not scheduler.optimizer


@pytest.mark.parametrize("case", CASES)
def test_state_is_that_of_torch_and_goes_through_a_file(case: str) -> None:
    pair = [CASES[case](m, make_optimizer()) for m in (ours, theirs)]
    for scheduler in pair:
        for _ in range(5):
            step(scheduler)
        scheduler.state_dict()
    pair[0].value(3)
    states = []
    for scheduler in pair:
        file = io.BytesIO()
        torch.save(scheduler.state_dict(), file)
        file.seek(0)
        states.append(torch.load(file, weights_only=True))
    assert list(states[0]) == list(states[1])
    assert str(states[0]).count(":") == str(states[1]).count(":")


def test_loading_leaves_the_state_as_it_was() -> None:
    """torch's CyclicLR takes an entry out of it."""
    scheduler = CASES["CyclicLR"](ours, make_optimizer())
    state = scheduler.state_dict()
    scheduler.load_state_dict(state)
    scheduler.load_state_dict(state)
    stock = CASES["CyclicLR"](theirs, make_optimizer())
    stock.load_state_dict(state)
    with pytest.raises(KeyError, match="_scale_fn_custom"):
        stock.load_state_dict(state)


def test_states_share_nothing() -> None:
    scheduler = ours.StepLR(make_optimizer(dtype=torch.float64), 3)
    state = scheduler.state_dict()
    other = ours.StepLR(make_optimizer(dtype=torch.float64), 3)
    other.load_state_dict(state)
    state["base_lrs"][0].fill_(5.0)
    assert scheduler.base_lrs[0].item() == other.base_lrs[0].item() == 0.1


def test_a_callable_object_is_saved() -> None:
    class Decay:
        def __init__(self, rate: float) -> None:
            self.rate = rate

        def __call__(self, i: Any) -> Any:
            return self.rate**i

    saved = theirs.LambdaLR(make_optimizer(), Decay(0.5)).state_dict()
    scheduler = ours.LambdaLR(make_optimizer(), Decay(0.9))
    scheduler.load_state_dict(saved)
    assert scheduler.value(2) == near(0.025)
    assert float(scheduler.expression().subs(t, 2)) == near(0.025)


def test_a_subclass_may_override_what_torch_lets_it() -> None:
    class Doubled(ours.StepLR):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            super().__init__(optimizer, 2, 0.5)

        def get_lr(self) -> list[Any]:
            return [2 * lr for lr in super().get_lr()]

    scheduler = Doubled(make_optimizer())
    step(scheduler)
    assert scheduled(scheduler.optimizer)[0] == near(0.4)
    step(scheduler)
    assert scheduled(scheduler.optimizer)[0] == near(0.4)
