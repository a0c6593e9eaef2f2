"""Cycles of the learning rate, and of momentum the other way."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.optim import lr_scheduler

from compiled_optim.attached import check_total
from compiled_optim.lr_scheduler.formulas import Form, annealed, library, minimum, piecewise
from compiled_optim.lr_scheduler.functions import UserFunction
from compiled_optim.lr_scheduler.scheduler import Scheduler, assigned


class _Cycle(Scheduler):
    cycle_momentum: bool
    use_beta1: bool

    @property
    def schedules(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("lr", "momentum") if self.cycle_momentum else ("lr",)

    def get_lr(self) -> list[Any]:
        """The learning rates of the step that is being taken; momenta are set, as in torch."""
        groups = self.optimizer.param_groups
        name = "betas" if self.cycle_momentum and self.use_beta1 else "momentum"
        before = [group[name] for group in groups] if self.cycle_momentum else []
        rates: list[Any] = super().get_lr()
        for group, old in zip(groups, before, strict=False):
            if type(old) is not float or type(group[name]) is not float:
                _keep_kind(group, name, old)
        return rates


def _keep_kind(group: dict[str, Any], name: str, old: Any) -> None:
    """Assigns the value that has replaced ``old``, so that a tensor stays that tensor and a number a number."""
    new = group[name]
    if name != "betas":
        group[name] = assigned(old, new)
    elif type(old[0]) is not float or type(new[0]) is not float:
        group[name] = tuple(map(assigned, old, new))


def _keeping_kinds(init: Any) -> Any:
    """A constructor that replaces tensors by numbers, or numbers by tensors, made to assign what is there."""

    @functools.wraps(init)
    def __init__(self: Any, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        groups = getattr(optimizer, "param_groups", [])
        found = [{k: group[k] for k in ("lr", "momentum", "betas") if k in group} for group in groups]
        init(self, optimizer, *args, **kwargs)
        for group, before in zip(groups, found, strict=True):
            for name, old in before.items():
                _keep_kind(group, name, old)

    return __init__


class OneCycleLR(_Cycle, lr_scheduler.OneCycleLR):
    r"""From :math:`\eta_0` up to ``max_lr`` and down to ``min_lr``, in two or three phases.

    In a phase from step a to b and from value u to v, :math:`\eta_t = v + (u - v) (1 + \cos \pi x) / 2` with
    :math:`x = (t - a) / (b - a)`; or :math:`u + (v - u) x` for "linear". Momentum moves the other way. A phase without
    steps is at its end, where torch divides by zero.

    Smith & Topin, Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates, 2018.
    """

    __init__ = _keeping_kinds(lr_scheduler.OneCycleLR.__init__)

    @staticmethod
    def _formula(t: Any, ends: Any, values: Any, _anneal_func_type: str) -> Any:
        def phase(i: int) -> Any:
            share = _left(t, ends[i], ends[i + 1], _anneal_func_type)
            return values[i + 1] + (values[i] - values[i + 1]) * share

        return piecewise(t, ends[1:-1], phase)

    def _closed_form(self, group: int, of: str, **given: Any) -> Form:
        options: dict[str, Any] = self.optimizer.param_groups[group]
        phases: list[Any] = self._schedule_phases
        values = [options[phase[f"start_{of}"]] for phase in phases] + [options[phases[-1][f"end_{of}"]]]
        ends = [0, *[phase["end_step"] for phase in phases]]
        return self._form(self._formula, group, {"ends": ends, "values": values})

    def get_lr(self) -> list[Any]:
        """The learning rates of the step that is being taken; momenta are set, as in torch."""
        try:
            return super().get_lr()
        except ZeroDivisionError:  # a phase of no steps
            groups = self.optimizer.param_groups
            for i, group in enumerate(groups if self.cycle_momentum else ()):
                momentum = self._closed_form(i, "momentum")(self.last_epoch)
                if self.use_beta1:
                    group["betas"] = (assigned(group["betas"][0], momentum), *group["betas"][1:])
                else:
                    group["momentum"] = assigned(group["momentum"], momentum)
            return [self._closed_form(i, "lr")(self.last_epoch) for i in range(len(groups))]

    def _check_next(self) -> None:
        check_total(self)


def _left(t: Any, begin: Any, end: Any, strategy: str) -> Any:
    """The share of a phase's first value at ``t``, from 1 to 0."""
    x = (t - begin) / (end - begin) if end != begin else 1
    return annealed(x) if strategy == "cos" else 1 - x


class CyclicLR(_Cycle, lr_scheduler.CyclicLR):
    r""":math:`\eta_t = b + (u - b) \min(x / r, (1 - x) / (1 - r)) s`, a triangle from ``base_lr`` b to ``max_lr`` u.

    :math:`x = t / S - \lfloor t / S \rfloor` is the place in a cycle of S steps, of which the share r goes up; s is 1
    for "triangular", :math:`2^{-\lfloor t / S \rfloor}` for "triangular2", :math:`\gamma^t` for "exp_range", or
    ``scale_fn`` of the number of the cycle or of t. The schedule is symbolic if ``scale_fn`` takes a symbol.

    Smith, Cyclical Learning Rates for Training Neural Networks, WACV 2017.
    """

    __init__ = _keeping_kinds(lr_scheduler.CyclicLR.__init__)

    @property
    def _calls(self) -> str:  # type: ignore[override]
        return "" if self._scale_fn_custom is None else "each step calls scale_fn"

    @staticmethod
    def _formula(
        t: Any, low: Any, high: Any, total_size: Any, step_ratio: Any, gamma: Any, mode: str, scale: Any
    ) -> Any:
        cycles = library(t).floor(t // total_size)
        x = t / total_size - cycles
        height = x if step_ratio == 1 else minimum(x / step_ratio, (1 - x) / (1 - step_ratio))
        if scale is not None:
            height = height * scale(cycles + 1 if mode == "cycle" else t)
        elif mode == "triangular2":
            height = height * 2**-cycles
        elif mode == "exp_range":
            height = height * gamma**t
        return low + (high - low) * height

    def _closed_form(self, group: int, of: str, **given: Any) -> Form:
        custom = self._scale_fn_custom
        scale = None if custom is None else UserFunction(custom, "scale_fn", first=1)
        mode = self.mode if custom is None else self.scale_mode
        names = ("base_lr", "max_lr") if of == "lr" else ("max_momentum", "base_momentum")
        low, high = (self._parameter(name, group) for name in names)
        return self._form(self._formula, group, {"low": low, "high": high, "mode": mode, "scale": scale})
