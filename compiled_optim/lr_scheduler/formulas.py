"""What formulas are written with: functions of a number, of a tensor of steps, and of a sympy expression alike."""

from __future__ import annotations

import dataclasses
import functools
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from compiled_optim._engine.values import where


def is_symbolic(x: Any) -> bool:
    """Whether ``x`` is a sympy expression; sympy is not imported to find out."""
    return hasattr(x, "free_symbols")


def library(x: Any) -> Any:
    """The library that computes with ``x``; functions that two of them have go by the same name in all."""
    if isinstance(x, Tensor):
        return torch
    if is_symbolic(x):
        import sympy  # type: ignore[import-untyped]

        return sympy
    return math


def annealed(x: Any) -> Any:
    """Half a wave of cosine, from 1 at ``x = 0`` to 0 at ``x = 1``."""
    known = library(x)
    return (1 + known.cos(known.pi * x)) / 2


def ramp(x: Any, kind: str, power: float = 1.0) -> Any:
    """A way from 0 at ``x = 0`` to 1 at ``x = 1``, of one of `RAMPS`; ``power``: of "polynomial".

    ``1 - x`` in the place of ``x`` makes a decay of it.
    """
    if kind == "cosine":
        return 1 - annealed(x)
    if kind == "1-sqrt":
        return 1 - library(x).sqrt(1 - x)
    return x if kind == "linear" else x**power


RAMPS = ("linear", "cosine", "polynomial", "1-sqrt")


def minimum(a: Any, b: Any) -> Any:
    """The lesser of ``a``, which is of the kind of the step, and ``b``."""
    if isinstance(a, Tensor):
        return a.clamp(max=b)
    return library(a).Min(a, b) if is_symbolic(a) else min(a, b)


def piecewise(t: Any, ends: Sequence[Any], piece: Callable[[int], Any]) -> Any:
    """``piece(i)`` of the first ``i`` with ``t < ends[i]``, or ``piece(len(ends))``.

    For a number, no other piece is computed. The ends are sorted.
    """
    if is_symbolic(t):
        spans = [(piece(i), t < end) for i, end in enumerate(ends)]
        return library(t).Piecewise(*spans, (piece(len(ends)), True))
    if not isinstance(t, Tensor):
        return piece(bisect_right(ends, t))
    value = piece(len(ends))
    for i in reversed(range(len(ends))):
        value = where(t < ends[i], piece(i), value)
    return value


class Factor(functools.partial[Any]):
    """A function of the step in closed form, with all its other arguments given."""


@dataclasses.dataclass
class Form:
    """A closed form: a function of the step, and the values of its other arguments."""

    formula: Callable[..., Any]
    values: dict[str, Any]

    def __call__(self, t: Any) -> Any:
        return self.formula(t, **{name: _beside(t, value) for name, value in self.values.items()})


def _beside(t: Any, value: Any) -> Any:
    """A value that can be computed with beside the step."""
    if isinstance(value, list):
        return [_beside(t, part) for part in value]
    if value is None or isinstance(value, str) or callable(value):
        return value
    if isinstance(t, Tensor):
        return value.detach().reshape(()).to(t.device) if isinstance(value, Tensor) else value
    # a float, not an integer: powers of those may have more digits than there is time and memory for
    value = float(value)
    if not is_symbolic(t):
        return value
    return library(t).Integer(int(value)) if value.is_integer() else library(t).sympify(value)


def evaluate(form: Form, step: Any) -> Any:
    """The value at a step: a float for a number; for a tensor of steps, a new tensor of its dtype and shape.

    A tensor's value is computed in float64 whatever the dtype of the steps, for float32 does not hold 0.9999 well
    enough to be raised to the power of 10,000; in float32 on devices that lack float64.
    """
    if not isinstance(step, Tensor):
        return float(form(float(step)))
    wide = step.to(torch.float32 if step.device.type == "mps" else torch.float64)
    result = form(wide) + torch.zeros_like(wide)  # a constant, too, gets the shape
    return result.to(step.dtype if step.is_floating_point() else torch.get_default_dtype())
