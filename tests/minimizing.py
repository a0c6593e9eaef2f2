"""Losses to minimize with a closure, and an optimizer at work on one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from beside_torch import assert_equal, parameter
from torch import Tensor

from compiled_optim import LBFGS

Loss = Callable[..., Tensor]


def rosenbrock(x: Tensor) -> Tensor:
    """Its minimum is at 1, at the end of a bent valley."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def least_squares(x: Tensor) -> Tensor:
    rows, columns = torch.arange(1.0, 31, dtype=x.dtype), torch.arange(1.0, 13, dtype=x.dtype)
    return ((torch.sin(rows.outer(columns)) @ x - torch.cos(rows)) ** 2).mean()


def network(w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
    x = torch.sin(torch.arange(160.0, dtype=w.dtype)).view(32, 5)
    return ((torch.tanh(x @ w.t() + b) @ v.t() + c - x[:, :2] * x[:, 2:4]) ** 2).mean()


def waves(x: Tensor) -> Tensor:
    """Concave in places, so that some pairs of L-BFGS are rejected."""
    return torch.cos(3 * x).sum() + 0.1 * (x**2).sum()


# shapes of the parameters, and a step length that needs no line search
PROBLEMS: dict[Loss, tuple[list[tuple[int, ...]], float]] = {
    rosenbrock: ([(10,)], 1e-3),
    least_squares: ([(12,)], 0.5),
    network: ([(8, 5), (8,), (2, 8), (2,)], 0.3),
    waves: ([(9,)], 0.05),
}


def initial(loss: Loss, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.sin(1.3 * torch.arange(1.0, 1 + torch.Size(s).numel())).view(s).to(dtype) for s in PROBLEMS[loss][0]]


class Run:
    """An optimizer, made by ``build`` for copies of ``values``, that minimizes ``loss`` of them."""

    def __init__(self, loss: Loss, values: Sequence[Tensor], build: Callable[[list[Any]], Any]) -> None:
        self.loss = loss
        self.params: list[Any] = [parameter(v) for v in values]
        self.optimizer = build(self.params)

    def closure(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss(*self.params)
        loss.backward()
        return loss

    def step(self, count: int = 1) -> list[float]:
        return [self.optimizer.step(self.closure).item() for _ in range(count)]

    @property
    def values(self) -> list[Tensor]:
        return [p.detach() for p in self.params]


def assert_alike(ours: Run, theirs: Run, atol: float = 1e-10) -> None:
    assert_equal(ours.values, theirs.values, atol)


def pair(loss: Loss, compiled: bool, values: list[Any] | None = None, **options: Any) -> tuple[Run, Run]:
    """LBFGS and torch's, at the same problem; with one of `PROBLEMS` everything else may be left out."""
    values = initial(loss) if values is None else values
    if options.get("line_search_fn") is None and loss in PROBLEMS:
        options.setdefault("lr", PROBLEMS[loss][1])
    ours = Run(loss, values, lambda params: LBFGS(params, **options, compiled=compiled))
    return ours, Run(loss, values, lambda params: torch.optim.LBFGS(params, **options))
