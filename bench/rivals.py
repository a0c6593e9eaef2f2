"""Timing rivals side by side: in rotation, so that drift of a shared machine hits all of them, and by their medians."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import median
from time import perf_counter
from typing import Any

import torch

import compiled_optim
from compiled_optim.declare import buffer, number

Step = Callable[[], Any]

# Those with one kernel and dense gradients; bench_reduce.py has those that reduce, bench_sparse.py the sparse ones.
ALGORITHMS = [
    name
    for name in compiled_optim.algorithms.__all__
    if (cls := getattr(compiled_optim, name)).accepts_dense and cls.elementwise
]


def compare(steps: dict[str, Step], rounds: int, warmup: int = 3) -> dict[str, float]:
    """The median seconds of each rival."""
    return {name: median(times) for name, times in rotate(steps, rounds, warmup).items()}


def rotate(steps: dict[str, Step], rounds: int, warmup: int = 3) -> dict[str, list[float]]:
    """The seconds of each rival by round. A timed call follows an untimed one, which brings its own data to cache."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(warmup):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            step()
            begun = perf_counter()
            step()
            times[name].append(perf_counter() - begun)
    return times


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter((torch.randn(shape) * 0.02).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 0.01
    return params


class Shared:
    """One set of parameters, gradients and state for all rivals.

    With memory of its own for each, the luck of its placement moved the ratio of two rivals on 2 GB by 30 %.
    """

    def __init__(self, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        self.params = parameters(shapes, dtype)
        self._state: dict[tuple[int, str, torch.dtype], torch.Tensor] = {}

    def adopt(self, optimizer: torch.optim.Optimizer, names: Mapping[str, str] = {}) -> torch.optim.Optimizer:
        """Takes a first step, and puts the shared state in the place of the optimizer's.

        Args:
            names: what torch.optim calls a state that the optimizer calls otherwise.
        """
        optimizer.step()
        for i, p in enumerate(self.params):
            for name, tensor in optimizer.state[p].items():
                if isinstance(tensor, torch.Tensor) and tensor.shape == p.shape:
                    key = (i, names.get(name, name), tensor.dtype)
                    optimizer.state[p][name] = self._state.setdefault(key, tensor)
        return optimizer


def bandwidth() -> float:
    """GB/s of copying 400 MB from memory to memory (read and write counted)."""
    source = torch.ones(100_000_000)
    target = torch.empty_like(source)
    seconds = compare({"copy": lambda: target.copy_(source)}, rounds=5)["copy"]
    return 2 * source.nbytes / seconds / 1e9


def traffic(algorithm: type[compiled_optim.Optimizer], buffers: tuple[str, ...]) -> type[compiled_optim.Optimizer]:
    """What a step of an algorithm could cost at best: its reads and writes, and next to no arithmetic."""

    class Traffic(compiled_optim.Optimizer):
        lr: float = number(default=0.0)
        locals().update({name: buffer() for name in buffers})

        @staticmethod
        def scalars(h: Any, step: Any) -> dict[str, Any]:
            return {"lr": h.lr}

        @staticmethod
        def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
            zero = g * k.lr  # leaves the rivals' values as they are
            for name in buffers:
                setattr(s, name, getattr(s, name) + zero)
            return p + zero

    Traffic.__qualname__ += f"[{algorithm.__name__}]"  # a kernel of its own
    return Traffic
