"""What ``scalars`` needs that Python numbers, its operands on the host, and tensors, on a device, spell differently."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def maximum(a: Any, b: float) -> Any:
    """The greater of a number or a tensor and a number."""
    return a.clamp_min(b) if isinstance(a, Tensor) else max(a, b)


def where(condition: Any, a: Any, b: Any) -> Any:
    """``a`` where the condition, a bool or a tensor of bools, holds, else ``b``; both are evaluated."""
    if not isinstance(condition, Tensor):
        return a if condition else b
    # of two Python floats torch.where makes a float32, also in a float64 model
    a, b = (v if isinstance(v, Tensor) else torch.full_like(condition, v, dtype=torch.float64) for v in (a, b))
    return torch.where(condition, a, b)
