"""A wrong constant planted in any kernel is seen by the parity tests' bound: the bound can fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import ALL, IDS, oracle

import compiled_optim
from compiled_optim.trace import Signature, trace


def largest_error(cls: type[compiled_optim.Optimizer], options: dict[str, Any]) -> float:
    """The largest relative difference to torch.optim's parameters after 10 compiled steps in float64."""
    start = torch.linspace(-2, 2, 40, dtype=torch.float64)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = cls([ours], **options, compiled=True), oracle(cls)([theirs], **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        gradient = torch.randn(40, dtype=torch.float64, generator=generator)
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    return ((ours - theirs).abs() / theirs.abs()).max().item()


def scalars_read(cls: type[compiled_optim.Optimizer], options: dict[str, Any]) -> set[str]:
    """The scalars that the kernel of these options reads."""
    choice = cls.declaration.choose(cls.declaration.check(options))
    buffers, scalars = cls.declaration.kept(choice.switches), tuple(cls.scalars(choice.hyper, 1))
    signature = Signature(cls, choice.switches, (torch.float64,) * (1 + len(buffers)), buffers, scalars)
    nodes = trace(signature).graph.graph.nodes
    return {n.meta["role"] for n in nodes if n.op == "placeholder" and n.users} & set(scalars)


@pytest.mark.parametrize(("cls", "options"), ALL, ids=IDS)
def test_a_wrong_scalar_is_seen(
    cls: type[compiled_optim.Optimizer], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every scalar that the kernel reads, wrong by one part in a thousand."""
    assert largest_error(cls, options) < 1e-12
    stock = cls.scalars
    for name in scalars_read(cls, options):

        def wrong(h: Any, step: Any, name: str = name) -> dict[str, Any]:
            scalars = stock(h, step)
            return {**scalars, name: scalars[name] * 1.001}

        with monkeypatch.context() as patch:
            patch.setattr(cls, "scalars", staticmethod(wrong))
            assert largest_error(cls, options) > 1e-12, f"a wrong {name} is not seen"
