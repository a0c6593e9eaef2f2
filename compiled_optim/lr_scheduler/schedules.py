"""Every schedule of torch, once, as its closed form in the step ``t``.

Each class is a subclass of torch's of the same name, with its arguments, attributes, checks and ``state_dict``; its
steps are torch's where those are right. A ``_formula`` is a function of a number, of a tensor of steps, and of a sympy
symbol alike; its other arguments are attributes of the scheduler, or of the param group. In the formulas,
:math:`\\eta_0` is the learning rate the scheduler found in the param group.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import lr_scheduler, swa_utils

from compiled_optim.lr_scheduler.formulas import Factor, Form, annealed, library, minimum, piecewise
from compiled_optim.lr_scheduler.functions import UserFunction
from compiled_optim.lr_scheduler.scheduler import Relative, Scheduler

if TYPE_CHECKING:
    import sympy as sp  # type: ignore[import-untyped]


# ---- relative: they move the learning rate on


class StepLR(Relative, lr_scheduler.StepLR):
    r""":math:`\eta_t = \eta_0 \gamma^{\lfloor t / S \rfloor}` with ``step_size`` S."""

    @staticmethod
    def _formula(t: Any, base_lr: Any, gamma: Any, step_size: Any) -> Any:
        return base_lr * gamma ** (t // step_size)


class MultiStepLR(Relative, lr_scheduler.MultiStepLR):
    r""":math:`\eta_t = \eta_0 \gamma^k`, k being the number of milestones up to t."""

    @staticmethod
    def _formula(t: Any, base_lr: Any, gamma: Any, milestones: Any) -> Any:
        return base_lr * piecewise(t, milestones, lambda k: gamma**k)

    def _closed_form(self, group: int, of: str, **given: Any) -> Form:
        return super()._closed_form(group, of, milestones=sorted(self.milestones.elements()), **given)


class _Finite(Relative):
    total_iters: int

    @property
    def iterations(self) -> float:
        return self.total_iters or math.inf  # torch's recursions: 0 iterations never end


class ConstantLR(_Finite, lr_scheduler.ConstantLR):
    r""":math:`\eta_t = c \eta_0` while :math:`t < T`, then :math:`\eta_0`, with ``factor`` c, ``total_iters`` T."""

    @staticmethod
    def _formula(t: Any, base_lr: Any, factor: Any, iterations: Any) -> Any:
        return base_lr * piecewise(t, [iterations], [factor, 1].__getitem__)

    def get_lr(self) -> list[Any]:
        if self.factor or self.last_epoch != self.total_iters:
            return lr_scheduler.ConstantLR.get_lr(self)
        return self._get_closed_form_lr()  # torch divides by the factor


class LinearLR(_Finite, lr_scheduler.LinearLR):
    r""":math:`\eta_t = \eta_0 (a + (b - a) \min(t, T) / T)`, from ``start_factor`` a to ``end_factor`` b.

    T is ``total_iters``.
    """

    @staticmethod
    def _formula(t: Any, base_lr: Any, start_factor: Any, end_factor: Any, iterations: Any) -> Any:
        return base_lr * (start_factor + (end_factor - start_factor) * minimum(t, iterations) / iterations)


class ExponentialLR(Relative, lr_scheduler.ExponentialLR):
    r""":math:`\eta_t = \eta_0 \gamma^t`."""

    @staticmethod
    def _formula(t: Any, base_lr: Any, gamma: Any) -> Any:
        return base_lr * gamma**t


class PolynomialLR(_Finite, lr_scheduler.PolynomialLR):
    r""":math:`\eta_t = \eta_0 (1 - \min(t, T) / T)^p` with ``total_iters`` T and ``power`` p."""

    @staticmethod
    def _formula(t: Any, base_lr: Any, iterations: Any, power: Any) -> Any:
        return base_lr * (1 - minimum(t, iterations) / iterations) ** power


class CosineAnnealingLR(Relative, lr_scheduler.CosineAnnealingLR):
    r""":math:`\eta_t = m + (\eta_0 - m) (1 + \cos(\pi t / T)) / 2` with ``T_max`` T and ``eta_min`` m.

    Loshchilov & Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, ICLR 2017.
    """

    floor = "eta_min"

    @staticmethod
    def _formula(t: Any, base_lr: Any, T_max: Any, eta_min: Any) -> Any:
        return eta_min + (base_lr - eta_min) * annealed(t / T_max)


class SWALR(Relative, swa_utils.SWALR):
    r""":math:`\eta_t = s + (\eta_0 - s) (1 - \alpha(\min(t, T) / T))` with ``swa_lr`` s, ``anneal_epochs`` T.

    :math:`\alpha(x)` is :math:`(1 - \cos \pi x) / 2`, or x for "linear". The step t counts from the first step of this
    scheduler, and :math:`\eta_0` is the learning rate found there.

    Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018.
    """

    floor = "swa_lr"

    @staticmethod
    def _formula(t: Any, base_lr: Any, swa_lr: Any, anneal_epochs: Any, _anneal_strategy: str) -> Any:
        x = minimum(t, anneal_epochs) / anneal_epochs if anneal_epochs else 1
        return swa_lr + (base_lr - swa_lr) * (annealed(x) if _anneal_strategy == "cos" else 1 - x)

    def _get_closed_form_lr(self) -> list[Any]:
        return list(self.get_lr())  # type: ignore[no-untyped-call]  # torch has no other here


class MultiplicativeLR(Scheduler, lr_scheduler.MultiplicativeLR):
    r""":math:`\eta_t = \eta_0 \prod_{i=1}^{t} \lambda(i)`; symbolic if ``lr_lambda`` is and the product is."""

    _calls = "each step calls lr_lambda"

    def _closed_form(self, group: int, of: str, **given: Any) -> Form:
        function, name = self.lr_lambdas[group], f"lr_lambda of param group {group}"

        @functools.cache
        def formula() -> Any:  # once it is asked for: `function` is called often to find it
            from compiled_optim.lr_scheduler import symbolic

            return symbolic.applied(symbolic.base_lr * symbolic.product(symbolic.traced(function, name), name))

        return self._form(lambda t, base_lr: formula()(t, base_lr), group, given)


# ---- absolute: they set it


class LambdaLR(Scheduler, lr_scheduler.LambdaLR):
    r""":math:`\eta_t = \eta_0 \lambda(t)`; symbolic if ``lr_lambda`` takes a symbol.

    A function that does not, for it has an ``if``, a table or ``math.cos``, has its values on numbers only. Attached or
    stepped by hand, any function is called once in each step for each param group, so what it reads may change.
    """

    @property
    def _calls(self) -> str:  # type: ignore[override]
        return "" if all(isinstance(f, Factor) for f in self.lr_lambdas) else "each step calls lr_lambda"

    def _closed_form(self, group: int, of: str, **given: Any) -> Form:
        factor: Any = self.lr_lambdas[group]
        if not isinstance(factor, Factor):
            factor = UserFunction(factor, f"lr_lambda of param group {group}")
        return self._form(lambda t, base_lr: base_lr * factor(t), group, given)


class SymbolicLR(Scheduler):
    r""":math:`\eta_t` as any expression says.

    Args:
        optimizer: any torch.optim.Optimizer.
        expression: a sympy expression in ``t`` and, where the learning rate of the param group enters, ``base_lr``
            (symbols of these names, whatever is assumed of them); the text of one, such as
            ``"base_lr*(1 + cos(pi*t/100))/2"``, which is read and never run as code; or a list with one for each param
            group. It is no part of the ``state_dict``, like the function of `LambdaLR`.
        last_epoch: as in torch.

    Raises:
        TypeError: for what is no expression.
        ValueError: for another symbol, for a text that is no expression, or a list of another length than the
            optimizer's param groups.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        expression: sp.Expr | str | Sequence[sp.Expr | str],
        last_epoch: int = -1,
    ) -> None:
        from compiled_optim.lr_scheduler.symbolic import in_our_symbols
        from compiled_optim.lr_scheduler.text import read

        several = isinstance(expression, list | tuple)
        expressions = list(expression) if several else [expression] * len(optimizer.param_groups)
        if len(expressions) != len(optimizer.param_groups):
            raise ValueError(
                f"expression must have one entry for each of {len(optimizer.param_groups)} param groups, "
                f"got {len(expressions)}"
            )
        self.expressions = [read(e) if isinstance(e, str) else in_our_symbols(e) for e in expressions]
        super().__init__(optimizer, last_epoch)

    def _closed_form(self, group: int, of: str, **given: Any) -> Form:
        from compiled_optim.lr_scheduler.symbolic import applied

        return self._form(applied(self.expressions[group]), group, given)

    def get_lr(self) -> list[Any]:
        """The learning rates of the step that is being taken, as in torch."""
        from compiled_optim.lr_scheduler.symbolic import lambdified

        self._warn_of_get_lr()
        step = float(self.last_epoch)
        return [lambdified(e)(step, lr) for e, lr in zip(self.expressions, self.base_lrs, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in super().state_dict().items() if k != "expressions"}


class CosineAnnealingWarmRestarts(Scheduler, lr_scheduler.CosineAnnealingWarmRestarts):
    r""":math:`\eta_t = m + (\eta_0 - m) (1 + \cos(\pi t' / T')) / 2`, t' steps into a period of :math:`T' = T_0 k^n`.

    :math:`n = \lfloor \log_k(1 + (k - 1) t / T_0) \rfloor` restarts came before, with ``T_mult`` k and ``eta_min`` m.
    After ``step(epoch)``, ``epoch`` is t, whole or not.

    Loshchilov & Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, ICLR 2017.
    """

    @staticmethod
    def _formula(t: Any, base_lr: Any, eta_min: Any, T_0: Any, T_mult: Any) -> Any:
        begin, period = t // T_0 * T_0, T_0
        if T_mult != 1:
            known, rounding = library(t), 2.0**-40  # or the floor is one less at some restarts
            logarithm = known.log(1 + (T_mult - 1) * t / T_0) / library(T_mult).log(T_mult)
            period = T_0 * T_mult ** known.floor(logarithm + rounding)
            begin = (period - T_0) / (T_mult - 1)
        return eta_min + (base_lr - eta_min) * annealed((t - begin) / period)

    def step(self, epoch: float | None = None) -> None:
        """Moves on by one step, or to an epoch, whole or not."""
        self._check_by_hand()
        if epoch is None and self.last_epoch >= 0:
            if self.T_cur >= self.T_i:  # as after ``last_epoch=99``, of which torch takes one period off
                self._begin_at(self.T_cur)
            self.last_epoch, self.T_cur = math.floor(self.last_epoch + 1), self.T_cur + 1
            if self.T_cur >= self.T_i:
                self.T_cur, self.T_i = self.T_cur - self.T_i, self.T_i * self.T_mult
        elif epoch is not None and epoch < 0:
            raise ValueError(f"Expected non-negative epoch, but got {epoch}")
        else:
            self._begin_at(epoch or 0)  # torch's logarithm falls short of some whole numbers
            self.last_epoch = math.floor(epoch or 0)
        self._set(self.get_lr)

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

    def _closed_form(self, group: int, of: str, **given: Any) -> Form:
        return self._form(self._formula, group, given)
