"""Steps during the backward pass, of models that are sharded or replicated."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from beside_torch import both

from compiled_optim import SGD, Adam


def model() -> Any:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()


def backward(net: Any) -> None:
    torch.autograd.backward(net(torch.ones(2, 3, dtype=torch.float64)).square().sum())


@both
def test_fsdp2(compiled: bool, mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    nets = [model(), model()]
    for net in nets:
        fully_shard(net[0], mesh=mesh)
        fully_shard(net, mesh=mesh)
    optimizers = [Adam(net.parameters(), lr=0.1, compiled=compiled) for net in nets]
    optimizers[0].step_in_backward(nets[0], block_elements=1)
    for _ in range(3):
        for net, optimizer in zip(nets, optimizers, strict=True):
            backward(net)
            assert net is nets[1] or all(p.grad is None for p in net.parameters())
            optimizer.step()
            optimizer.zero_grad()
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(p.to_local(), q.to_local())
        assert all(torch.equal(a, b) for a, b in zip(*_states(optimizers, p, q), strict=True))


def _states(optimizers: list[Any], *params: Any) -> list[list[Any]]:
    states = [optimizer.state[p] for optimizer, p in zip(optimizers, params, strict=True)]
    return [[getattr(t, "_local_tensor", t) for t in state.values()] for state in states]


@pytest.mark.usefixtures("mesh")
def test_distributed_data_parallel_is_refused() -> None:
    from torch.nn.parallel import DistributedDataParallel

    net = model()
    replicated = DistributedDataParallel(copy.deepcopy(net))
    with pytest.raises(TypeError, match="model must not be a DistributedDataParallel"):
        SGD(replicated.parameters(), lr=0.1).step_in_backward(replicated)
    optimizer = SGD(net.parameters(), lr=0.1)
    optimizer.step_in_backward(net)
    backward(DistributedDataParallel(net))  # it sets the gradients that it has reduced
    with pytest.raises(RuntimeError, match=r"another gradient after its update .* DistributedDataParallel"):
        optimizer.step()
