"""What a step decides from all its gradients before an update: their norm, their factor, and whether it is skipped."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compiled_optim._engine.executions.norms import total_norm
from compiled_optim._engine.executions.scaling import Scaling
from compiled_optim._engine.executions.state import counted_on_device
from compiled_optim._engine.executions.work import Work
from compiled_optim._engine.one_pass import OnePass


def begin(work: Work, one_pass: OnePass, scaling: Scaling | None, *, waits: bool, compiled: bool) -> bool:
    """Puts the numbers of this step into ``work``; False if the step is skipped. Gradients are only read.

    Args:
        scaling: of a GradScaler. Its scale becomes a part of the factor.
        waits: whether the host may wait for a device. If not, the launches find the numbers there.
        compiled: whether the norm is computed by native code.

    Raises:
        RuntimeError: for a norm that is not finite, if that is to be an error.
    """
    scale, found_inf = scaling or (None, None)
    norm = None
    if one_pass.needs_norm:
        grads = [p.grad for group in work.groups for p in group["params"] if p.grad is not None]
        norm = total_norm(grads, one_pass.norm_type, compiled=compiled)
    if waits:
        return _decide(work, one_pass, norm, scale, found_inf)
    if callable(one_pass.ema_decay) and any(map(counted_on_device, work.groups)):
        raise RuntimeError(
            f"ema_decay must be a number where step counts lie on the device, got the function {one_pass.ema_decay!r}: "
            "the host does not know the step"
        )
    _decide_on_device(work, one_pass, norm, scale, found_inf)
    return True


def _decide(
    work: Work, one_pass: OnePass, norm: float | Tensor | None, scale: Tensor | None, found_inf: Tensor | None
) -> bool:
    by = 1.0 if scale is None else scale.item()
    number = 0.0
    if norm is not None:
        number = one_pass.norm = float(norm) / by
        if one_pass.error_if_nonfinite and not math.isfinite(number):
            raise RuntimeError(_nonfinite(one_pass.norm_type))
    overflow = one_pass.skip_nonfinite and not math.isfinite(number)
    if overflow or (found_inf is not None and found_inf.item()):
        one_pass.skipped = one_pass.skipped + 1
        return False
    work.given = one_pass.given(one_pass.factor(number, by))
    return True


def _decide_on_device(
    work: Work, one_pass: OnePass, norm: float | Tensor | None, scale: Tensor | None, found_inf: Tensor | None
) -> None:
    by: Any = 1.0 if scale is None else scale
    total = torch.as_tensor(0.0 if norm is None else norm) / by
    if norm is not None:
        one_pass.norm = total
        if one_pass.error_if_nonfinite and not total.isfinite():
            raise RuntimeError(_nonfinite(one_pass.norm_type))
    if one_pass.skip_nonfinite:
        overflow = total.isfinite().logical_not().float()
        found_inf = overflow if found_inf is None else torch.maximum(found_inf, overflow)
    if found_inf is not None:
        one_pass.skipped = one_pass.skipped + found_inf.ne(0)
    work.given = one_pass.given(one_pass.factor(total, by))
    work.scaling = Scaling(None, found_inf)


def _nonfinite(norm_type: float) -> str:
    return (
        f"the total norm of order {norm_type} of the gradients is not finite, so it cannot be clipped: with "
        "error_if_nonfinite=False it is, and with skip_nonfinite=True such a step is left out"
    )
