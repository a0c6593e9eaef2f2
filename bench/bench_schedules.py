"""One step of each schedule: ours against torch's, and attached to the optimizer against stepped by hand."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import pytest
import torch
from torch.optim import swa_utils

import compiled_optim
from compiled_optim import lr_scheduler as ours

STEPS, ROUNDS = 200, 41
Build = Callable[[Any, Any], Any]
SCHEDULES: dict[str, Build] = {
    "StepLR": lambda m, o: m.StepLR(o, 30),
    "MultiStepLR": lambda m, o: m.MultiStepLR(o, [10, 1000]),
    "ConstantLR": lambda m, o: m.ConstantLR(o),
    "LinearLR": lambda m, o: m.LinearLR(o, total_iters=10**6),
    "ExponentialLR": lambda m, o: m.ExponentialLR(o, 0.9999),
    "PolynomialLR": lambda m, o: m.PolynomialLR(o, 10**6),
    "CosineAnnealingLR": lambda m, o: m.CosineAnnealingLR(o, 10**6, 0.001),
    "CosineAnnealingWarmRestarts": lambda m, o: m.CosineAnnealingWarmRestarts(o, 50),
    "LambdaLR": lambda m, o: m.LambdaLR(o, lambda i: 0.9999**i),
    "MultiplicativeLR": lambda m, o: m.MultiplicativeLR(o, lambda i: 0.9999),
    "CyclicLR": lambda m, o: m.CyclicLR(o, 0.01, 0.3),
    "OneCycleLR": lambda m, o: m.OneCycleLR(o, 0.3, 10**6),
    "SWALR": lambda m, o: m.SWALR(o, 0.05, 10**5),
    "SequentialLR": lambda m, o: m.SequentialLR(o, [m.LinearLR(o), m.ExponentialLR(o, 0.9999)], milestones=[5]),
    "ChainedScheduler": lambda m, o: m.ChainedScheduler([m.LinearLR(o), m.ExponentialLR(o, 0.9999)]),
}


class Torch:
    """The schedulers of torch, which keeps them in two modules."""

    SWALR = swa_utils.SWALR

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.optim.lr_scheduler, name)


def optimizer(groups: int, tensor: bool) -> Any:
    rates = [torch.tensor(0.1) if tensor else 0.1 for _ in range(groups)]
    params = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in rates]
    found = compiled_optim.SGD(params, momentum=0.9)
    found._opt_called = True
    return found


def microseconds(steps: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median time of a call, in rotation; each sample is the mean of many, for one takes a few microseconds."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            begun = perf_counter()
            for _ in range(STEPS):
                step()
            times[name].append((perf_counter() - begun) / STEPS * 1e6)
    return {name: median(samples[1:]) for name, samples in times.items()}


@pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("groups", [1, 8])
@pytest.mark.parametrize("name", SCHEDULES)
def test_step(name: str, groups: int, tensor: bool, benchmark: Any) -> None:
    stock = SCHEDULES[name](Torch(), optimizer(groups, tensor))
    stepped = SCHEDULES[name](ours, optimizer(groups, tensor))
    attaching = optimizer(groups, tensor)
    attached = SCHEDULES[name](ours, attaching)
    attaching.attach(attached)

    def step_attached() -> None:  # what a step of the optimizer does for it
        attaching._attached.check()
        attaching._attached.advance()

    seconds = microseconds(
        {
            "torch": lambda: stock.step(),
            "ours": lambda: stepped.step(),
            "ours attached": lambda: step_attached(),
        }
    )
    benchmark.extra_info.update(
        microseconds={k: round(v, 2) for k, v in seconds.items()},
        ours_over_torch=round(seconds["ours"] / seconds["torch"], 2),
        attached_over_stepped=round(seconds["ours attached"] / seconds["ours"], 2),
    )
    print(f"\n{name}, {groups} groups, {'tensor' if tensor else 'float'}: {benchmark.extra_info}")
    benchmark.pedantic(stepped.step, rounds=5, iterations=STEPS)
