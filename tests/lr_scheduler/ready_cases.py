"""The ready-made schedules: their arguments, and what the formula of transformers or of the paper says, on numbers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch

LR = 0.1  # of the optimizer, and its default


def _rise(t: int, warmup: int) -> float:
    return float(t) / float(max(1, warmup))


def _progress(t: int, warmup: int, total: int) -> float:
    return float(t - warmup) / float(max(1, total - warmup))


# ---- the functions of transformers 5.23 (optimization.py), with what its callers pass


def constant(t: int, *, num_warmup_steps: int = 0) -> float:
    return _rise(t, num_warmup_steps) if t < num_warmup_steps else 1.0


def linear(t: int, *, num_warmup_steps: int, num_training_steps: int) -> float:
    if t < num_warmup_steps:
        return _rise(t, num_warmup_steps)
    return max(0.0, float(num_training_steps - t) / float(max(1, num_training_steps - num_warmup_steps)))


def cosine(
    t: int, *, num_warmup_steps: int, num_training_steps: int, num_cycles: float = 0.5, min_lr_rate: float = 0.0
) -> float:
    if t < num_warmup_steps:
        return _rise(t, num_warmup_steps)
    progress = _progress(t, num_warmup_steps, num_training_steps)
    factor = 0.5 * (1.0 + math.cos(math.pi * float(num_cycles) * 2.0 * progress))
    return max(0, factor * (1 - min_lr_rate) + min_lr_rate)


def cosine_with_floor(t: int, *, min_lr: float | None = None, min_lr_rate: float | None = None, **others: Any) -> float:
    return cosine(t, min_lr_rate=min_lr / LR if min_lr_rate is None else min_lr_rate, **others)  # type: ignore[operator]


def cosine_from_rate(
    t: int,
    *,
    num_warmup_steps: int,
    num_training_steps: int,
    num_cycles: float = 0.5,
    min_lr_rate: float,
    warmup_lr_rate: float | None = None,
) -> float:
    if t < num_warmup_steps:
        if warmup_lr_rate is None:
            return (t + 1.0) / max(1.0, num_warmup_steps)
        return warmup_lr_rate + (1.0 - warmup_lr_rate) * t / max(1, num_warmup_steps - 1)
    progress = (t - num_warmup_steps + 1.0) / max(1.0, num_training_steps - num_warmup_steps)
    factor = 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress))
    return max(0, factor * (1 - min_lr_rate) + min_lr_rate)


def restarts(t: int, *, num_warmup_steps: int, num_training_steps: int, num_cycles: int = 1) -> float:
    if t < num_warmup_steps:
        return _rise(t, num_warmup_steps)
    progress = _progress(t, num_warmup_steps, num_training_steps)
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((float(num_cycles) * progress) % 1.0))))


def polynomial(
    t: int, *, num_warmup_steps: int, num_training_steps: int, lr_end: float = 1e-7, power: float = 1.0
) -> float:
    if t < num_warmup_steps:
        return _rise(t, num_warmup_steps)
    if t > num_training_steps:
        return lr_end / LR
    left = 1 - (t - num_warmup_steps) / (num_training_steps - num_warmup_steps)
    return ((LR - lr_end) * left**power + lr_end) / LR


def inverse_sqrt(t: int, *, num_warmup_steps: int, timescale: int | None = None) -> float:
    timescale = num_warmup_steps or 10_000 if timescale is None else timescale
    if t < num_warmup_steps:
        return _rise(t, num_warmup_steps)
    return 1.0 / math.sqrt((t + timescale - num_warmup_steps) / timescale)


def wsd(
    t: int,
    *,
    num_warmup_steps: int,
    num_decay_steps: int,
    num_training_steps: int | None = None,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0,
    num_cycles: float = 0.5,
) -> float:
    if num_stable_steps is None:
        num_stable_steps = num_training_steps - num_warmup_steps - num_decay_steps  # type: ignore[operator]
    begin = num_warmup_steps + num_stable_steps
    if t < num_warmup_steps:
        x = _rise(t, num_warmup_steps)
        ups = {"linear": x, "cosine": 0.5 * (1.0 - math.cos(math.pi * x)), "1-sqrt": 1.0 - math.sqrt(1.0 - x)}
        return max(0.0, ups[warmup_type] * (1.0 - min_lr_ratio) + min_lr_ratio)
    if t < begin:
        return 1.0
    if t < begin + num_decay_steps:
        x = float(t - begin) / float(max(1, num_decay_steps))
        wave = 0.5 * (1.0 + math.cos(math.pi * float(num_cycles) * 2.0 * x))
        downs = {"linear": 1.0 - x, "cosine": wave, "1-sqrt": 1.0 - math.sqrt(x)}
        return max(0.0, downs[decay_type] * (1.0 - min_lr_ratio) + min_lr_ratio)
    return min_lr_ratio


# ---- the formulas of papers


def noam(t: int, *, d_model: int, num_warmup_steps: int) -> float:
    """Equation 3 of Attention Is All You Need; its first step is 1."""
    step_num = t + 1
    return float(d_model**-0.5 * min(step_num**-0.5, step_num * num_warmup_steps**-1.5))


def rex(t: int, *, num_warmup_steps: int, num_training_steps: int) -> float:
    """The profile of REX, (1 - z) / (1/2 + (1 - z) / 2), over the steps after warm-up."""
    if t < num_warmup_steps:
        return _rise(t, num_warmup_steps)
    z = min(1.0, _progress(t, num_warmup_steps, num_training_steps))
    return (1 - z) / (1 / 2 + 1 / 2 * (1 - z))


REFERENCES: dict[str, Callable[..., float]] = {
    "get_constant_schedule": constant,
    "get_constant_schedule_with_warmup": constant,
    "get_linear_schedule_with_warmup": linear,
    "get_cosine_schedule_with_warmup": cosine,
    "get_cosine_with_min_lr_schedule_with_warmup": cosine_with_floor,
    "get_cosine_with_min_lr_schedule_with_warmup_lr_rate": cosine_from_rate,
    "get_cosine_with_hard_restarts_schedule_with_warmup": restarts,
    "get_polynomial_decay_schedule_with_warmup": polynomial,
    "get_inverse_sqrt_schedule": inverse_sqrt,
    "get_wsd_schedule": wsd,
    "get_noam_schedule": noam,
    "get_rex_schedule": rex,
}
OF_PAPERS = {"get_noam_schedule", "get_rex_schedule"}  # transformers has none
_USUAL = {"num_warmup_steps": 17, "num_training_steps": 110}
_AT_ONCE = {"num_warmup_steps": 0, "num_training_steps": 93}
_ONLY_WARMUP = {"num_warmup_steps": 20, "num_training_steps": 20}
_WSD = {"num_warmup_steps": 9, "num_decay_steps": 31}
READY: dict[str, tuple[str, dict[str, Any]]] = {
    "constant": ("get_constant_schedule", {}),
    "constant, warm-up": ("get_constant_schedule_with_warmup", {"num_warmup_steps": 30}),
    "linear": ("get_linear_schedule_with_warmup", _USUAL),
    "linear, at once": ("get_linear_schedule_with_warmup", _AT_ONCE),
    "linear, warm-up alone": ("get_linear_schedule_with_warmup", _ONLY_WARMUP),
    "linear, ends in warm-up": ("get_linear_schedule_with_warmup", {"num_warmup_steps": 20, "num_training_steps": 10}),
    "cosine": ("get_cosine_schedule_with_warmup", _USUAL),
    "cosine, waves": ("get_cosine_schedule_with_warmup", {**_USUAL, "num_cycles": 1.75}),
    "cosine, at once": ("get_cosine_schedule_with_warmup", _AT_ONCE),
    "floor": ("get_cosine_with_min_lr_schedule_with_warmup", {**_USUAL, "min_lr": 0.01}),
    "floor, rate": ("get_cosine_with_min_lr_schedule_with_warmup", {**_USUAL, "min_lr_rate": 0.25, "num_cycles": 2.5}),
    "floor, from a rate": (
        "get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
        {**_USUAL, "min_lr_rate": 0.1, "warmup_lr_rate": 0.2},
    ),
    "floor, a step ahead": ("get_cosine_with_min_lr_schedule_with_warmup_lr_rate", {**_USUAL, "min_lr_rate": 0.1}),
    "restarts": ("get_cosine_with_hard_restarts_schedule_with_warmup", {**_USUAL, "num_cycles": 3}),
    "restarts, at once": ("get_cosine_with_hard_restarts_schedule_with_warmup", {**_AT_ONCE, "num_cycles": 3}),
    "restarts, warm-up alone": ("get_cosine_with_hard_restarts_schedule_with_warmup", _ONLY_WARMUP),
    "polynomial": ("get_polynomial_decay_schedule_with_warmup", _USUAL),
    "polynomial, power": ("get_polynomial_decay_schedule_with_warmup", {**_USUAL, "power": 2.5, "lr_end": 0.004}),
    "inverse sqrt": ("get_inverse_sqrt_schedule", {"num_warmup_steps": 17}),
    "inverse sqrt, scale": ("get_inverse_sqrt_schedule", {"num_warmup_steps": 17, "timescale": 5}),
    "inverse sqrt, at once": ("get_inverse_sqrt_schedule", {"num_warmup_steps": 0}),
    **{
        f"WSD, {up} and {down}": (
            "get_wsd_schedule",
            {**_WSD, "num_training_steps": 110, "warmup_type": up, "decay_type": down, "min_lr_ratio": 0.05},
        )
        for up, down in [("linear", "1-sqrt"), ("cosine", "linear"), ("1-sqrt", "cosine")]
    },
    "WSD, stable steps": ("get_wsd_schedule", {**_WSD, "num_stable_steps": 50, "num_cycles": 1.25}),
    "WSD, at once": ("get_wsd_schedule", {"num_warmup_steps": 0, "num_decay_steps": 0, "num_stable_steps": 9}),
    "noam": ("get_noam_schedule", {"d_model": 512, "num_warmup_steps": 40}),
    "rex": ("get_rex_schedule", _USUAL),
    "rex, at once": ("get_rex_schedule", _AT_ONCE),
}


def reference(case: str) -> Callable[[int], float]:
    """The factor at a step."""
    name, arguments = READY[case]
    return functools.partial(REFERENCES[name], **arguments)


def of_torch(optimizer: torch.optim.Optimizer, case: str) -> torch.optim.lr_scheduler.LambdaLR:
    """The schedule as transformers builds it: torch's class, and a partial of a plain function."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, reference(case))
