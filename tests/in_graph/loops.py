"""Training loops to be compiled: a small model, an optimizer, a schedule, and the same ones uncompiled."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch
import torch._dynamo
from beside_torch import Lockstep
from cases import fits, oracle
from torch import Tensor, nn

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
    model.trained = [p for p in model.trained if fits(cls, p)]
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


class Pair(Lockstep):
    """Our optimizer in a compiled loop, and torch's in an uncompiled one, in double precision."""

    def __init__(self, cls: Any, options: dict[str, Any], fullgraph: bool = False) -> None:
        stock = {k: v for k, v in options.items() if k != "compiled"}
        runs = (oracle(cls), stock), (cls, options)
        self.models, self.optimizers = zip(*(build(c, dtype=torch.float64, options=o) for c, o in runs), strict=True)
        self.params = tuple(model.trained for model in self.models)
        self._step = compile_alone(train, fullgraph=fullgraph)
        self._count = 0

    def step(self, count: int = 1, inside: bool = True) -> None:
        for _ in range(count):
            data = batch(self._count, dtype=torch.float64)
            steps = (train, self._step if inside else train)
            for step, model, optimizer in zip(steps, self.models, self.optimizers, strict=True):
                step(model, optimizer, None, *data)
            self._count += 1
