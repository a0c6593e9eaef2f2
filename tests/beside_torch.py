"""Ours beside torch's: equal parameters, the same gradients, steps of both, and what must be equal after them.

What is special of a subject is a thin layer over this: `averaging`, `minimizing`, `loops` of a user's graph.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import pytest
import torch
from cases import fitted, gradient, taken
from torch import Tensor

from compiled_optim import Optimizer, explain

Build = Callable[[list[Any]], torch.optim.Optimizer]

SHAPES: list[tuple[int, ...]] = [(), (1,), (7,), (3, 5), (2, 3, 4), (1, 1, 9), (131,)]
MATRICES = [(3, 4), (5, 2), (1, 1)]  # which every algorithm takes
both = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


# ---- parameters and gradients


def tensors(shapes: Iterable[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


def parameter(tensor: Tensor) -> Tensor:
    """A parameter with a copy of the data, and the same strides where they are dense."""
    return torch.nn.Parameter(tensor.detach().clone())


def parameters(copies: int = 1, dtype: torch.dtype = torch.float64) -> Any:
    """A list of parameters, or several lists of equal ones."""
    values = tensors(MATRICES, dtype)
    lists = [[parameter(v) for v in values] for _ in range(copies)]
    return lists[0] if copies == 1 else lists


def set_gradients(
    *lists: list[Any], cls: type[torch.optim.Optimizer] = torch.optim.SGD, missing: Collection[int] = ()
) -> None:
    """The same new gradients for all lists, such as the class takes; none for the parameters at ``missing``."""
    for i, row in enumerate(zip(*lists, strict=True)):
        grad = None if i in missing else gradient(cls, row[0])
        for p in row:
            p.grad = None if grad is None else grad.clone()


# ---- steps


def train(steps: int, *runs: tuple[torch.optim.Optimizer, list[Any]]) -> None:
    """Steps all optimizers on the same gradients."""
    for _ in range(steps):
        set_gradients(*(params for _, params in runs), cls=type(runs[0][0]))
        for optimizer, _ in runs:
            optimizer.step()


def executions(optimizer: Optimizer) -> dict[str, str]:
    """How the last step ran, each with its reason."""
    return {row.execution: row.reason for row in explain(optimizer)}


# ---- agreement


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


def assert_equal(ours: list[Any], stock: list[Any], atol: float = 1e-12) -> None:
    """Agreement to an absolute error, of lists of tensors; infinities and NaNs are equal to themselves."""
    actual, expected = ([t.detach() for t in values] for values in (ours, stock))
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol, equal_nan=True)


class Lockstep:
    """``ours`` and the ``reference`` it must follow.

    Args:
        reference, ours: build an optimizer from a list of parameters.
        initial: the values both begin with.
    """

    params: tuple[list[Any], list[Any]]
    optimizers: tuple[Any, Any]  # the reference comes first, as its parameters do

    def __init__(self, reference: Build, ours: Build, initial: Sequence[Tensor]) -> None:
        self.params = ([parameter(t) for t in initial], [parameter(t) for t in initial])
        self.optimizers = (reference(self.params[0]), ours(self.params[1]))

    @property
    def ours(self) -> Any:
        return self.optimizers[1]

    def both(self, action: Callable[[Any, list[Any]], Any]) -> None:
        """Does the same to both: ``action(optimizer, parameters)``."""
        for optimizer, params in zip(self.optimizers, self.params, strict=True):
            action(optimizer, params)

    def give(self, gradients: Sequence[Tensor | None]) -> None:
        """Those that the class does not take are given as it takes them: sparse, or as matrices."""
        for params in self.params:
            for p, g in zip(params, gradients, strict=True):
                p.grad = None if g is None else taken(type(self.ours), fitted(type(self.ours), g.detach().clone()))

    def step(self, count: int = 1, missing: Collection[int] = ()) -> None:
        """Steps with fresh gradients, but for the parameters ``missing``."""
        for _ in range(count):
            set_gradients(*self.params, cls=type(self.ours), missing=missing)
            self.step_as_is()

    def step_as_is(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def compare(self, rtol: float = 1e-12, infinite_is_nan: bool = False) -> None:
        """Parameters and every state tensor agree."""
        self.compare_parameters(rtol, infinite_is_nan)
        for i, (theirs, ours) in enumerate(zip(*self.params, strict=True)):
            expected, actual = state_of(self.optimizers[0], theirs), state_of(self.optimizers[1], ours)
            assert set(actual) == set(expected), f"state of parameter {i}"
            for name, v in expected.items():
                v = float(v) if isinstance(v, int) else v  # the step count of torch.optim.SparseAdam
                self._agree(actual[name], v, rtol, infinite_is_nan, f"{name} of parameter {i}")

    def compare_parameters(self, rtol: float = 1e-12, infinite_is_nan: bool = False) -> None:
        for i, (theirs, ours) in enumerate(zip(*self.params, strict=True)):
            self._agree(ours, theirs, rtol, infinite_is_nan, f"parameter {i}")

    @staticmethod
    def _agree(actual: Any, expected: Any, rtol: float, infinite_is_nan: bool, what: str) -> None:
        reference = torch.as_tensor(expected).detach()
        values = [torch.as_tensor(actual).detach().to(reference.device), reference]  # torch may count on the host
        if infinite_is_nan:
            values = [v.where(v.isfinite(), torch.nan) for v in values]
        assert_same(*values, rtol, what)
