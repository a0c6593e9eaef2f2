"""A user's torch.compile'd loop meets no change of a learning rate: it is traced once, whatever the schedule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from schedule_cases import CASES, LRS

import compiled_optim
from compiled_optim import lr_scheduler
from compiled_optim.testing import assert_compiles


# torch's own, of the loss that lives on over the break at backward()
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("attach", [False, True], ids=["stepped", "attached"])
@pytest.mark.parametrize("tensor", [False, True], ids=["float lr", "tensor lr"])
@pytest.mark.parametrize("build", CASES.values(), ids=CASES.keys())
def test_no_recompiles(build: Any, tensor: bool, attach: bool) -> None:
    torch.compiler.reset()
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1)).double()
    rates = [torch.tensor(lr, dtype=torch.float64) if tensor else lr for lr in LRS]
    groups = [{"params": layer.parameters(), "lr": lr} for layer, lr in zip(model, rates, strict=True)]
    optimizer = compiled_optim.SGD(groups, lr=0.1, momentum=0.9, compiled=True)
    schedule = build(lr_scheduler, optimizer)
    if attach:
        optimizer.attach(schedule)

    @torch.compile(backend="eager")
    def train(x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    def run(steps: int) -> None:
        for _ in range(steps):
            train(torch.randn(4, 3, dtype=torch.float64))
            if not attach:
                schedule.step()

    with assert_compiles() as first:
        run(2)
    assert first.graphs > 0
    with assert_compiles(0):
        run(10)
