"""A model that holds an average of the weights of another."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.nn import Module
from torch.optim import swa_utils

from compiled_optim._engine.executions.checks import PLAIN
from compiled_optim._engine.executions.memory import ShortStorageError, check_storage
from compiled_optim._engine.fallback import COMPILE_ERRORS, Fallback
from compiled_optim._engine.kernels.backends import is_capturing
from compiled_optim._engine.torch_private import dynamo, inductor, modules
from compiled_optim.swa_utils.functions import EQUAL, AvgFn, MultiAvgFn, weighted
from compiled_optim.swa_utils.launcher import Launcher, QuickUpdate

_PLAIN = frozenset(PLAIN)


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
        use_buffers: average the buffers of the model too, of every dtype; otherwise they are copied.
        compiled: False averages as torch does. True updates all tensors of a dtype in one launch, in place. A function
            of your own is compiled if it is elementwise and treats all tensors of its lists alike, for as long as what
            it refers to does not change. Otherwise it is called as torch calls it, with a warning.

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
        self._launcher: Launcher | None = None

    _fallback: Fallback | None = None  # made when it is needed, and again after a copy
    _quick: QuickUpdate | None = None  # takes the next update if nothing but values has changed

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_launcher": None, "_fallback": None, "_quick": None}

    def update_parameters(self, model: Module) -> None:
        """Takes the weights of ``model`` into the average, in place. The first call copies them.

        Raises:
            ValueError: if the model has other parameters or buffers than its average, fewer, tied otherwise, or more
                that do not come last; torch averages those that happen to stand at the same place.
            RuntimeError: for a parameter or a buffer of another shape or dtype, which the message names.
            CompileError: in strict mode, if this average cannot be compiled although it was to be.
        """
        if not is_dynamo_compiling() and self._quick is not None:
            try:
                if self._quick(self, model):
                    return
            except RuntimeError:
                self._check_storage(self._pairs(model)[0])  # the launch has, too, but knows no names
                raise
        if torch.compiler.is_compiling():
            _update_outside_graphs(self, model)
        else:
            self._update(model)

    def _update(self, model: Module) -> None:
        self._quick = None
        pairs, copies = self._pairs(model)
        if self.compiled and self._has_weight():
            fallback = self._fallback = self._fallback or Fallback()
            if not fallback.reason():
                try:
                    self._launch(model, pairs, copies, fallback)
                    return
                except COMPILE_ERRORS as error:
                    fallback.tell(f"the average is updated eagerly: {error}", "repair that, or set compiled=False")
        self._update_eagerly(model, pairs | copies)

    def _has_weight(self) -> bool:
        """Whether a kernel can average the next model.

        The first model is copied, unless the count lies on a device: to read it, the host would have to wait.
        """
        if self.n_averaged.is_cpu:
            return bool(self.n_averaged)
        known = weighted(self._function)
        return known is not None and (not known.waits or bool(self.n_averaged))

    def _pairs(self, model: Module) -> tuple[dict[Tensor, Tensor], dict[Tensor, Tensor]]:
        """The tensors that are averaged and the buffers that are copied, each with the model's.

        Raises:
            ValueError, RuntimeError: see `update_parameters`.
        """
        mine, my_buffers = modules.tensors(self.module)
        theirs, their_buffers = modules.tensors(model)
        if self.use_buffers:  # which then come last
            their_buffers = _without_later(my_buffers, their_buffers, self.module, model, "buffer")
        else:
            theirs = _without_later(mine, theirs, self.module, model, "parameter")
        pairs = _match(mine, theirs, self.module, model, "parameter")
        copies = _match(my_buffers, their_buffers, self.module, model, "buffer")
        if self.use_buffers:
            pairs, copies = pairs | copies, {}
        kind = weighted(self._function)
        for p, q in (*pairs.items(), *copies.items()):
            problem = ""
            if p.shape != q.shape and (kind or p in copies) and not _broadcasts(q.shape, p.shape):
                problem = f"of the model is of shape {tuple(q.shape)}, and its average of shape {tuple(p.shape)}"
            elif p.dtype != q.dtype and kind and kind.in_lists and p in pairs and self.n_averaged:
                problem = f"of the model is {q.dtype}, and its average {p.dtype}, which a multi_avg_fn does not convert"
            elif q.is_meta and not p.is_meta:
                problem = "of the model is on meta, where there are no values"
            if problem:
                raise RuntimeError(f"{_named(p, self.module)} {problem}")
        return pairs, copies

    def _check_storage(self, pairs: dict[Tensor, Tensor]) -> None:
        """Raises RuntimeError for a tensor that is not all in memory: torch would read and write what is not there."""
        for p, q in pairs.items():
            for t, whose in ((p, "its average"), (q, "the model")):
                try:
                    check_storage(t)
                except ShortStorageError as error:
                    named = _named(p, self.module)
                    raise RuntimeError(f"{named}, of shape {tuple(t.shape)}, in {whose} {error}") from error

    def _update_eagerly(self, model: Module, pairs: dict[Tensor, Tensor]) -> None:
        """Updates as torch does. If it raises, what it has written is taken back."""
        self._check_storage(pairs)
        mine, theirs = list(pairs), list(pairs.values())
        kind = weighted(self._function)
        safe = kind is not None and not kind.waits and _kinds(mine) == _kinds(theirs) and not kind.exceeds_torch(mine)
        saved = [] if safe else [(t, t.detach().clone()) for t in mine]
        replaces_default = self.avg_fn is None and self.multi_avg_fn is None and EQUAL.exceeds_torch(mine)
        try:
            if replaces_default:
                self.avg_fn = EQUAL
            super().update_parameters(model)
        except BaseException:
            with torch.no_grad():
                for tensor, value in saved:
                    tensor.copy_(value)
            raise
        finally:
            if replaces_default:
                self.avg_fn = None

    @property
    def _function(self) -> Any:
        return next((fn for fn in (self.avg_fn, self.multi_avg_fn) if fn is not None), EQUAL)

    @torch.no_grad()
    def _launch(
        self, model: Module, pairs: dict[Tensor, Tensor], copies: dict[Tensor, Tensor], fallback: Fallback
    ) -> None:
        on_device = not self.n_averaged.is_cpu
        kind = weighted(self._function)
        if any(p.shape != q.shape for p, q in copies.items()):
            raise inductor.LoweringError("the buffers of the model are of other shapes than those of its average")
        elsewhere = any(p.device != q.device for p, q in pairs.items())
        if elsewhere or not _PLAIN.issuperset(map(type, pairs.values())):  # most subclasses are plain underneath
            pairs = {p: q.detach().to(p.device) for p, q in pairs.items()}
        averaged = list(pairs)
        if kind is None and any(p.is_complex() for p in averaged):
            raise inductor.LoweringError("a kernel takes complex numbers as two, which a function may not")
        launcher, in_lists = self._launcher, self.multi_avg_fn is not None
        if launcher is None or not launcher.fits(averaged, self._function, in_lists, on_device):
            launcher = self._launcher = Launcher(averaged, self._function, in_lists, on_device, fallback)
        weight: Any
        if on_device and kind:
            n = self.n_averaged.double()
            weight = torch.where(n == 0, 1.0, torch.zeros_like(n) + kind.weight(n))
        else:
            if averaged and is_capturing(averaged[0].device):
                raise RuntimeError(
                    "a CUDA graph cannot capture an average whose models are counted on the host: build the "
                    "AveragedModel with the device of the model, so that n_averaged lies there"
                )
            weight = launcher.weight(int(self.n_averaged))
        self._check_storage(copies)
        try:
            launcher.run(pairs, weight, self._others, casts=not in_lists)
        except RuntimeError:
            self._check_storage(pairs)  # the launch has, too, but knows no names
            raise
        for average, buffer in copies.items():
            average.copy_(buffer)
        self.n_averaged += 1
        if [*map(len, modules.tensors(model))] == [*map(len, modules.tensors(self.module))]:
            self._quick = launcher.offer(self, model, pairs, [*copies.items()])

    def _others(self, pairs: dict[Tensor, Tensor]) -> list[Tensor]:
        """The new values of averages that no kernel takes, from the function that torch would call."""
        known = weighted(self._function)
        alike = defaultdict(list)  # many of these are numbers, such as the counts of BatchNorms
        for p, q in pairs.items():
            joins = known and type(p) is type(q) is Tensor and not (p.is_floating_point() or p.is_complex())
            alike[(p.dtype, p.device, q.dtype, q.device) if joins else id(p)].append(p)
        new: dict[Tensor, Tensor] = {}
        for some in alike.values():
            if len(some) == 1:
                new[some[0]] = self._other(some[0], pairs[some[0]])
            else:
                flat = (torch.cat([*map(torch.flatten, tensors)]) for tensors in (some, [pairs[p] for p in some]))
                parts = torch.split(self._other(*flat), [*map(Tensor.numel, some)])
                new |= zip(some, map(Tensor.view_as, parts, some), strict=True)
        return [*map(new.__getitem__, pairs)]

    def _other(self, average: Tensor, current: Tensor) -> Tensor:
        average, current, n = average.detach(), current.detach().to(average.device), self.n_averaged.to(average.device)
        function = weighted(self._function) or self._function
        if self.multi_avg_fn is None:
            return function(average, current, n)  # type: ignore[no-any-return]
        average = average.clone()
        function([average], [current], n)
        return average


_update_outside_graphs = dynamo.never_traced(AveragedModel._update)


def _without_later(mine: list[Tensor], theirs: list[Tensor], average: Module, model: Module, kind: str) -> list[Tensor]:
    """The tensors of a model without those that it came to have after all that its average has, which torch ignores."""
    if len(theirs) <= len(mine):
        return theirs
    own, others = ([n for n, _ in getattr(m, f"named_{kind}s")(remove_duplicate=False)] for m in (average, model))
    at_the_same_place = len(own) == len(mine) and all(
        other == name or other.endswith(f".{name}")  # in a wrapper
        for name, other in zip(own, others, strict=False)
    )
    return theirs[: len(mine)] if at_the_same_place else theirs


def _match(mine: list[Tensor], theirs: list[Tensor], average: Module, model: Module, kind: str) -> dict[Tensor, Tensor]:
    """Pairs the tensors of an average with the model's at the same places. A tied tensor is paired once.

    Raises:
        ValueError: if two tensors of one model belong to one of the other; the message names those without counterpart.
    """
    pairs = dict(zip(mine, theirs, strict=False))
    if (
        len(mine) != len(theirs)
        or not all(map(is_, map(pairs.get, mine), theirs))
        or len(set(map(id, theirs))) < len(pairs)
    ):
        own, others = (dict(getattr(m, f"named_{kind}s")()) for m in (average, model))
        raise ValueError(
            f"the model must have the {kind}s of its average, tied alike, got {len(others)} for {len(own)}: it lacks "
            f"{sorted(own.keys() - others.keys())[:3]}, and its average {sorted(others.keys() - own.keys())[:3]}"
        )
    return pairs


def _named(average: Tensor, module: Module) -> str:
    """What the model's tensor is called in messages."""
    for kind, named in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
        for name, t in named:
            if t is average:
                return f"the {kind} {name!r}"
    return "a tensor"


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    padded = (*(1,) * (len(to) - len(shape)), *shape)
    return len(padded) == len(to) and all(a in (1, b) for a, b in zip(padded, to, strict=True))


def _kinds(tensors: Sequence[Tensor]) -> list[Any]:
    return [(t.shape, t.dtype) for t in tensors]
