"""Rounding errors of ours beside those of torch, both from float64."""

from __future__ import annotations

from typing import Any

import torch
from beside_torch import parameter, state_of
from cases import fitted, gradient, oracle
from torch import Tensor


def trajectory(
    cls: Any, build: Any, initial: list[Tensor], gradients: list[list[Tensor]], dtype: torch.dtype
) -> list[Tensor]:
    """Parameters and state after steps in ``dtype``, in float64 and each as one vector."""
    params = [parameter(t.to(dtype)) for t in initial]
    optimizer = build(params)
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = g.to(dtype)
        optimizer.step()
    state = [state_of(optimizer, p) for p in params]
    held = [[s[name] for s in state if name in s] for name in cls.rule.declaration.buffers]
    columns = [params, *filter(None, held)]
    return [torch.cat([t.detach().double().flatten() for t in column]) for column in columns]


def rms(t: Tensor) -> float:
    return t.square().mean().sqrt().item()


def assert_no_less_exact(
    cls: Any, options: dict[str, Any], dtype: torch.dtype, device: torch.device | str = "cpu", **execution: Any
) -> None:
    """Compares with torch's loop over tensors and its fused kernel, whichever is better.

    Args:
        options: of both; execution: of ours alone, such as ``compiled``.
    """
    initial = [fitted(cls, torch.randn(shape)).to(device, dtype) for shape in [(4000,), (63, 65), (1,), ()]]
    gradients = [[gradient(cls, p) for p in initial] for _ in range(10)]
    names = cls.rule.declaration.options
    loop = {"foreach": False} if "foreach" in names else {}  # torch's lists, its choice on GPUs, have other formulas
    hows = [loop, *([{"fused": True}] if "fused" in names else [])]
    torch.set_default_dtype(torch.float64)  # of it is what torch carries from step to step
    truth = trajectory(cls, lambda params: oracle(cls)(params, **options), initial, gradients, torch.float64)
    torch.set_default_dtype(torch.float32)
    theirs = [
        trajectory(cls, lambda params, how=how: oracle(cls)(params, **options, **how), initial, gradients, dtype)
        for how in hows
    ]
    ours = trajectory(cls, lambda params: cls(params, **options, **execution), initial, gradients, dtype)
    for expected, actual, *references in zip(truth, ours, *theirs, strict=True):
        assert actual.isfinite().all()
        # in float16 SparseAdam of torch divides by an eps that is zero there, and its fused SGD makes values infinite
        kept = references[0].isfinite()
        error = min(rms((reference - expected)[kept]) for reference in references)
        # the floor: what rounding the truth itself once would cost
        floor = rms(expected.to(dtype).double() - expected)
        assert rms((actual - expected)[kept]) <= 1.5 * max(error, floor)
        assert kept.double().mean() > 0.9
