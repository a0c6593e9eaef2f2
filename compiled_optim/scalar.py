"""What Python numbers, the operands of ``scalars`` on the host, and tensors, on a device, spell differently."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiled_optim.tensor_list import TensorList


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
