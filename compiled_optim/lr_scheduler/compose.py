"""Schedulers made of schedulers."""

from __future__ import annotations

import bisect
import math
from typing import Any

from torch.optim import lr_scheduler

from compiled_optim.lr_scheduler.formulas import Form, piecewise
from compiled_optim.lr_scheduler.scheduler import Relative, Scheduler
from compiled_optim.lr_scheduler.schedules import SWALR, MultiplicativeLR


def _values(forms: list[Form]) -> dict[str, Any]:
    """Those of all: two schedulers have a ``gamma`` each."""
    return {f"{name}_{i}": value for i, form in enumerate(forms) for name, value in form.values.items()}


class _Composed(Scheduler):
    _schedulers: Any

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
            if step >= start:
                _member(scheduler)._move_to(min(step, end - 1) - start)


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
