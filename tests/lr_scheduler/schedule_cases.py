"""The table of schedulers that the tests go through, ours beside torch's."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import swa_utils

import compiled_optim

theirs = types.SimpleNamespace(**vars(torch.optim.lr_scheduler), SWALR=swa_utils.SWALR)
STEPS = 300
LRS = (0.1, 0.02)  # of two param groups
Build = Callable[[Any, torch.optim.Optimizer], Any]


def rising(i: Any) -> Any:
    return (i + 1) / 50


_TABLE: dict[str, tuple[str, dict[str, Any]]] = {
    "StepLR": ("StepLR", {"step_size": 49, "gamma": 0.5}),
    "StepLR-zero": ("StepLR", {"step_size": 100, "gamma": 0.0}),
    "MultiStepLR": ("MultiStepLR", {"milestones": [20, 150, 150, 7], "gamma": 0.3}),
    "ConstantLR": ("ConstantLR", {"factor": 0.4, "total_iters": 60}),
    "ConstantLR-for-ever": ("ConstantLR", {"factor": 0.4, "total_iters": 0}),
    "LinearLR": ("LinearLR", {"start_factor": 0.1, "end_factor": 0.7, "total_iters": 90}),
    "LinearLR-to-zero": ("LinearLR", {"start_factor": 1.0, "end_factor": 0.0, "total_iters": 50}),
    "LinearLR-for-ever": ("LinearLR", {"total_iters": 0}),
    "ExponentialLR": ("ExponentialLR", {"gamma": 0.97}),
    "ExponentialLR-underflow": ("ExponentialLR", {"gamma": 0.01}),
    "PolynomialLR": ("PolynomialLR", {"total_iters": 120, "power": 1.5}),
    "PolynomialLR-for-ever": ("PolynomialLR", {"total_iters": 0}),
    "CosineAnnealingLR": ("CosineAnnealingLR", {"T_max": 70}),
    "CosineAnnealingLR-eta_min": ("CosineAnnealingLR", {"T_max": 7, "eta_min": 0.003}),
    "LambdaLR": ("LambdaLR", {"lr_lambda": lambda i: 0.98**i}),
    "LambdaLR-floor": ("LambdaLR", {"lr_lambda": [lambda i: 0.5 ** (i // 49), rising]}),
    "MultiplicativeLR": ("MultiplicativeLR", {"lr_lambda": lambda _: 0.98}),
    "MultiplicativeLR-product": ("MultiplicativeLR", {"lr_lambda": lambda i: i / (i + 1)}),
    "CosineAnnealingWarmRestarts": ("CosineAnnealingWarmRestarts", {"T_0": 49, "eta_min": 0.001}),
    "CosineAnnealingWarmRestarts-3": ("CosineAnnealingWarmRestarts", {"T_0": 2, "T_mult": 3}),
    "CyclicLR": ("CyclicLR", {"base_lr": 0.01, "max_lr": [0.3, 0.2], "step_size_up": 15, "step_size_down": 34}),
    "CyclicLR-up": ("CyclicLR", {"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 20, "step_size_down": 0}),
    "CyclicLR-triangular2": (
        "CyclicLR",
        {"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 17, "mode": "triangular2", "cycle_momentum": False},
    ),
    "CyclicLR-exp_range": (
        "CyclicLR",
        {"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 20, "mode": "exp_range", "gamma": 0.99},
    ),
    "CyclicLR-scale_fn": (
        "CyclicLR",
        {"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 20, "scale_fn": lambda cycle: 1 / cycle**2},
    ),
    "CyclicLR-scale_fn-iterations": (
        "CyclicLR",
        {
            **{"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 20},
            **{"scale_fn": lambda i: 1 / (1 + 0.005 * i), "scale_mode": "iterations"},
        },
    ),
    "OneCycleLR": ("OneCycleLR", {"max_lr": [0.3, 0.2], "total_steps": 301}),
    "OneCycleLR-linear": (
        "OneCycleLR",
        {"max_lr": 0.3, "epochs": 10, "steps_per_epoch": 31, "anneal_strategy": "linear", "cycle_momentum": False},
    ),
    "OneCycleLR-three": ("OneCycleLR", {"max_lr": 0.3, "total_steps": 310, "three_phase": True, "pct_start": 0.4}),
    "SWALR": ("SWALR", {"swa_lr": 0.05, "anneal_epochs": 40}),
    "SWALR-linear": ("SWALR", {"swa_lr": [0.05, 0.03], "anneal_epochs": 70, "anneal_strategy": "linear"}),
    "SWALR-at-once": ("SWALR", {"swa_lr": 0.05, "anneal_epochs": 0}),
}
# functions that take no symbol
_OF_NUMBERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LambdaLR-of-numbers": ("LambdaLR", {"lr_lambda": lambda i: math.cos(i) if i < 200 else 0.1}),
    "CyclicLR-of-numbers": (
        "CyclicLR",
        {"base_lr": 0.01, "max_lr": 0.3, "step_size_up": 20, "scale_fn": lambda x: math.exp(-x)},
    ),
}


def _builder(name: str, arguments: dict[str, Any]) -> Build:
    return lambda module, optimizer: getattr(module, name)(optimizer, **arguments)


CASES: dict[str, Build] = {
    **{case: _builder(*entry) for case, entry in _TABLE.items()},
    "SequentialLR": lambda m, o: m.SequentialLR(
        o,
        [
            m.LinearLR(o, start_factor=0.1, total_iters=20),
            m.CosineAnnealingLR(o, T_max=80),
            m.CosineAnnealingWarmRestarts(o, T_0=10, T_mult=2),
            m.ExponentialLR(o, gamma=0.97),
        ],
        milestones=[20, 100, 170],
    ),
    "SequentialLR-OneCycleLR": lambda m, o: m.SequentialLR(
        o, [m.ConstantLR(o, 0.5, 10), m.OneCycleLR(o, 0.3, total_steps=290, cycle_momentum=False)], milestones=[20]
    ),
    "ChainedScheduler": lambda m, o: m.ChainedScheduler(
        [m.ConstantLR(o, 0.5, 30), m.ExponentialLR(o, 0.99), m.CosineAnnealingLR(o, T_max=310)], optimizer=o
    ),
    "ChainedScheduler-one": lambda m, o: m.ChainedScheduler([m.CosineAnnealingLR(o, T_max=70, eta_min=0.001)]),
}
# no function of the step that sympy knows: of numbers only, or they go on from what they find
STATEFUL: dict[str, Build] = {
    **{case: _builder(*entry) for case, entry in _OF_NUMBERS.items()},
    "ChainedScheduler-cosines": lambda m, o: m.ChainedScheduler(
        [m.CosineAnnealingLR(o, T_max=33, eta_min=0.001), m.LambdaLR(o, rising), m.CosineAnnealingLR(o, T_max=50)]
    ),
    "SequentialLR-SWALR": lambda m, o: m.SequentialLR(
        o, [m.PolynomialLR(o, 90), m.MultiplicativeLR(o, lambda _: 0.9), m.SWALR(o, 0.05)], milestones=[60, 90]
    ),
}
OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "torch.SGD": (torch.optim.SGD, {"momentum": 0.9}),
    "torch.AdamW": (torch.optim.AdamW, {}),
    "SGD": (compiled_optim.SGD, {"momentum": 0.9}),
    "AdamW": (compiled_optim.AdamW, {}),
}


def make_optimizer(kind: str = "torch.SGD", dtype: torch.dtype | None = None, **more: Any) -> torch.optim.Optimizer:
    """Two param groups; with a dtype, of tensor learning rates."""
    cls, options = OPTIMIZERS[kind]
    lrs = [lr if dtype is None else torch.tensor(lr, dtype=dtype) for lr in LRS]
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))], "lr": lr} for lr in lrs]
    optimizer: torch.optim.Optimizer = cls(groups, **options, **more)
    return optimizer


def scheduled(optimizer: torch.optim.Optimizer) -> list[float]:
    """What schedulers move: learning rates, then momenta."""
    groups = optimizer.param_groups
    momenta = [g["betas"][0] if "betas" in g else g["momentum"] for g in groups]
    values = [*(g["lr"] for g in groups), *momenta]
    return [float(v.detach() if isinstance(v, torch.Tensor) else v) for v in values]


def step(scheduler: Any) -> None:
    scheduler.optimizer.step()
    scheduler.step()


def near(values: Any, rel: float = 1e-12) -> Any:
    """To a relative error, and where a schedule comes down to 0, relative to a learning rate of 0.1."""
    values = list(map(float, values)) if isinstance(values, list) else float(values)
    return pytest.approx(values, rel=rel, abs=0.1 * rel)


ARGUMENTS = {case: arguments for case, (_, arguments) in (_TABLE | _OF_NUMBERS).items()}
