"""Models and tensors that are spread over processes, beside the same ones in one piece."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

STEPS = 3


def parameter(value: Tensor, mesh: DeviceMesh, *placements: Placement) -> Any:
    return nn.Parameter(distribute_tensor(value.detach().clone(), mesh, placements))


def whole(value: Any) -> Any:
    """A DTensor in one piece, which all processes must ask for."""
    return value.full_tensor().detach() if isinstance(value, DTensor) else value


def fully_sharded(model: Any, mesh: DeviceMesh) -> None:
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


class Pair:
    """A model that is sharded, and the same in one piece; of two processes the second has nothing of the last layer.

    Args:
        sharded, stock: build an optimizer from parameters.
        shard: spreads the parameters of a model.
    """

    def __init__(
        self, mesh: DeviceMesh, sharded: Any, stock: Any, shard: Callable[[Any, DeviceMesh], Any] = fully_sharded
    ) -> None:
        torch.manual_seed(0)
        layers = (nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 1))
        self.plain = nn.Sequential(*layers).double()
        self.model: Any = copy.deepcopy(self.plain)
        shard(self.model, mesh)
        self.optimizers = (sharded(self.model.parameters()), stock(self.plain.parameters()))

    def step(self, seeds: Sequence[int], clip: float | None = None) -> None:
        for seed in seeds:
            x = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
            for model, optimizer in zip((self.model, self.plain), self.optimizers, strict=True):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()

    def compare(self) -> None:
        """Parameters, and the state of each."""
        for ours, theirs in zip(self.model.parameters(), self.plain.parameters(), strict=True):
            torch.testing.assert_close(whole(ours), theirs.detach(), rtol=1e-12, atol=1e-14)
            states = [optimizer.state[p] for optimizer, p in zip(self.optimizers, (ours, theirs), strict=True)]
            assert list(states[0]) == list(states[1])
            for name, value in states[0].items():
                assert isinstance(value, DTensor) == (name != "step")
                torch.testing.assert_close(whole(value), states[1][name].detach(), rtol=1e-12, atol=1e-14)
