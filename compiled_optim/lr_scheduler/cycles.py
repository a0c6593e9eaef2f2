"""Cycles of the learning rate, and of momentum the other way."""

from __future__ import annotations

import functools
import math
from typing import Any

import sympy as sp  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.optim import lr_scheduler

from compiled_optim.lr_scheduler.code import Form, base_lr, compiled, parameters, t, traced
from compiled_optim.lr_scheduler.symbolic import Absolute, assigned, number


class _Cycle(Absolute):
    cycle_momentum: bool
    use_beta1: bool

    @property
    def schedules(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("lr", "momentum") if self.cycle_momentum else ("lr",)

    def _new(self) -> dict[str, list[Any]]:
        """The values of the step, for each group, of what is scheduled."""
        raise NotImplementedError

    def _new_lrs(self) -> list[Any]:
        new = self._new()
        for group, momentum in zip(self.optimizer.param_groups, new.get("momentum", ()), strict=False):
            if self.use_beta1:
                beta1, *others = group["betas"]
                group["betas"] = (assigned(beta1, momentum), *others)
            else:
                group["momentum"] = assigned(group["momentum"], momentum)
        return new["lr"]


def _keeping_kinds(init: Any) -> Any:
    """A constructor that replaces tensors by numbers, or numbers by tensors, made to assign what is there."""

    @functools.wraps(init)
    def __init__(self: Any, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
        groups = getattr(optimizer, "param_groups", [])
        found = [{k: group[k] for k in ("lr", "momentum", "betas") if k in group} for group in groups]
        init(self, optimizer, *args, **kwargs)
        for group, before in zip(groups, found, strict=True):
            for name, old in before.items():
                both = (old, group[name])
                group[name] = tuple(map(assigned, *both)) if name == "betas" else assigned(*both)

    return __init__


class OneCycleLR(_Cycle, lr_scheduler.OneCycleLR):
    r"""From :math:`\eta_0` up to ``max_lr`` and down to ``min_lr``, in two or three phases.

    In a phase from step a to b and from value u to v, :math:`\eta_t = v + (u - v) (1 + \cos \pi x) / 2` with
    :math:`x = (t - a) / (b - a)`; or :math:`u + (v - u) x` for "linear". Momentum moves the other way. A phase without
    steps is at its end, where torch divides by zero.

    Smith & Topin, Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates, 2018.
    """

    __init__ = _keeping_kinds(lr_scheduler.OneCycleLR.__init__)

    def _closed_form(self, group: int, of: str) -> Form:
        options = self.optimizer.param_groups[group]
        return self._formula(), {f"v{i}": options[name] for i, name in enumerate(self._names(of))}

    def _formula(self) -> sp.Expr:
        return _phases(tuple([phase["end_step"] for phase in self._schedule_phases]), self._anneal_func_type)

    def _names(self, of: str) -> list[str]:
        phases: list[Any] = self._schedule_phases
        return [*[phase[f"start_{of}"] for phase in phases], phases[-1][f"end_{of}"]]

    def _new(self) -> dict[str, list[Any]]:
        symbols, function = compiled(self._formula())
        indices, new = [int(symbol[1:]) for symbol in symbols], {}
        for of in self.schedules:
            names = self._names(of)
            used = [names[i] for i in indices]
            new[of] = [function(self.last_epoch, *[g[name] for name in used]) for g in self.optimizer.param_groups]
        return new

    def _check_next(self) -> None:
        self._check_end(self.last_epoch + 1)

    def _check_end(self, step: int) -> None:
        if step > self.total_steps:
            raise ValueError(f"Tried to step {step} times. The specified number of total steps is {self.total_steps}")

    def _new_lrs(self) -> list[Any]:
        self._check_end(self.last_epoch)
        return super()._new_lrs()


@functools.lru_cache(maxsize=256)
def _phases(ends: tuple[float, ...], strategy: str) -> sp.Expr:
    values = parameters(f"v:{len(ends) + 1}")
    pieces = []
    for begin, end, u, v in zip((0, *ends), ends, values, values[1:], strict=False):
        x = (t - number(begin)) / number(end - begin) if end != begin else 1
        value = v + (u - v) * (1 + sp.cos(sp.pi * x)) / 2 if strategy == "cos" else u + (v - u) * x
        pieces.append((value, t <= number(end)))
    return sp.Piecewise(*pieces[:-1], (pieces[-1][0], True))


class CyclicLR(_Cycle, lr_scheduler.CyclicLR):
    r""":math:`\eta_t = b + (u - b) \min(x / r, (1 - x) / (1 - r)) s`, a triangle from ``base_lr`` b to ``max_lr`` u.

    :math:`x = t / S - \lfloor t / S \rfloor` is the place in a cycle of S steps, of which the share r goes up; s is 1
    for "triangular", :math:`2^{-\lfloor t / S \rfloor}` for "triangular2", :math:`\gamma^t` for "exp_range", or
    ``scale_fn`` of the number of the cycle or of t. The schedule is symbolic if ``scale_fn`` takes a symbol.

    Smith, Cyclical Learning Rates for Training Neural Networks, WACV 2017.
    """

    __init__ = _keeping_kinds(lr_scheduler.CyclicLR.__init__)

    def _closed_form(self, group: int, of: str) -> Form:
        if self._scale_fn_custom is None:
            scale = _SCALES[self.mode]
        else:
            scale = traced(self._scale_fn_custom, "scale_fn", first=1)
            scale = scale.subs(t, _CYCLES + 1) if self.scale_mode == "cycle" else scale
        return self._form(_CYCLE[of].xreplace({_height: _heights(self.step_ratio == 1, scale)}), group)

    def value(self, t: Any, group: int = 0, of: str = "lr") -> Any:
        """As for all schedulers; numbers go to ``scale_fn`` itself, symbolic or not."""
        if isinstance(t, Tensor) or self._scale_fn_custom is None:
            return super().value(t, group, of)
        self._check(group, of)
        return float(self._at(0, self._form(_CYCLE[of], group, height=self._height(t))))

    def _height(self, step: Any) -> Any:
        custom = self._scale_fn_custom
        names, function = compiled(_heights(self.step_ratio == 1, sp.S.One if custom else _SCALES[self.mode]))
        height = function(step, *[getattr(self, name) for name in names])
        if custom is None:
            return height
        return height * custom(math.floor(1 + step / self.total_size) if self.scale_mode == "cycle" else step)

    def _new(self) -> dict[str, list[Any]]:
        height, new = self._height(self.last_epoch), {}
        for of in self.schedules:
            function = compiled(_CYCLE[of])[1]
            limits = (self.base_lrs, self.max_lrs) if of == "lr" else (self.base_momentums, self.max_momentums)
            new[of] = [function(0, low, height, high) for low, high in zip(*limits, strict=True)]
        return new


base_momentum, max_momentum, max_lr = parameters("base_momentum max_momentum max_lr")
gamma, total_size, step_ratio, _height = parameters("gamma total_size step_ratio height")
_CYCLES = sp.floor(t / total_size)
_SCALES = {"triangular": sp.S.One, "triangular2": sp.S(2) ** -_CYCLES, "exp_range": gamma**t}
_CYCLE = {
    "lr": base_lr + (max_lr - base_lr) * _height,
    "momentum": max_momentum - (max_momentum - base_momentum) * _height,
}


@functools.lru_cache(maxsize=256)
def _heights(up_only: bool, scale: sp.Expr) -> sp.Expr:
    x = t / total_size - _CYCLES
    return scale * (x if up_only else sp.Min(x / step_ratio, (1 - x) / (1 - step_ratio)))
