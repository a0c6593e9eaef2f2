"""Gradients of every magnitude and sign, with decay rates at the ends of their ranges: nowhere worse than torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import NARROW, accepted, fitted, named, numbers_of, oracle, taken
from torch import Tensor

import compiled_optim
from compiled_optim import swa_utils

MAGNITUDES = [0.0, 1e-45, 1e-40, 1e-30, 1e-20, 1e-12, 1e-6, 1e-3, 1.0, 1e4, 1e12, 1.8e19, 3e19, 5e20, 1e25, 1e38]
FACTORS = [(1.0, 1.0, 1.0), (1.0, -0.5, 0.25), (1.0, 0.0, 1e-3)]  # of the gradients of three steps
DECAYS = ("betas", "alpha", "rho")


def decays(cls: Any, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The defaults, and each decay rate at 0, in the middle and next to 1."""
    yield options
    for name in DECAYS:
        field = numbers_of(cls).get(name)
        if field is None or field.low != 0:  # ASGD's alpha is an exponent
            continue
        parts = len(field.default) if isinstance(field.default, tuple) else 1
        for value in (0.0, 0.3, 0.9999):
            varied = {**options, name: (value,) * parts if parts > 1 else value}
            if accepted(cls, varied):
                yield varied


def steps(build: Any, g: Tensor, factors: tuple[float, ...], cls: Any) -> list[Tensor]:
    """Parameter and state after each step, one after the other."""
    p = torch.nn.Parameter(fitted(cls, torch.linspace(-1, 1, len(g)).bfloat16().to(g.dtype)))
    optimizer, seen = build([p]), []
    for factor in factors:
        p.grad = taken(cls, fitted(cls, g * factor))
        optimizer.step()
        state = [v for k, v in optimizer.state.get(p, {}).items() if k in cls.rule.declaration.buffers]
        seen += [t.detach().double().clone() for t in (p, *state)]
    return seen


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cls", "options"), NARROW, ids=[f"{c.__name__}-{named(o)}" for c, o in NARROW])
def test_no_worse_than_torch(cls: Any, options: dict[str, Any], dtype: torch.dtype, compiled: bool) -> None:
    g = torch.tensor([s * m for m in MAGNITUDES for s in (1, -1)], dtype=torch.float64).to(dtype)
    eps = torch.finfo(dtype).eps
    with_fused = [{"fused": True}] if "fused" in cls.rule.declaration.options else []
    for varied in decays(cls, options):
        for factors in FACTORS:
            torch.set_default_dtype(torch.float64)  # of it is what torch carries from step to step
            truth = steps(lambda ps, o=varied: oracle(cls)(ps, **o), g.double(), factors, cls)
            torch.set_default_dtype(torch.float32)
            theirs = [
                steps(lambda ps, o=varied, how=how: oracle(cls)(ps, **o, **how), g, factors, cls)
                for how in ({}, *with_fused)
            ]
            ours = steps(lambda ps, o=varied: cls(ps, **o, compiled=compiled), g, factors, cls)
            for i, (actual, expected) in enumerate(zip(ours, truth, strict=True)):
                errors = [(run[i] - expected).abs().nan_to_num(math.inf, math.inf) for run in theirs]
                worst = torch.stack(errors).amax(0)
                floor = 32 * eps * expected.abs() + 4 * torch.finfo(dtype).tiny * eps
                within = (actual - expected).abs().nan_to_num(math.inf, math.inf) <= torch.maximum(2 * worst, floor)
                assert within.all(), (
                    f"{varied}, gradients times {factors}: {g[~within.reshape(g.shape)]}, {actual[~within]}"
                )


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_average_without_decay_is_a_copy(compiled: bool) -> None:
    model = torch.nn.Linear(9, 9)
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.0), compiled=compiled)
    for scale in (1e8, 1.0):
        with torch.no_grad():
            model.weight.fill_(scale)
        average.update_parameters(model)
    assert torch.equal(average.module.weight, model.weight)


HEALING = [(cls, options) for cls, options in NARROW if cls.accepts_dense]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize(("cls", "options"), HEALING, ids=[f"{c.__name__}-{named(o)}" for c, o in HEALING])
def test_what_heals_in_torch_heals(cls: Any, options: dict[str, Any], bad: float, compiled: bool) -> None:
    """One bad gradient, and the parameters restored: state that is finite again in torch is so here."""
    for varied in decays(cls, options):
        finite = []
        for build, how in ((oracle(cls), {}), (cls, {"compiled": compiled})):
            p = torch.nn.Parameter(fitted(cls, torch.ones(5)))
            optimizer = build([p], **varied, **how)
            for g in (bad, 1.0, 1.0, 1.0):
                p.grad = torch.full_like(p, g)
                optimizer.step()
                if not math.isfinite(g):
                    p.data.fill_(1.0)
            state = {"param": p, **{k: v for k, v in optimizer.state[p].items() if k in cls.rule.declaration.buffers}}
            finite.append({k: bool(v.isfinite().all()) for k, v in state.items()})
        assert all(ours or not theirs for theirs, ours in zip(finite[0].values(), finite[1].values(), strict=True))


def test_a_variance_rounded_below_zero_is_zero() -> None:
    """RMSprop, centered: torch takes the root of it, and the parameter is NaN."""
    for compiled in (False, True):
        p = torch.nn.Parameter(torch.ones(1000))
        optimizer = compiled_optim.RMSprop([p], centered=True, alpha=0.5, compiled=compiled)
        g = torch.linspace(1, 2, 1000)
        for _ in range(40):
            p.grad = g.clone()
            optimizer.step()
        assert p.isfinite().all()
