"""Weight averaging: torch.optim.swa_utils, with averages that are updated in one launch.

An average is an update rule like any other: the averaged tensor in the place of the parameter, the model's in that of
its gradient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import swa_utils
from torch.optim.swa_utils import PARAM_LIST as PARAM_LIST

from compiled_optim._engine.executions.checks import PLAIN
from compiled_optim._engine.executions.launch import Counts, Plan, Row, make_plan
from compiled_optim._engine.executions.memory import Memory, ShortStorageError, check_storage
from compiled_optim._engine.executions.work import Work
from compiled_optim._engine.fallback import COMPILE_ERRORS, Fallback
from compiled_optim._engine.in_graph.handles import same
from compiled_optim._engine.kernels.backends import is_capturing
from compiled_optim._engine.torch_private import dynamo, inductor
from compiled_optim._engine.values import lerp
from compiled_optim.declare import number
from compiled_optim.lr_scheduler import SWALR
from compiled_optim.optimizer import Optimizer

__all__ = [
    "SWALR",
    "AveragedModel",
    "get_ema_avg_fn",
    "get_ema_multi_avg_fn",
    "get_swa_avg_fn",
    "get_swa_multi_avg_fn",
    "update_bn",
]

AvgFn = Callable[[Tensor, Tensor, Any], Tensor]
MultiAvgFn = Callable[[Any, Any, Any], None]


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


class _Weighted:
    """What the ``get_..._fn`` below return: torch's function, and the weight of the model after ``n`` others."""

    def __init__(self, function: Callable[..., Any], weight: Callable[[int], float]) -> None:
        self.function, self.weight = function, weight

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


_torch: Any = swa_utils  # whose functions are not annotated


def get_ema_avg_fn(decay: float = 0.999) -> AvgFn:
    """``decay * average + (1 - decay) * model``; ValueError if ``decay`` is not in [0, 1]."""
    return _Weighted(_torch.get_ema_avg_fn(decay), lambda n: 1 - decay)


def get_ema_multi_avg_fn(decay: float = 0.999) -> MultiAvgFn:
    """`get_ema_avg_fn` for lists of tensors, in place."""
    return _Weighted(_torch.get_ema_multi_avg_fn(decay), lambda n: 1 - decay)


def get_swa_avg_fn() -> AvgFn:
    """The equal average: ``average + (model - average) / (averaged + 1)``."""
    return _Weighted(_torch.get_swa_avg_fn(), lambda n: 1 / (n + 1))


def get_swa_multi_avg_fn() -> MultiAvgFn:
    """`get_swa_avg_fn` for lists of tensors, in place; of integers too, for which torch's raises."""
    single, lists = _torch.get_swa_avg_fn(), _torch.get_swa_multi_avg_fn()

    def update(averaged: Any, current: Any, n: Any) -> None:
        if averaged[0].is_floating_point() or averaged[0].is_complex():
            lists(averaged, current, n)
        else:
            for average, model in zip(averaged, current, strict=True):
                average.copy_(single(average, model, n))

    return _Weighted(update, lambda n: 1 / (n + 1))


_EQUAL = get_swa_avg_fn()
_PLAIN = frozenset(PLAIN)


class _Launcher:
    """The launch that updates one set of averaged tensors.

    Args:
        on_device: whether the weight of a model is a tensor on a device.
    """

    def __init__(self, averaged: list[Tensor], fn: Any, on_device: bool, fallback: Fallback) -> None:
        self.averaged, self.fn, self.on_device, self.fallback = averaged, fn, on_device, fallback
        rule = (_Average if isinstance(fn, _Weighted) else _custom(fn)).rule
        options = rule.declaration.check({})
        group = {"params": averaged, **options, "capturable": on_device}
        self.work = Work(rule, [group], defaultdict(dict), options, Memory())
        self.counts: list[Counts] = [] if on_device else [(0, (2.0,))]  # whose scalars a launch needs
        self.plan: Plan | None = None
        self.failed = ""

    def fits(self, averaged: list[Tensor], fn: Any, on_device: bool) -> bool:
        return self.fn is fn and self.on_device == on_device and same(averaged, self.averaged)

    def run(
        self,
        model_of: dict[Tensor, Tensor],
        weight: float | Tensor,
        other: Callable[[Tensor, Tensor], Tensor],
        casts: bool,
    ) -> None:
        """Updates the averages in place, all or none.

        Args:
            other: the new value of an average that no kernel takes, given that and the model's.
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
        self.work.groups[0]["weight"] = weight
        outcome: Any = None
        for _ in range(3):
            if self.plan is None or isinstance(outcome, str):  # there is none, or it no longer fits
                _check(model_of, model_of, casts)
                self.plan = self._make_plan()
            others = [p for _, p, _ in self.plan.elsewhere]
            _check((*self.plan.copied, *others), model_of, casts)  # the launch checks the rest
            new = [(p, other(p, model_of[p]).expand(p.shape)) for p in others]
            outcome = self.plan.run(self.work, self._rows(self.plan, weight))
            if outcome is None:
                for p, value in new:
                    p.copy_(value)
                return
            if isinstance(outcome, list):
                self.counts = outcome
        raise RuntimeError(f"a launch plan that was just made does not fit: {outcome}")

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
            return make_plan(self.work, choices, [("weight",)], self._refused)
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


class AveragedModel(swa_utils.AveragedModel):
    r"""A copy of a model that holds an average of its weights (Izmailov et al. 2018, arXiv:1803.05407).

    .. math:: \bar\theta \leftarrow \bar\theta + w\,(\theta - \bar\theta)

    with :math:`w = 1 / (n + 1)` after :math:`n` models, or :math:`1 - \text{decay}` with ``get_ema_avg_fn``.

    An update that raises changes nothing. To ensure that for your own functions, an update copies the average first.

    Args:
        model: the model to average; the average begins as a copy of it.
        device: where the average is kept; default: where the model is.
        avg_fn: ``avg_fn(average, model, n)`` returns the new average of one tensor after ``n`` models; default: the
            equal average.
        multi_avg_fn: the same for lists of tensors, in place. Not together with ``avg_fn``.
        use_buffers: average the buffers of the model too; otherwise they are copied.
        compiled: False averages as torch does. True updates all tensors of a dtype in one launch, in place. Your own
            ``avg_fn`` is compiled if it is elementwise, for as long as what it refers to does not change. After that it
            is called as torch calls it, with a warning, as your own ``multi_avg_fn`` always is.

    Example:
        >>> import torch
        >>> from compiled_optim.swa_utils import AveragedModel, get_ema_avg_fn
        >>> model = torch.nn.Linear(3, 1)
        >>> average = AveragedModel(model, avg_fn=get_ema_avg_fn(0.99), compiled=True)
        >>> average.update_parameters(model)  # after each step of the optimizer
        >>> average(torch.ones(2, 3)).shape
        torch.Size([2, 1])
    """

    def __init__(
        self,
        model: Module,
        device: int | torch.device | None = None,
        avg_fn: AvgFn | None = None,
        multi_avg_fn: MultiAvgFn | None = None,
        use_buffers: bool = False,
        *,
        compiled: bool = False,
    ) -> None:
        if compiled not in (False, True):
            raise ValueError(f"compiled must be False or True, got {compiled!r}")
        super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)
        self.compiled = compiled
        self._launcher: _Launcher | None = None

    _fallback: Fallback | None = None  # made when it is needed, and again after a copy

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_launcher": None, "_fallback": None}

    def update_parameters(self, model: Module) -> None:
        """Takes the weights of ``model`` into the average, in place. The first call copies them.

        Raises:
            CompileError: in strict mode, if this average cannot be compiled although it was to be.
        """
        if torch.compiler.is_compiling():
            _update_outside_graphs(self, model)
        else:
            self._update(model)

    def _update(self, model: Module) -> None:
        on_device = not self.n_averaged.is_cpu  # so that reading the count would wait for the device
        known = isinstance(self._function, _Weighted) if on_device else bool(self.n_averaged)
        if not (self.compiled and known):
            self._update_eagerly(model)
            return
        fallback = self._fallback = self._fallback or Fallback()
        if not fallback.reason():
            try:
                self._launch(model, fallback)
                return
            except COMPILE_ERRORS as error:
                fallback.tell(f"the average is updated eagerly: {error}", "repair that, or set compiled=False")
        self._update_eagerly(model)

    def _update_eagerly(self, model: Module) -> None:
        """Updates as torch does. If it raises, what it has written is taken back."""
        mine, theirs = ([*m.parameters(), *m.buffers()] for m in (self.module, model))
        for t in (*mine, *theirs):  # torch would read and write outside of the storage
            try:
                check_storage(t)
            except ShortStorageError as error:
                raise RuntimeError(f"a tensor of shape {tuple(t.shape)} of the model or its average {error}") from error
        can_raise = not isinstance(self._function, _Weighted) or _kinds(mine) != _kinds(theirs)
        saved = [(t, t.detach().clone()) for t in mine] if can_raise else []
        try:
            super().update_parameters(model)
        except BaseException:
            with torch.no_grad():
                for tensor, value in saved:
                    tensor.copy_(value)
            raise

    @property
    def _function(self) -> Any:
        return next((fn for fn in (self.avg_fn, self.multi_avg_fn) if fn is not None), _EQUAL)

    @torch.no_grad()
    def _launch(self, model: Module, fallback: Fallback) -> None:
        fn, on_device = self._function, not self.n_averaged.is_cpu
        if self.multi_avg_fn is not None and not isinstance(fn, _Weighted):
            raise inductor.LoweringError("a multi_avg_fn works on lists in place, and only an avg_fn can be compiled")
        mine, my_buffers = _tensors(self.module)
        theirs, their_buffers = _tensors(model)
        if self.use_buffers:
            mine, theirs = mine + my_buffers, theirs + their_buffers
        elif [b.shape for b in my_buffers] != [b.shape for b in their_buffers]:
            raise inductor.LoweringError("the buffers of the model are of other shapes than those of its average")
        model_of = dict(zip(mine, theirs, strict=False))
        if len(model_of) < len(mine) or len(set(map(id, theirs))) < len(theirs):  # each tied parameter once
            model_of = dict(zip(dict.fromkeys(mine), dict.fromkeys(theirs), strict=False))
        if not _PLAIN.issuperset(map(type, theirs)):  # most subclasses of Parameter are plain tensors underneath
            model_of = {p: current.detach() for p, current in model_of.items()}
        averaged = list(model_of)
        if not isinstance(fn, _Weighted) and any(p.is_complex() for p in averaged):
            raise inductor.LoweringError("a kernel takes complex numbers as two, which an avg_fn may not")
        launcher = self._launcher
        if launcher is None or not launcher.fits(averaged, fn, on_device):
            launcher = self._launcher = _Launcher(averaged, fn, on_device, fallback)
        weight: Any
        if on_device:
            n = self.n_averaged.double()
            weight = torch.where(n == 0, 1.0, torch.zeros_like(n) + fn.weight(n))
        else:
            if averaged and is_capturing(averaged[0].device):
                raise RuntimeError(
                    "a CUDA graph cannot capture an average whose models are counted on the host: build the "
                    "AveragedModel with the device of the model, so that n_averaged lies there"
                )
            count = int(self.n_averaged)
            weight = fn.weight(count) if isinstance(fn, _Weighted) else count
        launcher.run(model_of, weight, self._other, casts=self.multi_avg_fn is None)
        if not self.use_buffers:
            for average, buffer in zip(my_buffers, their_buffers, strict=True):
                average.copy_(buffer)
        self.n_averaged += 1

    def _other(self, average: Tensor, current: Tensor) -> Tensor:
        """The new value of an average, from the function that torch would call."""
        average, current, n = average.detach(), current.detach().to(average.device), self.n_averaged.to(average.device)
        if self.multi_avg_fn is None:
            return self._function(average, current, n)  # type: ignore[no-any-return]
        average = average.clone()
        self.multi_avg_fn([average], [current], n)
        return average


_update_outside_graphs = dynamo.never_traced(AveragedModel._update)


def _tensors(module: Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and buffers, in one walk. torch's two walks take half of the time of a small average."""
    modules = list(module.modules())
    parameters: list[Tensor] = [p for m in modules for p in m._parameters.values() if p is not None]
    return parameters, [b for m in modules for b in m._buffers.values() if b is not None]


def _kinds(tensors: list[Tensor]) -> list[Any]:
    return [(t.shape, t.dtype) for t in tensors]


def update_bn(loader: Iterable[Any], model: Module, device: Any = None) -> None:
    """Recomputes the statistics of BatchNorm layers in one pass over ``loader``, as torch.optim.swa_utils does.

    Args:
        loader: batches, each a tensor, a list or tuple that begins with one, or a dict, which the model is given whole.
        model: the model whose layers are updated.
        device: where to move the batches, the tensors in a dict included.
    """

    def moved(batch: Any) -> Any:
        if isinstance(batch, list | tuple):
            batch = batch[0]
        if device is None:
            return batch
        if isinstance(batch, dict):
            return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return batch.to(device)

    swa_utils.update_bn((moved(batch) for batch in loader), model)
