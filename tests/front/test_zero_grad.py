"""``zero_grad(set_to_none=False)``: after a compiled step one pass over all gradients, beside torch.optim's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compiled_optim import SGD
from compiled_optim._engine.kernels import gradients
from compiled_optim._engine.kernels.registry import host_module


def of_a_graph() -> Tensor:
    return torch.randn(6, requires_grad=True) * 2


KINDS: dict[str, Callable[[], Tensor]] = {
    "plain": lambda: torch.randn(6),
    "half": lambda: torch.randn(6, dtype=torch.bfloat16),
    "complex": lambda: torch.randn(6, dtype=torch.complex64),
    "large": lambda: torch.randn(400_000),
    "transposed": lambda: torch.randn(6, 5).t(),
    "gaps": lambda: torch.randn(9, 6)[::2, 1:4],
    "0-d": lambda: torch.tensor(3.0),
    "empty": lambda: torch.ones(0, 3),
    "nan": lambda: torch.tensor([torch.nan, torch.inf]),
    "requires grad": lambda: torch.randn(6, requires_grad=True),
    "with a graph": of_a_graph,
    "a view": lambda: torch.randn(9)[2:8],
    "conjugated": lambda: torch.randn(6, dtype=torch.complex64).conj(),
    "sparse": lambda: torch.eye(4).to_sparse(),
}


def both(kinds: Any, compiled: bool = True) -> tuple[SGD, torch.optim.Optimizer]:
    """Our optimizer after a step, and torch's, with equal gradients of these kinds."""
    made = []
    for cls, options in ((SGD, {"compiled": compiled}), (torch.optim.SGD, {})):
        torch.manual_seed(0)
        grads = [KINDS[kind]() for kind in kinds]
        dense = [grad.to_dense() if grad.is_sparse else grad for grad in grads]
        params = [torch.nn.Parameter(torch.ones_like(g, requires_grad=False).resolve_conj()) for g in dense]
        optimizer: Any = cls([*params, torch.nn.Parameter(torch.ones(2))], lr=0.1, **options)
        params[0].grad = torch.ones_like(params[0])
        optimizer.step()
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        made.append(optimizer)
    return made[0], made[1]


def grads_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for p in optimizer.param_groups[0]["params"] if p.grad is not None]


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torchs(kind: str, compiled: bool) -> None:
    ours, stock = both(["plain", kind, "large"], compiled)
    kept = grads_of(ours)
    for optimizer in (ours, stock):
        optimizer.zero_grad(set_to_none=False)
    for mine, theirs, before in zip(grads_of(ours), grads_of(stock), kept, strict=True):
        assert mine is before
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
        facts = [(g._version, g.requires_grad, g.grad_fn, g.is_leaf, g.layout) for g in (mine, theirs)]
        assert facts[0] == facts[1]


def test_plain_gradients_take_one_pass() -> None:
    grads = [KINDS[kind]() for kind in ("plain", "transposed", "sparse", "large", "with a graph")]
    others = gradients.zero(grads)
    assert [id(g) for g in others] == [id(grads[2]), id(grads[4])]
    assert not any(g.any() for g in grads[:2])
    assert grads[2].to_dense().any()


def test_a_backward_pass_knows_that_gradients_have_changed() -> None:
    ours, _ = both(["plain"])
    grad = ours.param_groups[0]["params"][0].grad
    loss = (torch.ones(6, requires_grad=True) * grad).sum()
    ours.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_views_of_one_memory() -> None:
    """Gradients that are parts of a bucket, as DistributedDataParallel makes them; the rest of it stays."""
    ours, _ = both(["plain", "plain"])
    bucket = torch.ones(15)
    for p, at in zip(ours.param_groups[0]["params"], (0, 7), strict=False):
        p.grad = bucket[at : at + 6]
    ours.zero_grad(set_to_none=False)
    assert bucket.tolist() == [0.0] * 6 + [1.0] + [0.0] * 6 + [1.0] * 2


def test_gradients_become_none() -> None:
    ours, _ = both(["plain", "sparse"])
    ours.zero_grad()
    assert all(p.grad is None for p in ours.param_groups[0]["params"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch compiles decompositions with its own TorchScript
def test_a_tangent_becomes_zero_too() -> None:
    ours, _ = both(["plain"])
    p = ours.param_groups[0]["params"][0]
    with torch.autograd.forward_ad.dual_level():
        p.grad = torch.autograd.forward_ad.make_dual(torch.ones(6), torch.ones(6))
        ours.zero_grad(set_to_none=False)
        tangent = torch.autograd.forward_ad.unpack_dual(p.grad).tangent
    assert tangent is None or not tangent.any()
    assert not p.grad.any()


def test_a_storage_that_is_too_short_is_left_to_torch() -> None:
    x = torch.ones(6)
    x.untyped_storage().resize_(12)
    assert gradients.zero([x]) == [x]


def test_the_profiler_sees_it() -> None:
    ours, _ = both(["plain"])
    with torch.autograd.profiler.profile() as profile:
        ours.zero_grad(set_to_none=False)
    assert any("Optimizer.zero_grad#SGD.zero_grad" in event.name for event in profile.function_events or ())
    assert not ours.param_groups[0]["params"][0].grad.any()


def test_only_lists_of_tensors() -> None:
    host = host_module()
    with pytest.raises(TypeError):
        host.zero((torch.ones(2),), False, 0, 1, 1)
    with pytest.raises(TypeError):
        host.norm(torch.ones(2), False, 0, False, 1, 1)
