"""Averages beside torch's, and a model to take them of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import swa_utils as stock

from compiled_optim import swa_utils


def mix(average: Tensor, model: Tensor, averaged: Any) -> Tensor:
    return 0.1 * average + 0.9 * model + 0 * averaged


def slowly(average: Tensor, model: Tensor, averaged: Any) -> Tensor:
    """Reads the number of averages, and calls functions of torch."""
    return torch.where(model > average, average + (model - average) / (averaged + 2), model)


# how torch's is built, and ours
AVERAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "equal": ({}, {}),
    "equal, avg_fn": ({"avg_fn": stock.get_swa_avg_fn()}, {"avg_fn": swa_utils.get_swa_avg_fn()}),
    "equal, multi_avg_fn": (
        {"multi_avg_fn": stock.get_swa_multi_avg_fn()},
        {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()},
    ),
    "EMA": ({"avg_fn": stock.get_ema_avg_fn(0.9)}, {"avg_fn": swa_utils.get_ema_avg_fn(0.9)}),
    "EMA, multi_avg_fn": (
        {"multi_avg_fn": stock.get_ema_multi_avg_fn(0.9)},
        {"multi_avg_fn": swa_utils.get_ema_multi_avg_fn(0.9)},
    ),
    "custom": ({"avg_fn": mix}, {"avg_fn": mix}),
    "custom, counting": ({"avg_fn": slowly}, {"avg_fn": slowly}),
}


class Net(nn.Module):
    """With a tied weight, a 0-d parameter, an integer buffer and a gradientless parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 5)
        self.tied = nn.Linear(5, 4)
        self.tied.weight = self.first.weight
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.tied(self.last(self.norm(self.first(x)))) * self.scale


def change(model: nn.Module) -> None:
    """As training would."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p))
        for b in model.buffers():
            b.add_(1)


def assert_same_state(actual: nn.Module, expected: nn.Module | dict[str, Any], rtol: float = 1e-12) -> None:
    ours, theirs = actual.state_dict(), expected if isinstance(expected, dict) else expected.state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=rtol, atol=rtol, msg=lambda text, name=name: f"{name}: {text}"
        )
