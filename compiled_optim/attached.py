"""A schedule that moves with the optimizer's own steps: `Optimizer.attach`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from compiled_optim.optimizer import Optimizer


class Attached:
    """Sets what a schedule's closed form says, after each step.

    Numbers and tensors on the host take the value at the host's count of steps. Tensors on a device take it from a
    count that is kept there, by operations that can be captured in a graph: nothing is read back, and a replay counts.
    """

    def __init__(self, schedule: Any, optimizer: Optimizer) -> None:
        if getattr(schedule, "optimizer", None) is not optimizer:
            raise ValueError(f"schedule must be one of this optimizer, got a {type(schedule).__name__} of another")
        if not hasattr(schedule, "function"):
            kind = f"{type(schedule).__module__}.{type(schedule).__name__}"
            raise TypeError(f"schedule must be of compiled_optim.lr_scheduler, got a {kind}")
        self.schedule = schedule
        self.look_up()

    def look_up(self) -> None:
        """Takes the formulas and their constants from the schedule: when attached, and when it loads a checkpoint."""
        groups = range(len(self.schedule.optimizer.param_groups))
        self._functions: dict[tuple[int, str], Callable[[Any], Any]] = {
            (group, of): self.schedule.function(group, of) for group in groups for of in self.schedule.schedules
        }
        self._step: int = self.schedule._steps_taken
        self._counts: dict[torch.device, Tensor] = {}

    def advance(self) -> None:
        """After a step of the optimizer."""
        schedule = self.schedule
        self._step += 1
        schedule._move_to(self._step)
        for count in self._counts.values():
            count.add_(1)
        groups = schedule.optimizer.param_groups
        for (i, of), function in self._functions.items():
            group = groups[i]
            if of == "momentum" and "betas" in group:
                beta1, *others = group["betas"]
                group["betas"] = (self._moved(beta1, function, group), *others)
            else:
                group[of] = self._moved(group[of], function, group)
        schedule._last_lr = [group["lr"] for group in groups]

    def _moved(self, old: Any, function: Callable[[Any], Any], group: dict[str, Any]) -> Any:
        if not isinstance(old, Tensor):
            return function(self._step)
        if old.device.type == "cpu" and not group.get("capturable"):
            old.detach().fill_(function(self._step))
            return old
        if old.device not in self._counts:
            self._counts[old.device] = torch.full((), float(self._step), dtype=torch.float64, device=old.device)
        old.detach().copy_(function(self._counts[old.device]))
        return old
