"""The scheduler without a formula: a state machine driven by a metric."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import lr_scheduler

from compiled_optim.lr_scheduler.formulas import Form
from compiled_optim.lr_scheduler.scheduler import Scheduler


class ReduceLROnPlateau(Scheduler, lr_scheduler.ReduceLROnPlateau):
    """Multiplies the learning rate by ``factor`` when a metric has not improved for ``patience`` steps.

    A state machine and no function of the step: `expression` and `value` raise TypeError.
    """

    def _closed_form(self, group: int, of: str, **given: Any) -> Form:
        raise TypeError("ReduceLROnPlateau is not symbolic: the learning rate depends on the metric, not on the step")

    def _reduce_lr(self, epoch: Any) -> None:
        with torch.no_grad():
            super()._reduce_lr(epoch)
