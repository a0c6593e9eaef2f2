"""The vector work of one iteration of L-BFGS, update of the history and direction: torch.optim's against ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rivals import compare
from torch import Tensor

from compiled_optim.lbfgs.history import History, Kernels

HISTORY = 100


class Torch:
    """That part of torch.optim.LBFGS.step, as it is in torch 2.13."""

    def __init__(self) -> None:
        self.old_dirs: list[Tensor] = []
        self.old_stps: list[Tensor] = []
        self.ro: list[Tensor] = []
        self.H_diag: Any = 1
        self.al: list[Any] = [None] * HISTORY

    def iterate(self, flat_grad: Tensor, prev_flat_grad: Tensor, d: Tensor, t: float) -> tuple[Tensor, Tensor]:
        old_dirs, old_stps, ro, al = self.old_dirs, self.old_stps, self.ro, self.al
        y = flat_grad.sub(prev_flat_grad)
        s = d.mul(t)
        ys = y.dot(s)
        if ys > 1e-10:
            if len(old_dirs) == HISTORY:
                old_dirs.pop(0)
                old_stps.pop(0)
                ro.pop(0)
            old_dirs.append(y)
            old_stps.append(s)
            ro.append(1.0 / ys)
            self.H_diag = ys / y.dot(y)
        num_old = len(old_dirs)
        q = flat_grad.neg()
        for i in range(num_old - 1, -1, -1):
            al[i] = old_stps[i].dot(q) * ro[i]
            q.add_(old_dirs[i], alpha=-al[i])
        d = r = torch.mul(q, self.H_diag)
        for i in range(num_old):
            be_i = old_dirs[i].dot(r) * ro[i]
            r.add_(old_stps[i], alpha=al[i] - be_i)
        return d, flat_grad.dot(d)


def ours(work: Kernels | type[History], like: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    history = History(HISTORY, like)

    def iterate(g: Tensor, before: Tensor, d: Tensor, t: float) -> tuple[Tensor, Tensor]:
        work.update(history, g, before, d, t)
        return work.direction(history, g)

    return iterate


SIZES = [(torch.float32, n) for n in (100, 1_000, 10_000, 100_000, 1_000_000)] + [(torch.float64, 10_000)]


@pytest.mark.parametrize(("dtype", "elements"), SIZES, ids=str)
def test_iteration(dtype: torch.dtype, elements: int, benchmark: Any) -> None:
    """The gradients are a quadratic's with eigenvalues between 1 and 2, at random points."""
    curvature = torch.linspace(1, 2, elements, dtype=dtype)
    points = [torch.randn(elements, dtype=dtype) for _ in range(3)]
    pairs = [(curvature * b, curvature * a, b - a) for a, b in zip(points, points[1:] + points[:1], strict=True)]
    iterate = {
        "torch": Torch().iterate,
        "ours eager": ours(History, points[0]),
        "ours compiled": ours(Kernels(dtype), points[0]),
    }
    for i in range(HISTORY):
        results = [rival(*pairs[i % 3], 0.5) for rival in iterate.values()]
        if i < 9:
            for d, _ in results[1:]:
                torch.testing.assert_close(d, results[0][0], rtol=1e-3, atol=1e-3)
    cycles = dict.fromkeys(iterate, 0)

    def once(name: str) -> None:
        cycles[name] += 1
        iterate[name](*pairs[cycles[name] % 3], 0.5)

    rivals = {name: lambda name=name: once(name) for name in iterate}
    seconds = compare(rivals, rounds=200 if elements < 50_000 else 40 if elements < 500_000 else 10)
    benchmark.extra_info.update(
        lbfgs_milliseconds={name: round(value * 1e3, 4) for name, value in seconds.items()},
        torch_over_compiled=round(seconds["torch"] / seconds["ours compiled"], 2),
        elements=elements,
        threads=torch.get_num_threads(),
    )
    print(f"\n{elements} elements, {dtype}, {HISTORY} pairs: {benchmark.extra_info}")
    benchmark.pedantic(rivals["ours compiled"], rounds=10, warmup_rounds=1)
