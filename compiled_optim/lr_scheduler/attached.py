"""A schedule that moves with the optimizer's own steps: `Optimizer.attach`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from compiled_optim._engine import settings
from compiled_optim._engine.kernels.backends import is_capturing

_SEARCHED = 100_000  # steps among which a lost place is looked for


class Attached:
    """Steps a schedule after each step of its optimizer, as its user would.

    While a CUDA graph is captured, and from then on, a learning rate on the device takes the closed form, as it was
    then, at a count that is kept there: nothing is read back, and a replay counts.
    """

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule
        self.is_moving = False  # while the optimizer steps the schedule
        self._look_up()  # or there is no closed form
        self._is_captured = False
        self._is_restored = self._is_lost = False
        self._is_changed = self._was_changed = self._has_warned = False
        self._has_tensors = True  # or not known
        self._counts: dict[torch.device, Tensor] = {}
        schedule._refer(weakly=True)
        self._count(self._devices())

    def _look_up(self) -> None:
        """Takes the closed forms; of a param group that the schedule has not seen there is none."""
        schedule = self.schedule
        known = range(min(schedule._groups_seen, len(schedule.optimizer.param_groups)))
        self._functions: dict[tuple[int, str], Callable[[Any], Any]] = {
            (i, of): schedule.function(i, of) for i in known for of in schedule.schedules
        }

    def _devices(self) -> set[torch.device]:
        groups = self.schedule._reference().param_groups
        return {lr.device for g in groups if isinstance(lr := g["lr"], Tensor) and _is_on_device(g)}

    def check(self) -> None:
        """Before a step of the optimizer, which is not taken if the schedule has ended.

        Raises:
            ValueError: after the last step of the schedule.
        """
        if self._is_lost:
            self._find()
        schedule = self.schedule
        self._is_changed = self._has_tensors = False
        for group, last in zip(schedule._reference().param_groups, schedule._last_lr, strict=False):
            if (lr := group["lr"]) is not last:  # as each tensor is, and a number that was changed
                self._has_tensors |= isinstance(lr, Tensor)
                self._is_changed |= not _is_on_device(group) and _number(lr) != _number(last)
        if self._is_changed and self._was_changed:  # not only once, by hand
            self.warn_of_another("Something else")
        schedule._check_next()

    def advance(self) -> None:
        """After a step of the optimizer."""
        schedule = self.schedule
        self._is_restored, self._was_changed = False, self._is_changed
        devices = self._devices() if self._has_tensors else set()
        if devices and not self._is_captured and any(map(is_capturing, devices)):
            self._look_up()
            self._is_captured = True
        if self._is_captured:
            schedule._move_to(schedule._steps_taken + 1)
            for count in self._counts.values():
                count.add_(1)
            self._apply()
            schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
            return
        optimizer = schedule._reference()
        self.is_moving = True
        schedule.optimizer = optimizer  # for a moment: the reference takes longer to look up
        try:
            schedule._take_step()
        finally:
            self.is_moving = False
            if optimizer._attached is self:
                del schedule.optimizer
        if devices:
            self._count(devices)

    def _count(self, devices: Iterable[torch.device]) -> None:
        for device in devices:
            if device not in self._counts:
                self._counts[device] = torch.zeros((), dtype=torch.float64, device=device)
            self._counts[device].fill_(self.schedule._steps_taken)

    def _apply(self) -> None:
        """Sets what the closed form says."""
        groups = self.schedule.optimizer.param_groups
        for (i, of), function in self._functions.items():
            group = groups[i]
            if of == "momentum" and "betas" in group:
                beta1, *others = group["betas"]
                group["betas"] = (self._moved(beta1, function), *others)
            else:
                group[of] = self._moved(group[of], function)

    def _moved(self, old: Any, function: Callable[[Any], Any]) -> Any:
        if not isinstance(old, Tensor):
            return function(self.schedule._steps_taken)
        if old.device in self._counts:
            old.detach().copy_(function(self._counts[old.device]))
        else:
            old.detach().fill_(function(self.schedule._steps_taken))
        return old

    def warn_of_another(self, what: str) -> None:
        """Warns of a second schedule, once."""
        if not self._has_warned:
            self._has_warned = True
            text = (
                f"{what} moves the learning rate that the attached {type(self.schedule).__name__} moves after each "
                "step: they take turns. To multiply them, attach a ChainedScheduler of both"
            )
            settings.warn(text, UserWarning)

    def optimizer_loaded(self) -> None:
        """The learning rates are those of a checkpoint, which does not say how far the schedule was."""
        self._is_lost = not self._is_restored

    def schedule_loaded(self) -> None:
        """The schedule is at another place; and the learning rates, unless those of a checkpoint were loaded too."""
        schedule = self.schedule
        self._count(self._counts)
        if self._is_captured or schedule.schedules != ("lr",):
            self._look_up()
        if not self._is_lost:
            if schedule.schedules != ("lr",):
                self._apply()
            schedule._assign(schedule._last_lr, strict=False)  # which may not be those of the closed form
        self._is_restored, self._is_lost = True, False

    def _find(self) -> None:
        """Takes the place where the closed form has the learning rates that the optimizer loaded, if it is known.

        That is after as many steps as the optimizer has counted, or else at the only such place.
        """
        self._is_lost = False
        schedule = self.schedule
        optimizer = schedule.optimizer
        self._look_up()
        counted = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
        last = min(getattr(schedule, "total_steps", _SEARCHED), _SEARCHED)
        steps = torch.arange(last + 2, dtype=torch.float64, device="cpu")
        steps[-1] = counted
        fits = torch.ones_like(steps, dtype=torch.bool)
        for (i, of), function in self._functions.items():
            if of == "lr":
                group = optimizer.param_groups[i]
                lr, initial = _number(group["lr"]), _number(group["initial_lr"])
                is_narrow = isinstance(group["lr"], Tensor) and group["lr"].dtype != torch.float64
                fits &= (function(steps) - lr).abs() <= (1e-5 if is_narrow else 1e-9) * max(abs(lr), abs(initial))
        places = steps[:-1][fits[:-1]].tolist()
        if fits[-1] and "step" in optimizer.rule.declaration.counts:
            places = [counted]
        name, before = type(schedule).__name__, schedule._steps_taken
        if places == [before]:
            return
        if len(places) == 1:
            schedule._move_to(int(places[0]))
            self._count(self._counts)
            then = f"goes on from step {schedule._steps_taken}, where it has the learning rates that were loaded"
        else:
            then = f"goes on from step {before}, for the learning rates that were loaded do not tell its place"
        text = f"the optimizer loaded a checkpoint, and the attached {name} did not: it {then}. Load its state_dict too"
        settings.warn(text, UserWarning)


def _is_on_device(group: dict[str, Any]) -> bool:
    """Whether to read the learning rate would make the host wait."""
    lr = group["lr"]
    return isinstance(lr, Tensor) and (lr.device.type != "cpu" or bool(group.get("capturable")))


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value
