"""The launch of an average. It is an update rule: the average is the parameter, and the model its gradient."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from compiled_optim._engine import fallback
from compiled_optim._engine.executions.launch import Counts, Plan, Row, make_plan
from compiled_optim._engine.executions.memory import Memory
from compiled_optim._engine.executions.work import Work
from compiled_optim._engine.fallback import COMPILE_ERRORS, Fallback
from compiled_optim._engine.in_graph.handles import same
from compiled_optim._engine.kernels.references import refer_to
from compiled_optim._engine.torch_private import inductor, modules
from compiled_optim._engine.values import lerp
from compiled_optim.declare import number
from compiled_optim.optimizer import Optimizer
from compiled_optim.swa_utils.functions import AvgFn, weighted

QuickUpdate = Callable[[Module, Module], bool]  # of an average by a model; False if that is left to `Launcher.run`
SETTINGS = ("avg_fn", "multi_avg_fn", "use_buffers", "compiled")  # attributes that decide how an average is updated


class _Rule(Optimizer):
    weight: float = number(default=1.0)

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"weight": h.weight}


class _Average(_Rule):
    """A linear interpolation towards the model: the equal average and the exponential one."""

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        return lerp(p, g, k.weight)


def _custom(avg_fn: Any) -> type[_Rule]:
    """The rule of a user's ``avg_fn``; its weight is the number of models that were averaged."""
    kind: Any = type(avg_fn)
    function = avg_fn.__call__ if isinstance(kind.__call__, FunctionType) else avg_fn  # for an object, its method

    class Custom(_Rule):
        @staticmethod
        def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
            n = k.weight
            return function(p, g, n if isinstance(n, Tensor) else torch.tensor(int(n), device="cpu"))

    return Custom


def _of_one(multi_avg_fn: Any, tensors: int) -> AvgFn:
    """A ``multi_avg_fn`` as an ``avg_fn``, tried on lists of so many ``tensors``.

    Raises:
        ValueError: when it is called, if a tensor is not averaged as it is alone.
    """

    def alone(average: Tensor, model: Tensor, n: Any) -> Tensor:
        new = average.clone()
        multi_avg_fn([new], [model], n)
        return new

    def of_one(average: Tensor, model: Tensor, n: Any) -> Tensor:
        if type(average) is not Tensor:  # it is traced, which takes no writes
            new: Tensor = inductor.WithoutWrites(alone)(average, model, n)
            return new
        pairs = [(average + i % 2, model - i % 2) for i in range(tensors)]
        averages = [p.clone() for p, _ in pairs]
        multi_avg_fn(averages, [q for _, q in pairs], n)
        expected = [alone(p, q, n) for p, q in pairs[:2]]
        if not all(torch.equal(p, expected[i % 2]) for i, p in enumerate(averages)):
            raise ValueError("what it does to one tensor of its lists depends on the others")
        return expected[0]

    return of_one


class Launcher:
    """The launch that updates one set of averaged tensors.

    Args:
        fn: what averages them, a ``multi_avg_fn`` if ``in_lists``.
        on_device: whether the weight of a model is a tensor on a device.
    """

    def __init__(self, averaged: list[Tensor], fn: Any, in_lists: bool, on_device: bool, told: Fallback) -> None:
        self.averaged, self.on_device, self.fallback = averaged, on_device, told
        self._function = fn, in_lists
        known = weighted(fn)
        self.weight = known.weight if known else float
        custom = known is None and _custom(_of_one(fn, len(averaged)) if in_lists else fn)
        rule = (custom or _Average).rule
        options = rule.declaration.check({})
        groups = [{"params": averaged, **options, "capturable": False}]
        if on_device:
            groups[0]["params"] = [p for p in averaged if p.is_cpu]
            groups.append({"params": [p for p in averaged if not p.is_cpu], **options, "capturable": True})
        self.work = Work(rule, groups, defaultdict(dict), options, Memory())
        self.counts: list[Counts] = [] if on_device else [(0, (2.0,))]  # whose scalars a launch needs
        self.plan: Plan | None = None
        self.failed = ""

    def fits(self, averaged: list[Tensor], fn: Any, in_lists: bool, on_device: bool) -> bool:
        as_it_was = self._function[0] is fn and self._function[1] == in_lists and self.on_device == on_device
        return as_it_was and same(averaged, self.averaged)

    def run(
        self,
        model_of: dict[Tensor, Tensor],
        weight: float | Tensor,
        others: Callable[[dict[Tensor, Tensor]], list[Tensor]],
        casts: bool,
    ) -> None:
        """Updates the averages in place, all or none.

        Args:
            others: the new values of averages that no kernel takes, given these with the model's.
            casts: whether the model's may be of another dtype.

        Raises:
            CompileError: for a tensor that could be compiled were it plain and dense, in strict mode.
            What `COMPILE_ERRORS` lists.
        """
        if self.plan is not None and not self.plan.is_current(self.work):
            self.failed = "what its avg_fn refers to has changed since that was compiled"
        if self.failed:
            raise inductor.LoweringError(self.failed)
        self.work.substitutes = model_of
        for group in self.work.groups:
            group["weight"] = weight
        outcome: Any = None
        try:
            for _ in range(3):
                if self.plan is None or isinstance(outcome, str):  # there is none, or it no longer fits
                    _check(model_of, model_of, casts)
                    self.plan = self._make_plan()
                elsewhere = [p for _, p, _ in self.plan.elsewhere]
                _check((*self.plan.copied, *elsewhere), model_of, casts)  # the launch checks the rest
                new = others({p: model_of[p] for p in elsewhere}) if elsewhere else []
                outcome = self.plan.run(self.work, self._rows(self.plan, weight))
                if outcome is None:
                    for p, value in zip(elsewhere, new, strict=True):
                        p.copy_(value.expand(p.shape))
                    return
                if isinstance(outcome, list):
                    self.counts = outcome
            raise RuntimeError(f"a launch plan that was just made does not fit: {outcome}")
        finally:
            self.work.substitutes = None  # an average must not keep the model alive

    def offer(
        self, average: Module, model: Module, model_of: dict[Tensor, Tensor], copies: list[tuple[Tensor, Tensor]]
    ) -> QuickUpdate | None:
        """What takes the next update if that finds what this one, which has run, has found: see host/averages.h."""
        plan = self.plan
        if plan is None or plan.elsewhere or plan.copied or plan.sharded:
            return None
        if any(launch.device.type != "cpu" for launch in plan.launches):  # which a CUDA graph may be capturing
            return None
        known, functions = plan.references, plan.frozen
        native: QuickUpdate | None = plan.host.quick_average(
            plan.native,
            average,
            model,
            self.averaged,
            [*model_of.values()],
            copies,
            self.work.state,
            modules.HELD,
            tuple([(name, vars(average)[name]) for name in SETTINGS]),
            fallback.watched(),
            self.weight,
            tuple([launch.context for launch in plan.launches]),
        )
        if native is None or known is None:
            return native
        return lambda average, model: refer_to(functions, known) and native(average, model)

    def _rows(self, plan: Plan, weight: float | Tensor) -> list[Row]:
        if not self.on_device:
            return [(group, counts, (weight,)) for group, counts in self.counts]
        choices = self.work.read(keep_tensors=True)
        return [
            # a weight on a device that an average on the host needs is waited for
            plan.device_row(self.work, group, counts, choices) if group < 0 else (group, counts, (float(weight),))
            for group, counts in self.counts
        ]

    def _make_plan(self) -> Plan:
        try:
            choices = self.work.read(keep_tensors=self.on_device)
            return make_plan(self.work, choices, [("weight",)] * len(choices), self._refused)
        except COMPILE_ERRORS as error:
            self.failed = str(error)
            raise

    def _refused(self, elsewhere: list[tuple[Tensor, str]]) -> None:
        # Integers, such as the count of BatchNorm, are always averaged eagerly: that is no fallback.
        others = [(p, why) for p, why in elsewhere if p.is_floating_point() or p.is_complex()]
        self.fallback.tell_of(others, "tensor", "averaged eagerly")


def _check(averaged: Iterable[Tensor], model_of: dict[Tensor, Tensor], casts: bool) -> None:
    for p in averaged:
        if p.shape != model_of[p].shape or (p.dtype != model_of[p].dtype and not casts):
            raise inductor.LoweringError("a tensor of the model is of another shape or dtype than its average")
