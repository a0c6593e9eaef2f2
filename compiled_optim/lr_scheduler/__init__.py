"""The learning rate schedulers of torch, each with its closed form as one Python function.

They are drop-in replacements for those of ``torch.optim.lr_scheduler`` and ``torch.optim.swa_utils``, subclasses of
them, and drive any torch.optim optimizer. In addition they know their formula: ``expression()``, ``latex()``, and
``value(t)`` for a number or for a tensor of steps. `SymbolicLR` takes any formula.
"""

from __future__ import annotations

from torch.optim.lr_scheduler import EPOCH_DEPRECATION_WARNING, LRScheduler, _LRScheduler  # noqa: F401

from compiled_optim.lr_scheduler.compose import ChainedScheduler, SequentialLR, warmup
from compiled_optim.lr_scheduler.cycles import CyclicLR, OneCycleLR
from compiled_optim.lr_scheduler.plateau import ReduceLROnPlateau
from compiled_optim.lr_scheduler.plot import plot_schedule
from compiled_optim.lr_scheduler.ready import (
    get_constant_schedule,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup_lr_rate,
    get_ema_decay_fn,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_noam_schedule,
    get_polynomial_decay_schedule_with_warmup,
    get_rex_schedule,
    get_wsd_schedule,
)
from compiled_optim.lr_scheduler.schedules import (
    SWALR,
    ConstantLR,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    MultiplicativeLR,
    MultiStepLR,
    PolynomialLR,
    StepLR,
    SymbolicLR,
)

__all__ = [
    "SWALR",
    "ChainedScheduler",
    "ConstantLR",
    "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts",
    "CyclicLR",
    "ExponentialLR",
    "LRScheduler",
    "LambdaLR",
    "LinearLR",
    "MultiStepLR",
    "MultiplicativeLR",
    "OneCycleLR",
    "PolynomialLR",
    "ReduceLROnPlateau",
    "SequentialLR",
    "StepLR",
    "SymbolicLR",
    "get_constant_schedule",
    "get_constant_schedule_with_warmup",
    "get_cosine_schedule_with_warmup",
    "get_cosine_with_hard_restarts_schedule_with_warmup",
    "get_cosine_with_min_lr_schedule_with_warmup",
    "get_cosine_with_min_lr_schedule_with_warmup_lr_rate",
    "get_ema_decay_fn",
    "get_inverse_sqrt_schedule",
    "get_linear_schedule_with_warmup",
    "get_noam_schedule",
    "get_polynomial_decay_schedule_with_warmup",
    "get_rex_schedule",
    "get_wsd_schedule",
    "plot_schedule",
    "warmup",
]
