"""What the trainings have in common: scikit-learn's digits, a small network, and two ways to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import compiled_optim
from compiled_optim import explain

Build = Callable[..., torch.optim.Optimizer]
WAYS = {"eager": "eager", "compiled": "multi_tensor"}  # and what explain calls it
MISSING: Any = {"reason": "make test-hosts installs it and runs these tests", "exc_type": ImportError}


def digits(samples: int = 128, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Images of shape (64,) in [0, 1], and their digits."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.tensor(images[:samples] / 16, dtype=dtype), torch.tensor(labels[:samples]))


def network(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).to(dtype)


class Way:
    """How ours steps.

    Attributes:
        name: "eager" or "compiled".
        seen: the executions that `check` found.
        result: what the table says of the result, if not that it is the same.
    """

    result = ""

    def __init__(self, name: str) -> None:
        self.name, self.seen = name, set[str]()

    def options(self) -> dict[str, Any]:
        return {"compiled": self.name == "compiled"}

    def of(self, name: str) -> Build:
        """The class of this name, to be called with parameters and options."""

        def build(params: Any, *args: Any, **options: Any) -> torch.optim.Optimizer:
            return getattr(compiled_optim, name)(params, *args, **options, **self.options())  # type: ignore[no-any-return]

        return build

    def check(self, optimizer: Any, *, reduces: bool = False) -> None:
        """That the last step of ``optimizer``, or of what it wraps, ran as it was asked to.

        ``reduces``: rules that are not elementwise run compiled in other ways than one kernel.
        """
        ran = {row.execution for row in explain(optimizer)}
        asked = "eager" not in ran if reduces and self.name == "compiled" else ran == {WAYS[self.name]}
        assert asked, str(explain(optimizer))
        self.seen |= ran

    def refused(self, how: str) -> None:
        """Says in the table that nothing ran."""
        self.seen, self.result = {"-"}, how


def assert_same(ours: Any, stock: Any, tolerance: float = 1e-6) -> None:
    """That parameters, which training has moved by about 0.1, agree to ``tolerance``."""
    ours, stock = (v.state_dict() if isinstance(v, nn.Module) else v for v in (ours, stock))
    assert list(ours) == list(stock)
    for name, value in stock.items():
        if isinstance(value, Tensor):
            off = (ours[name].double() - value.double()).abs()
            assert (off <= tolerance * (1 + value.double().abs())).all(), f"{name} is off by {off.max().item()}"
