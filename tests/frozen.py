"""The state of an optimizer at one moment, to compare with it later, and checkpoints that went through a file."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def frozen(optimizer: torch.optim.Optimizer, params: list[Any]) -> Any:
    """Everything that a failed step must not change."""
    keys = [id(p) for p in optimizer.state]
    return keys, copy.deepcopy([{**s} for s in optimizer.state.values()]), [p.detach().clone() for p in params]


def assert_frozen(optimizer: torch.optim.Optimizer, params: list[Any], before: Any) -> None:
    now = frozen(optimizer, params)
    assert now[0] == before[0]
    torch.testing.assert_close(now[1:], before[1:], rtol=0, atol=0)
