"""Schedulers made of schedulers."""

from __future__ import annotations

import bisect
import functools
from typing import Any

import sympy as sp  # type: ignore[import-untyped]
from torch.optim import lr_scheduler

from compiled_optim.lr_scheduler.code import Form, base_lr, parameters, t
from compiled_optim.lr_scheduler.schedules import SWALR, MultiplicativeLR
from compiled_optim.lr_scheduler.symbolic import Relative, Scheduler


@functools.lru_cache(maxsize=256)
def _apart(expression: sp.Expr, index: int) -> sp.Expr:
    """The same with symbols of its own: two schedulers have a ``gamma`` each."""
    return expression.xreplace({s: parameters(f"{s.name}_{index}") for s in expression.free_symbols - {t}})


@functools.lru_cache(maxsize=256)
def _sequence(expressions: tuple[sp.Expr, ...], milestones: tuple[int, ...]) -> sp.Expr:
    spans = zip(expressions, (0, *milestones), (*milestones, sp.oo), strict=True)
    return sp.Piecewise(*((_apart(e, i).xreplace({t: t - start}), t < end) for i, (e, start, end) in enumerate(spans)))


@functools.lru_cache(maxsize=256)
def _product(expressions: tuple[sp.Expr, ...]) -> sp.Expr:
    return base_lr * sp.prod(_apart(e.xreplace({base_lr: sp.S.One}), i) for i, e in enumerate(expressions))


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

    def _closed_form(self, group: int, of: str) -> Form:
        expressions: list[sp.Expr] = []
        values: dict[str, Any] = {}
        for i, scheduler in enumerate(self._schedulers):
            if i > 0 and isinstance(scheduler, MultiplicativeLR | SWALR):
                name = type(scheduler).__name__
                raise TypeError(f"SequentialLR is not symbolic: {name} at index {i} goes on from the lr it finds")
            expression, found = _member(scheduler)._checked(group, of)
            if i == 0 and isinstance(scheduler, Relative | MultiplicativeLR):  # others may have changed it since
                found["base_lr"] = self.optimizer.param_groups[group]["initial_lr"]
            expressions.append(expression)
            values |= {f"{name}_{i}": value for name, value in found.items()}
        return _sequence(tuple(expressions), tuple(self._milestones)), values

    def step(self) -> None:  # type: ignore[override]  # as torch's
        """Steps the one whose turn it is."""
        self._check_by_hand()
        super().step()

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
        self._last_lr = self._schedulers[-1].get_last_lr()

    def _check_next(self) -> None:
        for scheduler in self._schedulers:
            _member(scheduler)._check_next()

    @property
    def _steps_taken(self) -> int:
        return _member(self._schedulers[0])._steps_taken

    def _move_to(self, step: int) -> None:
        for scheduler in self._schedulers:
            _member(scheduler)._move_to(step)

    def _closed_form(self, group: int, of: str) -> Form:
        expressions: list[sp.Expr] = []
        values: dict[str, Any] = {}
        for i, scheduler in enumerate(self._schedulers):
            expression, found = _member(scheduler)._checked(group, of)
            if len(self._schedulers) == 1:
                return expression, found
            floor = isinstance(scheduler, Relative) and scheduler.floor
            if not isinstance(scheduler, Relative | MultiplicativeLR) or (floor and found[floor.name] != 0):
                name = type(scheduler).__name__
                raise TypeError(f"ChainedScheduler is not symbolic: {name} at index {i} does not scale the lr it finds")
            expressions.append(expression)
            values |= {f"{name}_{i}": value for name, value in found.items()} | {"base_lr": scheduler.base_lrs[group]}
        return _product(tuple(expressions)), values


def _member(scheduler: lr_scheduler.LRScheduler) -> Scheduler:
    if not isinstance(scheduler, Scheduler):
        raise TypeError(f"{type(scheduler).__module__}.{type(scheduler).__name__} has no formula: take the one here")
    return scheduler
