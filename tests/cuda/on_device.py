"""Ours on the stand-in for GPUs beside torch's on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any

import stand_in
import torch
from beside_torch import assert_same, state_of
from cases import gradient, oracle
from torch import Tensor

from compiled_optim import explain

SHAPES = ((3, 5), (), (0, 2), (130, 9), (7,))
GPU, OTHER_GPU = stand_in.DEVICES
CPU = torch.device("cpu")


def two_groups(params: list[Any]) -> list[dict[str, Any]]:
    return [{"params": params[::2]}, {"params": params[1::2], "lr": 0.03}]


class Beside:
    """Equal parameters, and an optimizer of ours and one of torch's.

    Args:
        cls: of ours; options: of both; ours: of ours only, beside ``compiled=True``.
        devices: of our parameters, in turn.
    """

    def __init__(
        self,
        gpu: Any,
        cls: Any,
        options: dict[str, Any],
        ours: dict[str, Any] | None = None,
        devices: Sequence[torch.device] = (GPU,),
        dtype: torch.dtype = torch.float64,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        groups: Callable[[list[Any]], Any] = two_groups,
    ) -> None:
        self.gpu, self.cls = gpu, cls
        start = [torch.randn(shape, dtype=dtype) for shape in shapes]
        placed = [t.to(devices[i % len(devices)]) for i, t in enumerate(start)]
        self.params = [torch.nn.Parameter(t.clone()) for t in placed]
        self.theirs = [torch.nn.Parameter(t) for t in start]
        self.optimizer = cls(groups(self.params), **{"compiled": True, **options, **(ours or {})})
        self.reference = oracle(cls)(groups(self.theirs), **options)

    def give(self, missing: Collection[int] = ()) -> None:
        """New gradients, which are written into those that are there."""
        for i, (p, q) in enumerate(zip(self.params, self.theirs, strict=True)):
            q.grad = None if i in missing else gradient(self.cls, q)
            if q.grad is None or p.grad is None or q.grad.is_sparse:
                p.grad = None if q.grad is None else q.grad.to(p.device)
            else:
                p.grad.copy_(q.grad)

    def step(self, waits: bool = True) -> list[str]:
        """A step of both; the kernels of ours. If it must not wait for a device, it raises if it does."""
        self.gpu.reset()
        with nullcontext() if waits else stand_in.no_waiting():
            self.optimizer.step()
        self.gpu.check()
        self.reference.step()
        return list(self.gpu.kernels)

    def compare(self, rtol: float = 1e-12) -> None:
        """Parameters and all state; its dtypes are the reference's, and it lies where it did."""
        for i, (p, q) in enumerate(zip(self.params, self.theirs, strict=True)):
            assert_same(p.cpu(), q, rtol, f"parameter {i}")
            expected, actual = state_of(self.reference, q), state_of(self.optimizer, p)
            assert set(actual) == set(expected), f"state of parameter {i}"
            for name, value in expected.items():
                value = torch.as_tensor(value, dtype=actual[name].dtype)
                assert_same(actual[name].cpu(), value, rtol, f"{name} of parameter {i}")

    def is_compiled(self) -> bool:
        return {row.execution for row in explain(self.optimizer)} == {"multi_tensor"}


def on(device: torch.device, value: float | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.as_tensor(value, dtype=dtype).to(device)
