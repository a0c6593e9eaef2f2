"""What a step decides from all its gradients before an update: their norm, their factor, and whether it is skipped."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from compiled_optim._engine.executions.checks import place
from compiled_optim._engine.executions.memory import ShortStorageError
from compiled_optim._engine.executions.norms import total_norm, widest
from compiled_optim._engine.executions.scaling import Scaling
from compiled_optim._engine.executions.state import counted_on_device
from compiled_optim._engine.executions.work import Work
from compiled_optim._engine.kernels.backends import is_capturing
from compiled_optim._engine.one_pass import OnePass


def begin(work: Work, one_pass: OnePass, scaling: Scaling | None, *, skips: bool, compiled: bool) -> bool:
    """Puts the numbers of this step into ``work``; False if the step is skipped. Gradients are only read.

    What lies on a device stays there, unless the host has to decide or parameters in its own memory need it.

    Args:
        scaling: of a GradScaler. Its scale becomes a part of the factor.
        skips: whether the launches can skip the step by a number on the device.
        compiled: whether the norm is computed by native code.

    Raises:
        RuntimeError: for a norm that is not finite, if that is to be an error, for a decay that depends on steps which
            the host does not count, and for a gradient whose storage is too short.
        What else `total_norm` raises.
    """
    if callable(one_pass.ema_decay) and any(map(counted_on_device, work.groups)):
        raise RuntimeError(
            f"ema_decay must be a number where step counts lie on the device, got the function {one_pass.ema_decay!r}: "
            "the host does not know the step"
        )
    scale, found_inf = scaling or (None, None)
    norm = None
    if one_pass.needs_norm:
        try:
            norm = total_norm(_params(work), one_pass.norm_type, compiled=compiled, of_gradients=True)
        except ShortStorageError as error:
            raise RuntimeError(_short(work, error)) from error
    host_decides = one_pass.error_if_nonfinite or (not skips and (one_pass.skip_nonfinite or found_inf is not None))
    there = [t for t in (norm, scale, found_inf) if isinstance(t, Tensor) and not t.is_cpu]
    if not there or host_decides or any(p.grad is not None and p.grad.is_cpu for p in _params(work)):
        return _decide(work, one_pass, norm, scale, found_inf)
    _decide_on_device(work, one_pass, there[0].device, norm, scale, found_inf)
    return True


def _params(work: Work) -> list[Tensor]:
    return [*chain.from_iterable(group["params"] for group in work.groups)]


def _short(work: Work, error: ShortStorageError) -> str:
    for p in _params(work):
        if p.grad is error.tensor:
            return f"{work.rule.name}: the gradient of the parameter {place(work, p)} {error}"
    return str(error)


def _decide(
    work: Work, one_pass: OnePass, norm: float | Tensor | None, scale: Tensor | None, found_inf: Tensor | None
) -> bool:
    by = 1.0 if scale is None else scale.item()
    number = 0.0
    if norm is not None:
        number = one_pass.norm = float(norm) / by
        if one_pass.error_if_nonfinite and not math.isfinite(number):
            raise RuntimeError(
                f"the total norm of order {one_pass.norm_type} of the gradients is not finite, so it cannot be "
                "clipped: with error_if_nonfinite=False it is, and with skip_nonfinite=True such a step is left out"
            )
    overflow = one_pass.skip_nonfinite and not math.isfinite(number)
    if overflow or (found_inf is not None and found_inf.item()):
        one_pass.skipped += 1
        return False
    work.given = one_pass.given(one_pass.factor(number, by))
    return True


def _decide_on_device(
    work: Work,
    one_pass: OnePass,
    device: torch.device,
    norm: float | Tensor | None,
    scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """The same in tensors: the host does not learn whether the step is skipped."""

    wide = widest(device)

    def number(value: Any, dtype: torch.dtype = wide) -> Tensor:
        return torch.as_tensor(value).reshape(()).to(device, dtype, non_blocking=True)

    by: Any = 1.0 if scale is None else number(scale)
    total = None
    if norm is not None:
        total = number(norm) if scale is None else number(norm) / by
        if isinstance(one_pass.norm, Tensor) and one_pass.norm.device == device:
            one_pass.norm.copy_(total)  # where replays of a graph write theirs
        else:
            one_pass.norm = total
    skip = None if found_inf is None else number(found_inf, torch.float32)
    if one_pass.skip_nonfinite and total is not None:
        overflow = number((total - total).ne(0), torch.float32)  # isfinite takes more launches
        skip = overflow if skip is None else torch.maximum(skip, overflow)
    if skip is not None:
        if not isinstance(one_pass.skipped, Tensor):
            one_pass.skipped = _counter(one_pass.skipped, device)
        # in place, so that each replay of a graph counts
        one_pass.skipped += skip.ne(0).to(one_pass.skipped.device, non_blocking=True)
        work.scaling = Scaling(None, skip)
    work.given = one_pass.given(one_pass.factor(total, by))


def _counter(value: int, device: torch.device) -> Tensor:
    if is_capturing(device):
        raise RuntimeError(
            "a CUDA graph cannot capture the first step that may be skipped: each replay would begin to count anew. "
            "Take a step before the capture"
        )
    return torch.full((), value, dtype=torch.int64, device=device)
