"""A few steps of an optimizer beside torch's, and what must hold after them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import gradient

from compiled_optim import Optimizer, explain

both = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
SHAPES = [(3, 4), (5, 2), (1, 1)]  # matrices, which every algorithm takes


def parameters(copies: int = 1, dtype: torch.dtype = torch.float64) -> Any:
    """A list of parameters, or several lists of equal ones."""
    values = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    lists = [[torch.nn.Parameter(v.clone()) for v in values] for _ in range(copies)]
    return lists[0] if copies == 1 else lists


def set_gradients(*lists: list[Any], cls: type[torch.optim.Optimizer] = torch.optim.SGD) -> None:
    """The same new gradients for all lists, such as the class takes."""
    for row in zip(*lists, strict=True):
        grad = gradient(cls, row[0])
        for p in row:
            p.grad = grad.clone()


def train(steps: int, *runs: tuple[torch.optim.Optimizer, list[Any]]) -> None:
    """Steps all optimizers on the same gradients."""
    for _ in range(steps):
        set_gradients(*(params for _, params in runs), cls=type(runs[0][0]))
        for optimizer, _ in runs:
            optimizer.step()


def assert_equal(ours: list[Any], stock: list[Any], atol: float = 1e-12) -> None:
    torch.testing.assert_close([p.detach() for p in ours], [p.detach() for p in stock], rtol=0, atol=atol)


def executions(optimizer: Optimizer) -> dict[str, str]:
    """How the last step ran, each with its reason."""
    return {row.execution: row.reason for row in explain(optimizer)}
