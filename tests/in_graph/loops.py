"""Training loops to be compiled: a small model, an optimizer, a schedule, and the same ones uncompiled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn

from compiled_optim import LBFGS, algorithms

CLASSES = [*(getattr(algorithms, name) for name in algorithms.__all__)]
ALL = [*CLASSES, LBFGS]
_numbers = itertools.count()


class Model(nn.Module):
    """A perceptron; ``sparse``: behind an embedding with sparse gradients, which alone is trained."""

    def __init__(self, sparse: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6, sparse=True) if sparse else None
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
        self.to(dtype)
        self.trained = list((self.embedding or self.layers).parameters())

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.layers(x if self.embedding is None else self.embedding(x))
        return hidden


def batch(step: int, sparse: bool = False, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step % 7)
    if sparse:
        return torch.randint(20, (16,), generator=generator), torch.randn(16, 2, generator=generator, dtype=dtype)
    draw = torch.randn(16, 8, generator=generator, dtype=dtype)
    return draw[:, :6].contiguous(), draw[:, 6:].contiguous()


def build(
    cls: Any, seed: int = 0, dtype: torch.dtype = torch.float32, options: dict[str, Any] | None = None
) -> tuple[Model, Any]:
    torch.manual_seed(seed)
    model = Model(not getattr(cls, "accepts_dense", cls is not torch.optim.SparseAdam), dtype)
    return model, cls(model.trained, **(options or {}))


def train(model: Any, optimizer: Any, schedule: Any, x: Tensor, y: Tensor) -> Tensor:
    """One step, to be compiled; ``schedule`` may be None."""
    loss = (model(x) - y).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if schedule is not None:
        schedule.step()
    return loss.detach()


def alone(function: Callable[..., Any]) -> Any:
    """A copy whose graphs no other test shares: Dynamo keeps them by code object."""
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_numbers)}")
    return FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)


def compile_alone(function: Callable[..., Any], backend: Any = "aot_eager", **options: Any) -> Any:
    return torch.compile(alone(function), backend=backend, **options)


@contextmanager
def autograd_traced(on: bool = True) -> Iterator[None]:
    with torch._dynamo.config.patch(trace_autograd_ops=on):
        yield
