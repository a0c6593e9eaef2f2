"""A schedule that moves with the optimizer's own steps: `Optimizer.attach`."""

from __future__ import annotations

import bisect
import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from compiled_optim._engine import settings
from compiled_optim._engine.kernels.backends import is_capturing

_SEARCHED = 100_000  # steps among which a lost place is looked for


def attachment(schedule: LRScheduler) -> Attached:
    """What moves this schedule with the steps of its optimizer.

    Raises:
        TypeError: for one that is stepped with a metric, one of this package that holds schedulers of another, and an
            optimizer whose step is not ours.
    """
    if not isinstance(schedule, LRScheduler):
        kind = f"{type(schedule).__module__}.{type(schedule).__name__}"
        raise TypeError(f"schedule must be a torch.optim.lr_scheduler.LRScheduler, got a {kind}")
    if isinstance(schedule, ReduceLROnPlateau):
        raise TypeError("ReduceLROnPlateau is not symbolic: the learning rate depends on the metric, not on the step")
    optimizer: Any = schedule.optimizer
    if not optimizer.rule.declaration.options:
        raise TypeError(
            f"{type(optimizer).__name__} declares no rule, and its own step moves no schedule: step it by hand"
        )
    if not hasattr(schedule, "_refer"):
        cls: Any = type(schedule)
        schedule.__class__ = _stock(cls)
    return Attached(schedule)


class Attached:
    """Steps a schedule after each step of its optimizer, as its user would, on the host.

    While a CUDA graph is captured, and from then on, a learning rate on the device takes the closed form, as it was
    then, at a count that is kept there: nothing is read back, and a replay counts.
    """

    def __init__(self, schedule: Any) -> None:
        self.schedule = schedule
        self.is_moving = False  # while the optimizer steps the schedule
        self._functions: dict[tuple[int, str], Callable[[Any], Any]] = {}  # that the last `_look_up` found
        self._is_captured = False
        self._is_restored = self._is_lost = False
        self._is_changed = self._was_changed = self._has_warned = False
        self._has_tensors = True  # or not known
        self._counts: dict[torch.device, Tensor] = {}
        schedule._refer(weakly=True)
        self._on = self._devices()  # where learning rates lie that are not read
        self._count(self._on)

    def _look_up(self) -> str:
        """Takes the closed forms; of a param group that the schedule has not seen there is none.

        Returns:
            Why there are none.
        """
        schedule, self._functions = self.schedule, {}
        known = range(min(schedule._groups_seen, len(schedule.optimizer.param_groups)))
        try:
            self._functions = {(i, of): schedule.function(i, of) for i in known for of in schedule.schedules}
        except TypeError as error:
            return str(error)
        return ""

    @property
    def note(self) -> str:
        """What `explain` says of it: nothing of a schedule that is a formula."""
        why = "" if self._is_captured else self._look_up() or self.schedule._calls
        return why and f"the attached {type(self.schedule).__name__} moves on the host and by no formula: {why}"

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
        if self._has_tensors:
            self._on = self._devices()
            if not self._is_captured and any(map(is_capturing, self._on)):
                self._begin_capture()

    def _begin_capture(self) -> None:
        """Takes the closed forms for good.

        Raises:
            TypeError: if there are none, or not of a count that is a tensor.
        """
        why = self._look_up()
        try:
            for function in self._functions.values():
                function(torch.empty((), dtype=torch.float64, device="meta"))  # where nothing is captured or read
        except TypeError as error:
            why = str(error)
        if why:
            raise TypeError(f"in a CUDA graph a schedule needs a formula, and {why}")
        self._is_captured = True

    def advance(self) -> None:
        """After a step of the optimizer."""
        schedule = self.schedule
        self._is_restored, self._was_changed = False, self._is_changed
        if self._is_captured:
            schedule._move_to(schedule._steps_taken + 1)
            for count in self._counts.values():
                count.add_(1)
            self._set_values()
            schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
            return
        self.is_moving = True
        try:
            schedule._follow()
        finally:
            self.is_moving = False
        if self._on:
            self._count(self._on)

    def _count(self, devices: Iterable[torch.device]) -> None:
        for device in devices:
            if device not in self._counts:
                self._counts[device] = torch.zeros((), dtype=torch.float64, device=device)
            self._counts[device].fill_(self.schedule._steps_taken)

    def _set_values(self) -> None:
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
        if self._is_captured:
            self._begin_capture()
        elif schedule.schedules != ("lr",):
            self._look_up()
        if not self._is_lost:
            if schedule.schedules != ("lr",):
                self._set_values()
            schedule._assign(schedule._last_lr, strict=False)  # which may not be those of the closed form
        self._is_restored, self._is_lost = True, False

    def _find(self) -> None:
        """Takes the place where the closed form has the learning rates that the optimizer loaded, if it is known.

        That is after as many steps as the optimizer has counted, or else at the only such place.
        """
        self._is_lost = False
        schedule = self.schedule
        optimizer, before = schedule.optimizer, schedule._steps_taken
        counts = "step" in optimizer.rule.declaration.counts
        counted = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
        rates = [_number(group["lr"]) for group in optimizer.param_groups]
        if counts and counted == before and rates == list(map(_number, schedule._last_lr)):
            return  # it has loaded what it had, as Accelerate's prepare does
        self._look_up()
        last = min(getattr(schedule, "total_steps", _SEARCHED), _SEARCHED)
        steps = torch.arange(last + 2, dtype=torch.float64, device="cpu")
        steps[-1] = counted
        fits = torch.ones_like(steps, dtype=torch.bool)
        if not self._functions:
            fits.fill_(False)
        for (i, of), function in self._functions.items():
            if of == "lr":
                group = optimizer.param_groups[i]
                lr, initial = _number(group["lr"]), _number(group["initial_lr"])
                is_narrow = isinstance(group["lr"], Tensor) and group["lr"].dtype != torch.float64
                fits &= (_at(function, steps) - lr).abs() <= (1e-5 if is_narrow else 1e-9) * max(abs(lr), abs(initial))
        places = steps[:-1][fits[:-1]].tolist()
        if fits[-1] and counts:
            places = [counted]
        name = type(schedule).__name__
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


def _at(function: Callable[[Any], Any], steps: Tensor) -> Tensor:
    """The values at all steps; where a function takes numbers only, nan but at the last step, or everywhere."""
    try:
        return function(steps)  # type: ignore[no-any-return]
    except TypeError:
        values = torch.full_like(steps, torch.nan)
    with contextlib.suppress(Exception):  # whatever a function of the user raises at a step that may not be its own
        values[-1] = function(steps[-1].item())
    return values


def _is_on_device(group: dict[str, Any]) -> bool:
    """Whether to read the learning rate would make the host wait."""
    lr = group["lr"]
    return isinstance(lr, Tensor) and (lr.device.type != "cpu" or bool(group.get("capturable")))


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


class _Stock:
    """Stands before the class of a scheduler of torch while that is attached, and has what is asked of a schedule."""

    schedules = ("lr",)
    _groups_seen = 1
    _stock: type[LRScheduler]
    optimizer: Any
    last_epoch: int
    _last_lr: list[Any]

    def function(self, group: int, of: str) -> Any:
        kind = f"{self._stock.__module__}.{self._stock.__name__}"
        raise TypeError(f"a {kind} has none: take the one of compiled_optim.lr_scheduler")

    def step(self, *args: Any, **kwargs: Any) -> None:
        raise RuntimeError(f"this {type(self).__name__} is attached, and moves with optimizer.step() alone")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stock.load_state_dict(self, state_dict)  # type: ignore[arg-type]
        self.optimizer._attached.schedule_loaded()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return object.__new__, (self._stock,), dict(vars(self))

    def _refer(self, *, weakly: bool) -> None:
        if not weakly:
            self.__class__ = self._stock  # type: ignore[assignment]

    def _reference(self) -> Any:
        return self.optimizer

    def _follow(self) -> None:
        self._stock.step(self)  # type: ignore[arg-type]

    def _check_next(self) -> None:
        check_total(self)

    @property
    def _steps_taken(self) -> int:
        return getattr(self, "last_epoch", 0)  # a ChainedScheduler has none

    def _assign(self, values: list[Any], *, strict: bool) -> None:
        for group, value in zip(self.optimizer.param_groups, values, strict=strict):
            if isinstance(group["lr"], Tensor):
                group["lr"].detach().fill_(value)
            else:
                group["lr"] = _number(value)


@functools.cache
def _stock(cls: Any) -> Any:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "_stock": cls}
    return type(cls.__name__, (_Stock, cls), names)


def check_total(schedule: Any) -> None:
    """Raises what a OneCycleLR raises at its end, if this is one or its next step is that of one."""
    step = getattr(schedule, "last_epoch", 0) + 1  # a ChainedScheduler counts none
    if isinstance(schedule, OneCycleLR) and step > schedule.total_steps:
        raise ValueError(f"Tried to step {step} times. The specified number of total steps is {schedule.total_steps}")
    members, milestones = getattr(schedule, "_schedulers", []), getattr(schedule, "_milestones", None)
    if milestones is not None:
        members = [] if step in milestones else [members[bisect.bisect_right(milestones, step)]]
    for member in members:
        check_total(member)
