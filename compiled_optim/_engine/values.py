"""The values that a rule computes with: lists of tensors as one, and what numbers and tensors spell differently."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class TensorList:
    """A list of tensors that reads as one value: each operator is one ``torch._foreach_*`` call.

    Tensors of one dtype and one device under elementwise arithmetic.

    Operands are another `TensorList` of the same length, a Python number, or a 0-d tensor; a 0-d tensor stands on the
    right, or Python asks the list first (`__torch_function__`).
    """

    __slots__ = ("tensors",)

    def __init__(self, tensors: list[Tensor] | tuple[Tensor, ...]) -> None:
        self.tensors = tensors

    @property
    def dtype(self) -> torch.dtype:
        return self.tensors[0].dtype

    def to(self, dtype: torch.dtype) -> TensorList:
        return self if dtype == self.dtype else TensorList([t.to(dtype) for t in self.tensors])

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"an elementwise update cannot use .{name} of a value; "
            "if it needs whole tensors, declare `elementwise = False` in its class"
        )

    def _with(self, operation: Callable[..., Any], other: Any) -> TensorList:
        if isinstance(other, TensorList):
            other = other.tensors
        elif isinstance(other, Tensor):
            # the overload for one 0-d tensor cannot be traced on fake tensors in torch 2.13
            other = [other] * len(self.tensors)
        return TensorList(operation(self.tensors, other))

    def __add__(self, other: Any) -> TensorList:
        return self._with(torch._foreach_add, other)

    def __sub__(self, other: Any) -> TensorList:
        return self._with(torch._foreach_sub, other)

    def __mul__(self, other: Any) -> TensorList:
        return self._with(torch._foreach_mul, other)

    def __truediv__(self, other: Any) -> TensorList:
        return self._with(torch._foreach_div, other)

    def __pow__(self, other: Any) -> TensorList:
        return self._with(torch._foreach_pow, other)

    def __neg__(self) -> TensorList:
        return TensorList(torch._foreach_neg(self.tensors))

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: Any) -> TensorList:
        return (-self)._with(torch._foreach_add, other)

    def __rtruediv__(self, other: Any) -> TensorList:
        return TensorList(torch._foreach_reciprocal(self.tensors))._with(torch._foreach_mul, other)

    def maximum(self, other: Any) -> TensorList:
        return self._with(torch._foreach_maximum, other)

    def minimum(self, other: Any) -> TensorList:
        return self._with(torch._foreach_minimum, other)

    def clamp_min(self, least: float) -> TensorList:
        return self._with(torch._foreach_clamp_min, least)

    def addcmul(self, a: TensorList, b: TensorList, *, value: float) -> TensorList:
        return TensorList(torch._foreach_addcmul(self.tensors, a.tensors, b.tensors, value))

    def lerp(self, end: TensorList, weight: float) -> TensorList:
        return TensorList(torch._foreach_lerp(self.tensors, end.tensors, weight))

    def sqrt(self) -> TensorList:
        return TensorList(torch._foreach_sqrt(self.tensors))

    def abs(self) -> TensorList:
        return TensorList(torch._foreach_abs(self.tensors))

    def sign(self) -> TensorList:
        return TensorList(torch._foreach_sign(self.tensors))

    # what has no foreach operation, one tensor at a time

    def __gt__(self, other: float) -> TensorList:
        return TensorList([t > other for t in self.tensors])

    def __lt__(self, other: float) -> TensorList:
        return TensorList([t < other for t in self.tensors])

    def __eq__(self, other: Any) -> TensorList:  # type: ignore[override]
        return TensorList([t.eq(other) for t in self.tensors])

    def __ne__(self, other: Any) -> TensorList:  # type: ignore[override]
        return TensorList([t.ne(other) for t in self.tensors])

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise TypeError("an update cannot branch on a value: use `where`, or a number that is declared as a switch")

    def where(self, condition: TensorList, other: TensorList) -> TensorList:
        parts = zip(self.tensors, condition.tensors, other.tensors, strict=True)
        return TensorList([a.where(c, b) for a, c, b in parts])

    def masked_fill(self, condition: TensorList, value: float) -> TensorList:
        parts = zip(self.tensors, condition.tensors, strict=True)
        return TensorList([t.masked_fill(c, value) for t, c in parts])

    def copy_(self, source: TensorList) -> None:
        torch._foreach_copy_(self.tensors, source.tensors)


def maximum(a: Any, b: float) -> Any:
    """The greater of a number or a tensor and a number."""
    return a.clamp_min(b) if isinstance(a, Tensor) else max(a, b)


def where(condition: Any, a: Any, b: Any) -> Any:
    """``a`` where the condition, a bool or tensors of bools, holds, else ``b``; both are evaluated."""
    if isinstance(a, TensorList) and isinstance(condition, Tensor):
        condition = TensorList([condition] * len(a.tensors))
    if isinstance(condition, TensorList):
        return a.where(condition, b)
    if not isinstance(condition, Tensor):
        return a if condition else b
    # of two Python floats torch.where makes a float32, also in a float64 model
    a, b = (v if isinstance(v, Tensor) else torch.full_like(condition, v, dtype=torch.float64) for v in (a, b))
    return torch.where(condition, a, b)


def lerp(start: Any, end: Any, weight: Any) -> Any:
    """``start + weight * (end - start)``, exact at weights of 0 and 1, for ``weight`` a number, or tensors of one."""
    if not isinstance(weight, Tensor | TensorList):
        return start.lerp(end, weight)
    # as torch.lerp, whose decomposition takes no symbolic length
    near = weight < 0.5
    return where(near, start, end) + (end - start) * where(near, weight, weight - 1)


def add_square(start: Any, x: Any, weight: Any) -> Any:
    """``start + weight * x * x``, which overflows where the product does and not where ``x * x`` would."""
    if isinstance(weight, Tensor | TensorList):
        return start + x * weight * x
    return start.addcmul(x, x, value=weight)
