"""Recipes of torch.optim's documentation, run with its classes and with ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from schedule_cases import theirs

import compiled_optim
from compiled_optim import lr_scheduler


def train(optim: Any, schedulers: Any, tensor: bool, **options: Any) -> tuple[list[Any], list[list[float]]]:
    """A rate for each layer, and two schedulers one after the other in each epoch."""
    torch.manual_seed(0)
    base = torch.nn.Linear(5, 4, dtype=torch.float64)
    classifier = torch.nn.Linear(4, 3, dtype=torch.float64)
    rate = torch.tensor(1e-2, dtype=torch.float64) if tensor else 1e-2
    groups = [{"params": base.parameters(), "lr": rate}, {"params": classifier.parameters()}]
    optimizer = optim.SGD(groups, lr=1e-3, momentum=0.9, **options)
    first = schedulers.ExponentialLR(optimizer, gamma=0.9)
    second = schedulers.MultiStepLR(optimizer, milestones=[3, 8], gamma=0.1)
    seen = []
    for _ in range(12):
        for _ in range(3):
            optimizer.zero_grad()
            x, target = torch.randn(6, 5, dtype=torch.float64), torch.randint(3, (6,))
            torch.nn.functional.cross_entropy(classifier(base(x).relu()), target).backward()
            optimizer.step()
        first.step()
        second.step()
        seen.append([float(group["lr"]) for group in optimizer.param_groups])
    return [p.detach() for layer in (base, classifier) for p in layer.parameters()], seen


@pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_rates_of_layers_under_exponential_and_multistep_decay(compiled: bool, tensor: bool) -> None:
    expected, rates = train(torch.optim, theirs, False)
    actual, ours = train(compiled_optim, lr_scheduler, tensor, compiled=compiled)
    torch.testing.assert_close(ours, rates, rtol=1e-12, atol=0)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-13)
