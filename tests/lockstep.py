"""Two optimizers on copies of the same parameters, fed the same gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from cases import gradient, taken
from torch import Tensor

Build = Callable[[list[Any]], torch.optim.Optimizer]

SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (3, 5), (2, 3, 4), (1, 1, 9), (131,)]


def tensors(shapes: Iterable[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def parameter(tensor: Tensor) -> Tensor:
    """A parameter with a copy of the data, and the same strides where they are dense."""
    return torch.nn.Parameter(tensor.detach().clone())


def assert_same(actual: Tensor, expected: Tensor, rtol: float = 1e-12, what: str = "") -> None:
    """Relative agreement; the floor is for elements that nearly cancelled."""
    magnitude = expected.detach().abs().nan_to_num(0, 0, 0).max().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.detach(),
        expected.detach(),
        rtol=rtol,
        atol=rtol / 100 * max(1.0, magnitude),
        equal_nan=True,
        msg=lambda text: f"{what}: {text}",
    )


def state_of(optimizer: torch.optim.Optimizer, p: Tensor) -> dict[str, Any]:
    """Without making it, as reading ``optimizer.state[p]`` would."""
    return {k: v for k, v in optimizer.state.get(p, {}).items() if v is not None}


class Lockstep:
    """``ours`` and the ``reference`` it must follow.

    Args:
        reference, ours: build an optimizer from a list of parameters.
        initial: the values both begin with.
    """

    def __init__(self, reference: Build, ours: Build, initial: Sequence[Tensor]) -> None:
        self.params = ([parameter(t) for t in initial], [parameter(t) for t in initial])
        self.optimizers = (reference(self.params[0]), ours(self.params[1]))

    @property
    def ours(self) -> Any:
        return self.optimizers[1]

    def both(self, action: Callable[[Any, list[Any]], None]) -> None:
        """Does the same to both: ``action(optimizer, parameters)``."""
        for optimizer, params in zip(self.optimizers, self.params, strict=True):
            action(optimizer, params)

    def give(self, gradients: Sequence[Tensor | None]) -> None:
        """Dense ones become sparse for an algorithm that takes no others."""
        for params in self.params:
            for p, g in zip(params, gradients, strict=True):
                p.grad = None if g is None else taken(type(self.ours), g.detach().clone())

    def step(self, count: int = 1, missing: Iterable[int] = ()) -> None:
        """Steps with fresh gradients, but for the parameters ``missing``."""
        without, cls = set(missing), type(self.ours)
        for _ in range(count):
            self.give([None if i in without else gradient(cls, p) for i, p in enumerate(self.params[0])])
            self.step_as_is()

    def step_as_is(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def compare(self, rtol: float = 1e-12, infinite_is_nan: bool = False) -> None:
        """Parameters and every state tensor agree."""

        def value(v: Any) -> Tensor:
            v = torch.as_tensor(v).detach()
            return v.where(v.isfinite(), torch.nan) if infinite_is_nan else v

        for i, (theirs, ours) in enumerate(zip(*self.params, strict=True)):
            assert_same(value(ours), value(theirs), rtol, f"parameter {i}")
            expected, actual = state_of(self.optimizers[0], theirs), state_of(self.optimizers[1], ours)
            assert set(actual) == set(expected), f"state of parameter {i}"
            for name, v in expected.items():
                v = float(v) if isinstance(v, int) else v  # the step count of torch.optim.SparseAdam
                assert_same(value(actual[name]), value(v), rtol, f"{name} of parameter {i}")
