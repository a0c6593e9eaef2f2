"""A closure given to a step in a compiled function is compiled too, and training is as without ``torch.compile``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import CLASSES, oracle, tolerance
from lockstep import assert_same
from loops import Model, autograd_traced, batch, build, compile_alone, train
from torch import Tensor

from compiled_optim import LBFGS, SGD, Adagrad, SparseAdam, explain
from compiled_optim.testing import assert_compiles

DENSE = [cls for cls in CLASSES if cls.accepts_dense]
both = pytest.mark.parametrize("compiled", [False, True], ids=["traced", "compiled"])


@pytest.fixture(params=[False, True], ids=["two graphs", "one graph"])
def one_graph(request: Any) -> Iterator[bool]:
    with autograd_traced(request.param):
        yield request.param


def step_with_closure(model: Model, optimizer: Any, x: Tensor, y: Tensor) -> Any:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    return optimizer.step(closure)


@both
@pytest.mark.parametrize("cls", DENSE, ids=lambda cls: cls.__name__)
def test_a_closure_is_a_part_of_the_step(cls: Any, compiled: bool, one_graph: bool) -> None:
    model, optimizer = build(cls, dtype=torch.float64, options={"compiled": compiled})
    stock, reference = build(oracle(cls), dtype=torch.float64)
    step = compile_alone(step_with_closure, fullgraph=one_graph)
    for i in range(5):
        data = batch(i, dtype=torch.float64)
        with assert_compiles(graphs=0 if i else 1 if one_graph else 2):
            loss = step(model, optimizer, *data)
        assert_same(loss, step_with_closure(stock, reference, *data), tolerance(cls))
    for p, q in zip(model.trained, stock.trained, strict=True):
        assert_same(p, q, tolerance(cls))
