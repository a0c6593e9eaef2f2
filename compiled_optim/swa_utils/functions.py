"""The averages of torch.optim.swa_utils: torch's functions, and the weight that a kernel uses instead of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.optim import swa_utils

AvgFn = Callable[[Tensor, Tensor, Any], Tensor]
MultiAvgFn = Callable[[Any, Any, Any], None]
Decay = float | Tensor | Callable[[int], float]

_torch: Any = swa_utils  # whose functions are not annotated
_FLOAT8 = [d for d in vars(torch).values() if isinstance(d, torch.dtype) and d.itemsize == 1 and d.is_floating_point]


class Weighted:
    """What `get_ema_avg_fn` and the like return: ``average + weight(n) * (model - average)`` after ``n`` models.

    Args:
        in_lists: whether it is a ``multi_avg_fn``, which updates lists of tensors in place.
    """

    # torch's functions raise for these dtypes. They are averaged in a wider one.
    _wider: dict[torch.dtype, torch.dtype] = dict.fromkeys(_FLOAT8, torch.float32)

    def __init__(self, in_lists: bool) -> None:
        self.in_lists = in_lists

    def weight(self, n: Any) -> Any:
        """The weight of the model after ``n`` others; ``n`` may be a tensor on a device."""
        raise NotImplementedError

    @property
    def waits(self) -> bool:
        """Whether the user's function computes the weight: it needs the count as a number, and may raise."""
        return False

    def exceeds_torch(self, tensors: Iterable[Tensor]) -> bool:
        """Whether torch's functions raise for one of these tensors."""
        return any(t.dtype in self._wider for t in tensors)

    def _stock(self, n: Any) -> tuple[AvgFn, MultiAvgFn]:
        """torch's functions of one tensor, and of lists."""
        raise NotImplementedError

    def __call__(self, averaged: Any, model: Any, n: Any) -> Any:
        one, lists = self._stock(n)

        def average(p: Tensor, q: Tensor) -> Tensor:
            wide = self._wider.get(p.dtype)
            return one(p, q, n) if wide is None else one(p.to(wide), q.to(wide), n).to(p.dtype)

        if not self.in_lists:
            return average(averaged, model)
        first = averaged[0]
        if (first.is_floating_point() or first.is_complex()) and first.dtype not in Equal._wider:
            lists(averaged, model, n)
        else:
            for p, q in zip(averaged, model, strict=True):
                p.copy_(average(p, q))
        return None


class Equal(Weighted):
    """Every model has the same weight."""

    _wider = Weighted._wider | {
        torch.bool: torch.float32,
        torch.complex32: torch.complex64,
        **dict.fromkeys((torch.uint16, torch.uint32, torch.uint64), torch.float64),
    }

    def weight(self, n: Any) -> Any:
        return 1 / (n + 1)

    def _stock(self, n: Any) -> tuple[AvgFn, MultiAvgFn]:
        return _torch.get_swa_avg_fn(), _torch.get_swa_multi_avg_fn()


class Exponential(Weighted):
    """The average decays.

    Attributes:
        decay: a number in [0, 1], a tensor of one element, or a function of the number of models so far that returns
            one. It can be assigned at any time.
    """

    def __init__(self, decay: Decay, in_lists: bool) -> None:
        super().__init__(in_lists)
        self.decay = decay
        if not callable(decay):
            self.weight(0)

    @property
    def waits(self) -> bool:
        return callable(self.decay)

    def _decay(self, n: Any) -> Any:
        decay: Any = self.decay(int(n)) if callable(self.decay) else self.decay
        if isinstance(decay, Tensor):
            if not decay.is_cpu:  # the host would have to wait for it
                return decay
            decay = decay.item()
        if not 0 <= decay <= 1:
            after = f" after {int(n)} models" if callable(self.decay) else ""
            raise ValueError(f"decay must be at least 0 and at most 1, got {decay!r}{after}")
        return decay

    def weight(self, n: Any) -> Any:
        return 1 - self._decay(n)

    def _stock(self, n: Any) -> tuple[AvgFn, MultiAvgFn]:
        decay = self._decay(n)
        return _torch.get_ema_avg_fn(decay), _torch.get_ema_multi_avg_fn(decay)


def get_ema_avg_fn(decay: Decay = 0.999) -> Exponential:
    """``decay * average + (1 - decay) * model``, of one tensor.

    Args:
        decay: a number in [0, 1], a 0-d tensor, or a function that returns one for the number of models so far,
            from 1 on, and may be called twice for one update. A new value needs no new kernel: fill the tensor, or
            assign to ``.decay`` of what this returns.

    Raises:
        ValueError: if the decay is not in [0, 1]; in an update, if a function returns such a one.
    """
    return Exponential(decay, in_lists=False)


def get_ema_multi_avg_fn(decay: Decay = 0.999) -> Exponential:
    """`get_ema_avg_fn` for lists of tensors, in place."""
    return Exponential(decay, in_lists=True)


def get_swa_avg_fn() -> AvgFn:
    """The equal average: ``average + (model - average) / (averaged + 1)``. Also of dtypes for which torch's raises."""
    return Equal(in_lists=False)


def get_swa_multi_avg_fn() -> MultiAvgFn:
    """`get_swa_avg_fn` for lists of tensors, in place."""
    return Equal(in_lists=True)


EQUAL = Equal(in_lists=False)


def _code(function: Any) -> CodeType | None:
    """Of what torch decorates with `torch.no_grad`."""
    return getattr(getattr(function, "__wrapped__", None), "__code__", None)


_EQUALS = {_code(_torch.get_swa_avg_fn()): False, _code(_torch.get_swa_multi_avg_fn()): True}
_EXPONENTIALS = {_code(_torch.get_ema_avg_fn()): False, _code(_torch.get_ema_multi_avg_fn()): True}


def weighted(function: Any) -> Weighted | None:
    """The function itself if it is one of these, what does the same if torch made it, None for any other."""
    if isinstance(function, Weighted):
        return function
    code = _code(function)
    if code is None:
        return None
    if code in _EQUALS:
        return Equal(_EQUALS[code])
    if code in _EXPONENTIALS and code.co_freevars == ("decay",):
        (cell,) = function.__wrapped__.__closure__
        return Exponential(lambda n: cell.cell_contents, _EXPONENTIALS[code])
    return None
