"""Every schedule of torch, once, as its closed form in the step ``t``.

Each class is a subclass of torch's of the same name, with its arguments, attributes, checks and ``state_dict``. In the
formulas, :math:`\\eta_0` is the learning rate the scheduler found in the param group.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import sympy as sp  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.optim import lr_scheduler, swa_utils

from compiled_optim.lr_scheduler.code import Form, base_lr, compiled, parameters, t, traced
from compiled_optim.lr_scheduler.symbolic import Absolute, Relative, Scheduler, scaled

gamma, step_size, factor, start_factor, end_factor = parameters("gamma step_size factor start_factor end_factor")
iterations, power, T_max, T_0, T_i, T_mult = parameters("iterations power T_max T_0 T_i T_mult")
eta_min, swa_lr, anneal_epochs = parameters("eta_min swa_lr anneal_epochs")


# ---- relative: they move the learning rate on


class StepLR(Relative, lr_scheduler.StepLR):
    r""":math:`\eta_t = \eta_0 \gamma^{\lfloor t / S \rfloor}` with ``step_size`` S."""

    formula = gamma ** sp.floor(t / step_size)


class MultiStepLR(Relative, lr_scheduler.MultiStepLR):
    r""":math:`\eta_t = \eta_0 \gamma^k`, k being the number of milestones up to t."""

    @property
    def formula(self) -> sp.Expr:
        return _steps(tuple(self.milestones.items()))


@functools.lru_cache(maxsize=256)
def _steps(counts: tuple[tuple[int, int], ...]) -> sp.Expr:
    milestones = sorted(Counter(dict(counts)).elements())
    pieces = [(gamma**k, t < milestone) for k, milestone in enumerate(milestones)]
    return sp.Piecewise(*pieces, (gamma ** len(milestones), True))


class _Finite(Relative):
    total_iters: int

    @property
    def iterations(self) -> float:
        return self.total_iters or math.inf  # torch's recursions: 0 iterations never end


class ConstantLR(_Finite, lr_scheduler.ConstantLR):
    r""":math:`\eta_t = c \eta_0` while :math:`t < T`, then :math:`\eta_0`, with ``factor`` c, ``total_iters`` T."""

    formula = sp.Piecewise((factor, t < iterations), (1, True))


class LinearLR(_Finite, lr_scheduler.LinearLR):
    r""":math:`\eta_t = \eta_0 (a + (b - a) \min(t, T) / T)`, from ``start_factor`` a to ``end_factor`` b.

    T is ``total_iters``.
    """

    formula = start_factor + (end_factor - start_factor) * sp.Min(t, iterations) / iterations


class ExponentialLR(Relative, lr_scheduler.ExponentialLR):
    r""":math:`\eta_t = \eta_0 \gamma^t`."""

    formula = gamma**t


class PolynomialLR(_Finite, lr_scheduler.PolynomialLR):
    r""":math:`\eta_t = \eta_0 (1 - \min(t, T) / T)^p` with ``total_iters`` T and ``power`` p."""

    formula = (1 - sp.Min(t, iterations) / iterations) ** power


class CosineAnnealingLR(Relative, lr_scheduler.CosineAnnealingLR):
    r""":math:`\eta_t = m + (\eta_0 - m) (1 + \cos(\pi t / T)) / 2` with ``T_max`` T and ``eta_min`` m.

    Loshchilov & Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, ICLR 2017.
    """

    floor = eta_min
    formula = (1 + sp.cos(sp.pi * t / T_max)) / 2


class SWALR(Relative, swa_utils.SWALR):
    r""":math:`\eta_t = s + (\eta_0 - s) (1 - \alpha(\min(t, T) / T))` with ``swa_lr`` s, ``anneal_epochs`` T.

    :math:`\alpha(x)` is :math:`(1 - \cos \pi x) / 2`, or x for "linear". The step t counts from the first step of this
    scheduler, and :math:`\eta_0` is the learning rate found there.

    Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018.
    """

    floor = swa_lr

    @property
    def formula(self) -> sp.Expr:
        return _ANNEALING[self._anneal_strategy] if self.anneal_epochs else sp.S.Zero

    def _position(self) -> int:
        return self._step_count - 1

    def _from_zero(self, closed: list[Any]) -> list[Any]:
        return closed  # annealed: a learning rate changed by hand is set again

    def _get_closed_form_lr(self) -> list[Any]:
        return self.get_lr()  # torch has no other here


_ANNEALED = sp.Min(t, anneal_epochs) / anneal_epochs
_ANNEALING = {"cos": (1 + sp.cos(sp.pi * _ANNEALED)) / 2, "linear": 1 - _ANNEALED}


class MultiplicativeLR(Scheduler, lr_scheduler.MultiplicativeLR):
    r""":math:`\eta_t = \eta_0 \prod_{i=1}^{t} \lambda(i)`; symbolic if ``lr_lambda`` is and the product is."""

    def _closed_form(self, group: int, of: str) -> Form:
        name = f"lr_lambda of param group {group}"
        factor, i = traced(self.lr_lambdas[group], name), sp.Symbol("i", integer=True, positive=True)
        product = sp.gammasimp(sp.product(factor.xreplace({t: i}), (i, 1, t)))
        if product.has(sp.Product):
            raise TypeError(f"{name} is not symbolic: the product of {factor} over t has no closed form")
        return self._form(base_lr * product, group)

    def _new_lrs(self) -> list[Any]:
        if self._is_initial:
            return super(Scheduler, self).get_lr()
        pairs = zip(self.optimizer.param_groups, self.lr_lambdas, strict=True)
        return [group["lr"] * function(self.last_epoch) for group, function in pairs]


# ---- absolute: they set it


class LambdaLR(Absolute, lr_scheduler.LambdaLR):
    r""":math:`\eta_t = \eta_0 \lambda(t)`; symbolic if ``lr_lambda`` takes a symbol."""

    def _closed_form(self, group: int, of: str) -> Form:
        return self._form(base_lr * traced(self.lr_lambdas[group], f"lr_lambda of param group {group}"), group)

    def _new_lrs(self) -> list[Any]:
        return [lr * f(self.last_epoch) for lr, f in zip(self.base_lrs, self.lr_lambdas, strict=True)]

    def value(self, t: Any, group: int = 0, of: str = "lr") -> Any:
        """As for all schedulers; numbers go to ``lr_lambda`` itself, symbolic or not."""
        if isinstance(t, Tensor):
            return super().value(t, group, of)
        self._check(group, of)
        return float(self.base_lrs[group]) * float(self.lr_lambdas[group](t))


class SymbolicLR(Absolute):
    r""":math:`\eta_t` as any expression says.

    Args:
        optimizer: any torch.optim.Optimizer.
        expression: a sympy expression in ``t`` and, where the learning rate of the param group enters, ``base_lr``
            (symbols of these names, whatever is assumed of them); or a list with one for each param group. It is no
            part of the ``state_dict``, like the function of `LambdaLR`.
        last_epoch: as in torch.

    Raises:
        TypeError: for what is no expression.
        ValueError: for another symbol, or a list of another length than the optimizer's param groups.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, expression: sp.Expr | Sequence[sp.Expr], last_epoch: int = -1
    ) -> None:
        several = isinstance(expression, list | tuple)
        expressions = list(expression) if several else [expression] * len(optimizer.param_groups)
        if len(expressions) != len(optimizer.param_groups):
            raise ValueError(
                f"expression must have one entry for each of {len(optimizer.param_groups)} param groups, "
                f"got {len(expressions)}"
            )
        self.expressions = [_in_ourparameters(e) for e in expressions]
        super().__init__(optimizer, last_epoch)

    def _closed_form(self, group: int, of: str) -> Form:
        return self._form(self.expressions[group], group)

    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().state_dict().items() if k != "expressions"}


def _in_ourparameters(expression: Any) -> sp.Expr:
    if not isinstance(expression, sp.Expr | int | float):
        raise TypeError(f"expression must be a sympy expression, got {expression!r}")
    expression = sp.sympify(expression)
    known = {s.name: s for s in (t, base_lr)}
    others = sorted(s.name for s in expression.free_symbols if s.name not in known)
    if others:
        raise ValueError(f"expression may have the symbols t and base_lr, got {others[0]!r} in {expression}")
    return expression.xreplace({s: known[s.name] for s in expression.free_symbols})


class CosineAnnealingWarmRestarts(Absolute, lr_scheduler.CosineAnnealingWarmRestarts):
    r""":math:`\eta_t = m + (\eta_0 - m) (1 + \cos(\pi t' / T')) / 2`, t' steps into a period of :math:`T' = T_0 k^n`.

    :math:`n = \lfloor \log_k(1 + (k - 1) t / T_0) \rfloor` restarts came before, with ``T_mult`` k and ``eta_min`` m.
    After ``step(epoch)``, ``epoch`` is t, whole or not.

    Loshchilov & Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, ICLR 2017.
    """

    def step(self, epoch: float | None = None) -> None:
        self._check_by_hand()
        if epoch is None and self.T_cur >= self.T_i:  # as after ``last_epoch=99``, of which torch takes one period off
            self._begin_at(self.T_cur)
        differentiable = any(isinstance(g["lr"], Tensor) and g["lr"].requires_grad for g in self.optimizer.param_groups)
        with torch.no_grad() if differentiable else contextlib.nullcontext():
            super().step(epoch)  # which sets the learning rates by itself

    @property
    def _steps_taken(self) -> Any:
        return self.last_epoch + self.T_cur % 1  # the periods are whole

    def _move_to(self, step: Any) -> None:
        super()._move_to(math.floor(step))
        self._begin_at(step)

    def _begin_at(self, step: Any) -> None:
        self.T_cur, self.T_i = step % self.T_0 if self.T_mult == 1 else step, self.T_0
        while self.T_cur >= self.T_i:
            self.T_cur, self.T_i = self.T_cur - self.T_i, self.T_i * self.T_mult

    def _closed_form(self, group: int, of: str) -> Form:
        return self._form(_warm_restarts(self.T_mult), group)

    def _new_lrs(self) -> list[Any]:
        if self.T_cur >= self.T_i:  # where torch's logarithm fell short of a whole number
            self.T_cur, self.T_i = self.T_cur - self.T_i, self.T_i * self.T_mult
        factor = compiled(CosineAnnealingLR.formula)[1](self.T_cur, self.T_i)
        return [scaled(self.eta_min, lr, factor) for lr in self.base_lrs]


_PERIOD = scaled(eta_min, base_lr, CosineAnnealingLR.formula.subs(T_max, T_i))


@functools.lru_cache(maxsize=256)
def _warm_restarts(multiple: int) -> sp.Expr:
    if multiple == 1:
        return _PERIOD.subs({t: sp.Mod(t, T_0), T_i: T_0}, simultaneous=True)
    rounding = sp.Float(2.0**-40)  # or the floor is one less at some restarts
    count = sp.floor(sp.log(1 + (T_mult - 1) * t / T_0) / sp.log(T_mult) + rounding)
    begin = T_0 * (T_mult**count - 1) / (T_mult - 1)
    return _PERIOD.subs({t: t - begin, T_i: T_0 * T_mult**count}, simultaneous=True)
