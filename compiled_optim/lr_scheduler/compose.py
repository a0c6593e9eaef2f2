"""Schedulers made of schedulers."""

from __future__ import annotations

import bisect
import math
from typing import Any

from torch.optim import lr_scheduler

from compiled_optim._engine.declaration import coerce
from compiled_optim.lr_scheduler.formulas import RAMPS, Form, piecewise, ramp
from compiled_optim.lr_scheduler.scheduler import Relative, Scheduler, copied
from compiled_optim.lr_scheduler.schedules import SWALR, MultiplicativeLR


def _values(forms: list[Form]) -> dict[str, Any]:
    """Those of all: two schedulers have a ``gamma`` each."""
    return {f"{name}_{i}": value for i, form in enumerate(forms) for name, value in form.values.items()}


class _Composed(Scheduler):
    _schedulers: Any

    def _update_lr(self, epoch: int | None = None) -> None:
        # Called at a milestone of a SequentialLR, with 0. torch raises NotImplementedError for compositions there.
        self._assign([group["initial_lr"] for group in self.optimizer.param_groups])
        self._move_to(-1)
        self._initial_step()

    def _refer(self, *, weakly: bool) -> None:
        for member in [_member(scheduler) for scheduler in self._schedulers]:
            member._refer(weakly=weakly)
        super()._refer(weakly=weakly)

    @property
    def _calls(self) -> str:  # type: ignore[override]
        return ", ".join(dict.fromkeys(why for scheduler in self._schedulers if (why := _member(scheduler)._calls)))

    @property
    def _groups_seen(self) -> int:
        return min(_member(scheduler)._groups_seen for scheduler in self._schedulers)


class SequentialLR(_Composed, lr_scheduler.SequentialLR):
    """One scheduler after another: each counts from 0 at its milestone.

    Symbolic if all of them are and start at their milestone from the base learning rate, which `MultiplicativeLR` and
    `SWALR` do in the first place only.
    """

    def _closed_form(self, group: int, of: str, **given: Any) -> Form:
        forms = []
        for i, scheduler in enumerate(self._schedulers):
            if i > 0 and isinstance(scheduler, MultiplicativeLR | SWALR):
                name = type(scheduler).__name__
                raise TypeError(f"SequentialLR is not symbolic: {name} at index {i} goes on from the lr it finds")
            begins = i == 0 and isinstance(scheduler, Relative | MultiplicativeLR)  # others may have changed it since
            given = {"base_lr": self.optimizer.param_groups[group]["initial_lr"]} if begins else {}
            forms.append(_member(scheduler)._closed_form(group, of, **given))
        starts, ends = [0, *self._milestones], list(self._milestones)
        return Form(lambda t, **_: piecewise(t, ends, lambda i: forms[i](t - starts[i])), _values(forms))

    def _initial_step(self) -> None:
        # when a SequentialLR begins with this one: torch moves it by a step
        self.last_epoch = 0
        scheduler = self._schedulers[bisect.bisect_right(self._milestones, 0)]
        scheduler._initial_step()
        self._last_lr = scheduler.get_last_lr()

    def step(self) -> None:  # type: ignore[override]  # as torch's
        """Steps the one whose turn it is."""
        self._check_by_hand()
        self.last_epoch += 1
        i = bisect.bisect_right(self._milestones, self.last_epoch)
        scheduler = self._schedulers[i]
        if i > 0 and self._milestones[i - 1] == self.last_epoch:
            scheduler._update_lr(0)
        else:
            scheduler.step()
        self._last_lr = scheduler._last_lr

    def _check_next(self) -> None:
        step = self.last_epoch + 1
        if step not in self._milestones:
            _member(self._schedulers[bisect.bisect_right(self._milestones, step)])._check_next()

    def _move_to(self, step: int) -> None:
        super()._move_to(step)
        starts, ends = [0, *self._milestones], [*self._milestones, step + 1]
        for scheduler, start, end in zip(self._schedulers, starts, ends, strict=True):
            if start == 0 or step >= start:
                _member(scheduler)._move_to(min(step, end - 1) - start)


class Warmup(SequentialLR):
    """What `warmup` returns."""

    def __init__(
        self, schedule: lr_scheduler.LRScheduler, steps: int, kind: str, start_factor: float, power: float
    ) -> None:
        if not isinstance(schedule, Scheduler):
            kind_of = f"{type(schedule).__module__}.{type(schedule).__name__}"
            raise TypeError(f"schedule must be a scheduler of compiled_optim.lr_scheduler, got a {kind_of}")
        if schedule._steps_taken != 0:
            place = f"a {type(schedule).__name__} at step {schedule._steps_taken}"
            raise ValueError(f"schedule must be at its first step, got {place}: to resume, load a state_dict")
        steps, start_factor, power = map(coerce, (steps, start_factor, power))
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 0:
            raise ValueError(f"steps must be an integer of at least 0, got {steps!r}")
        if kind not in RAMPS:
            raise ValueError(f"kind must be one of {list(RAMPS)}, got {kind!r}")
        for name, value in (("start_factor", start_factor), ("power", power)):
            if not value >= 0:
                raise ValueError(f"{name} must be at least 0, got {value!r}")
        self.warmup_steps, self.kind, self.start_factor, self.power = steps, kind, start_factor, power
        super().__init__(schedule.optimizer, [schedule], [])  # which sets the learning rates that it begins with
        self._begin()

    @property
    def schedules(self) -> tuple[str, ...]:  # type: ignore[override]
        return _member(self._schedulers[0]).schedules

    def _initial_step(self) -> None:
        super()._initial_step()
        self._begin()

    def _begin(self) -> None:
        """Goes to the first step, given the learning rates after warm-up."""
        self.last_epoch, self._step_count = 0, 1
        self.peak_lrs = copied(self._last_lr)
        self._rise()

    @property
    def _shape(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("warmup_steps", "start_factor", "power")}

    def _factor(self, t: Any, warmup_steps: Any, start_factor: Any, power: Any) -> Any:
        return start_factor + (1 - start_factor) * ramp(t / max(1, warmup_steps), self.kind, power)

    def _rise(self) -> None:
        is_over = self.last_epoch >= self.warmup_steps  # the peak itself, not rounded
        factor = 1.0 if is_over else self._factor(self.last_epoch, **self._shape)
        self._assign([peak * factor for peak in self.peak_lrs])

    def step(self) -> None:  # type: ignore[override]  # as torch's SequentialLR
        """Steps the warm-up, and after it the schedule."""
        self._check_by_hand()
        self._check_next()
        self.last_epoch += 1
        if self.last_epoch <= self.warmup_steps:
            self._rise()
        else:
            self._schedulers[0].step()
            self._last_lr = self._schedulers[0]._last_lr

    def _check_next(self) -> None:
        groups, known = len(self.optimizer.param_groups), len(self.peak_lrs)
        if self.last_epoch >= self.warmup_steps:
            _member(self._schedulers[0])._check_next()
        elif groups != known:
            raise ValueError(f"a warm-up begun with {known} param groups cannot go on with {groups}: add them after it")

    def _move_to(self, step: int) -> None:
        self.last_epoch, self._step_count = step, step + 1
        _member(self._schedulers[0])._move_to(max(min(step, 0), step - self.warmup_steps))

    def _closed_form(self, group: int, of: str, **given: Any) -> Form:
        form = super()._closed_form(group, of, **given)

        def formula(t: Any, warmup_steps: Any, start_factor: Any, power: Any, **_: Any) -> Any:
            def piece(i: int) -> Any:
                if i == 1:
                    return form(t - warmup_steps)
                return form(0 * t) * (self._factor(t, warmup_steps, start_factor, power) if of == "lr" else 1)

            return piecewise(t, [warmup_steps], piece)

        return Form(formula, form.values | self._shape)


def warmup(
    schedule: lr_scheduler.LRScheduler,
    steps: int,
    kind: str = "linear",
    *,
    start_factor: float = 0.0,
    power: float = 2.0,
) -> Warmup:
    r"""A way up to the learning rate that a schedule begins with, and then the schedule, from its first step on.

    .. math:: \eta_t = \begin{cases}(s + (1 - s) r(t / W)) g(0) & t < W \\ g(t - W) & t \ge W\end{cases}

    where g is ``schedule`` and W ``steps``. So the steps of the schedule are counted after the warm-up, as in
    transformers: a cosine over T steps in all is ``warmup(CosineAnnealingLR(optimizer, T - W), W)``. To multiply a
    schedule that counts all steps by a warm-up, chain it with `LinearLR`.

    It begins from the ``initial_lr`` of each param group, as `SequentialLR`, and sets learning rates when it is built.
    So build it before the optimizer loads a checkpoint, and load its own ``state_dict`` too.

    Args:
        schedule: any scheduler of `compiled_optim.lr_scheduler` at its first step, compositions too; it is stepped by
            what this returns from here on. Momentum that it moves stays at its first value during warm-up.
        steps: W. The first of them has the factor s, and the first step after them 1.
        kind: r is x for "linear", :math:`(1 - \cos \pi x) / 2` for "cosine", :math:`x^p` for "polynomial",
            :math:`1 - \sqrt{1 - x}` for "1-sqrt".
        start_factor: s. power: p.

    Raises:
        TypeError: for a scheduler that is none of this package's.
        ValueError: for another kind, a number out of range, and a schedule that was stepped or that takes a metric.

    Example:
        >>> import torch
        >>> from compiled_optim.lr_scheduler import CosineAnnealingLR, warmup
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> schedule = warmup(CosineAnnealingLR(optimizer, T_max=90), 10)
        >>> [round(schedule.value(t), 3) for t in (0, 5, 10, 55, 100)]
        [0.0, 0.05, 0.1, 0.05, 0.0]
    """
    return Warmup(schedule, steps, kind, start_factor, power)


class ChainedScheduler(_Composed, lr_scheduler.ChainedScheduler):
    """Several schedulers, stepped one after the other on the same learning rates.

    Symbolic, as the product of their factors, if all of them scale the learning rate. That holds as long as none of
    them rises again from 0, which `CosineAnnealingLR` does after ``T_max``: from there it adds to what it finds.
    """

    def _initial_step(self) -> None:
        # when a SequentialLR begins with this one: torch warns here, and moves some of them by a step
        for scheduler in self._schedulers:
            scheduler._initial_step()
        self._last_lr = self._schedulers[-1].get_last_lr()

    def step(self) -> None:  # type: ignore[override]  # as torch's
        """Steps all, in their order."""
        self._check_by_hand()
        for scheduler in self._schedulers:
            scheduler.step()
        self._last_lr = self._schedulers[-1]._last_lr

    def _check_next(self) -> None:
        for scheduler in self._schedulers:
            _member(scheduler)._check_next()

    @property
    def _steps_taken(self) -> int:
        return _member(self._schedulers[0])._steps_taken

    def _move_to(self, step: int) -> None:
        for scheduler in self._schedulers:
            _member(scheduler)._move_to(step)

    def _closed_form(self, group: int, of: str, **given: Any) -> Form:
        if len(self._schedulers) == 1:
            return _member(self._schedulers[0])._closed_form(group, of, **given)
        forms = []
        for i, scheduler in enumerate(self._schedulers):
            form = _member(scheduler)._closed_form(group, of, base_lr=1)
            floor = isinstance(scheduler, Relative) and scheduler.floor
            if not isinstance(scheduler, Relative | MultiplicativeLR) or (floor and form.values[floor] != 0):
                name = type(scheduler).__name__
                raise TypeError(f"ChainedScheduler is not symbolic: {name} at index {i} does not scale the lr it finds")
            forms.append(form)
        values = _values(forms) | {"base_lr": self._schedulers[0].base_lrs[group]}
        return Form(lambda t, base_lr, **_: base_lr * math.prod(form(t) for form in forms), values)


def _member(scheduler: lr_scheduler.LRScheduler) -> Scheduler:
    if not isinstance(scheduler, Scheduler):
        raise TypeError(f"{type(scheduler).__module__}.{type(scheduler).__name__} has no formula: take the one here")
    return scheduler
