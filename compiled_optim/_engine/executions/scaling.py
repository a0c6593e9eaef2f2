"""What a GradScaler hands to an optimizer: the scale of its gradients, and whether one of them overflowed."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor


class Scaling(NamedTuple):
    """``grad_scale``: gradients are this many times too large. ``found_inf``: not zero if the step is to be skipped."""

    grad_scale: Tensor | None
    found_inf: Tensor | None


def unscale(groups: list[dict[str, Any]], scaling: Scaling) -> bool:
    """Divides the gradients by their scale, as torch's fused optimizers do; False if the step must be skipped.

    The host waits for the device of ``found_inf``.
    """
    if scaling.found_inf is not None and scaling.found_inf.item():
        return False
    if scaling.grad_scale is not None:
        for group in groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.div_(scaling.grad_scale.to(p.device))
    return True
