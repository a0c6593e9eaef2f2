"""Timing rivals side by side: in rotation, so that drift of a shared machine hits all of them, and by their medians."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch

import compiled_optim
from compiled_optim.declare import buffer, number

Step = Callable[[], Any]


def compare(steps: dict[str, Step], rounds: int, warmup: int = 3) -> dict[str, float]:
    """The median seconds of each rival. Each timed call follows an untimed one, which brings its own data to cache."""
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
    return {name: median(samples) for name, samples in times.items()}


def parameters(shapes: list[tuple[int, ...]]) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(torch.randn(shape) * 0.02) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p) * 0.01
    return params


def bandwidth() -> float:
    """GB/s of copying 400 MB from memory to memory (read and write counted)."""
    source = torch.ones(100_000_000)
    target = torch.empty_like(source)
    seconds = compare({"copy": lambda: target.copy_(source)}, rounds=5)["copy"]
    return 2 * source.nbytes / seconds / 1e9


class Traffic(compiled_optim.Optimizer):
    """What a step could cost at best: the reads and writes of Adam, and next to no arithmetic."""

    lr: float = number(default=0.0)
    exp_avg = buffer()
    exp_avg_sq = buffer()

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"lr": h.lr}

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        s.exp_avg = s.exp_avg + g
        s.exp_avg_sq = s.exp_avg_sq + g
        return p + g


class TrafficSGD(compiled_optim.Optimizer):
    """The same for SGD with momentum."""

    lr: float = number(default=0.0)
    momentum_buffer = buffer()

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"lr": h.lr}

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        s.momentum_buffer = s.momentum_buffer + g
        return p + g
