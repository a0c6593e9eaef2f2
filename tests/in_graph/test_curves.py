"""A compiled loop trains as the uncompiled one of torch.optim does, with as few graphs as there can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CLASSES
from loops import autograd_traced, batch, build, compile_alone, train

from compiled_optim import ASGD, SGD, AdamW, SparseAdam, lr_scheduler
from compiled_optim.testing import assert_compiles

STEPS = 50


def curves(cls: Any, options: dict[str, Any], step: Any, steps: int = STEPS) -> tuple[list[float], list[float]]:
    """The losses of a compiled loop, and of an uncompiled one with torch's optimizer and schedule."""
    stock_class = getattr(torch.optim, cls.__name__)
    model, optimizer = build(cls, options=options)
    stock, reference = build(stock_class)
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
    stock_schedule = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=60)
    sparse = not cls.accepts_dense
    ours, theirs = [], []
    for i in range(steps):
        ours.append(step(model, optimizer, schedule, *batch(i, sparse)).item())
        theirs.append(train(stock, reference, stock_schedule, *batch(i, sparse)).item())
    return ours, theirs


def assert_curves_agree(ours: list[float], theirs: list[float]) -> None:
    # rounding of float32 in the losses, and what it grows to over 50 steps
    assert ours == pytest.approx(theirs, rel=2e-5)
    assert sum(ours[-7:]) < sum(ours[:7])  # of the same batches


@pytest.mark.parametrize(
    ("cls", "compiled"),
    [*((c, False) for c in CLASSES), (AdamW, True), (SGD, True), (ASGD, True), (SparseAdam, True)],
    ids=lambda v: getattr(v, "__name__", "compiled" if v else "traced"),
)
def test_two_graphs(cls: Any, compiled: bool) -> None:
    step = compile_alone(train)
    with assert_compiles(graphs=2):
        assert_curves_agree(*curves(cls, {"compiled": compiled}, step))


@pytest.mark.parametrize(
    ("cls", "compiled"),
    [(AdamW, False), (AdamW, True), (SGD, False), (SGD, True), (ASGD, False)],
    ids=lambda v: getattr(v, "__name__", "compiled" if v else "traced"),
)
def test_one_graph_where_autograd_is_traced(cls: Any, compiled: bool) -> None:
    with autograd_traced():
        step = compile_alone(train, fullgraph=True)
        with assert_compiles(graphs=1):
            assert_curves_agree(*curves(cls, {"compiled": compiled}, step))


@pytest.mark.parametrize(
    "cls",
    # each takes Inductor seconds
    [c if c in (AdamW, SGD, SparseAdam) else pytest.param(c, marks=pytest.mark.slow) for c in CLASSES],
    ids=lambda cls: cls.__name__,
)
def test_by_inductor(cls: Any) -> None:
    step = compile_alone(train, backend="inductor")
    with assert_compiles(graphs=2, kernels=0):
        assert_curves_agree(*curves(cls, {}, step))
