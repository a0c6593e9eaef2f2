"""A wrong constant planted in any kernel is seen by the parity tests' bound: the bound can fail."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import CLASSES, fitted, gradient, named, oracle, switch_sets, tolerance, with_all_numbers

import compiled_optim
from compiled_optim._engine.kernels.trace import Signature, trace
from compiled_optim._engine.rule import first_scalars

EACH_KERNEL = [(cls, with_all_numbers(cls, switches)) for cls in CLASSES for switches in switch_sets(cls)]


def largest_error(cls: type[compiled_optim.Optimizer], options: dict[str, Any]) -> float:
    """The largest relative difference to torch.optim's parameters and state after 10 compiled steps in float64."""
    start = fitted(cls, torch.linspace(-2, 2, 40, dtype=torch.float64))
    start = start if cls.elementwise else start / 4
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = cls([ours], **options, compiled=True), oracle(cls)([theirs], **options)
    torch.manual_seed(0)
    for i in range(10):
        # as small parameters, norms that are too small, and squares that grow faster than their mean: all are bounded
        given = gradient(cls, ours) * (0.04 if cls.matrices_only else 1 if cls.elementwise else 1 + i)
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = given.clone()
            optimizer.step()
    states = [optimizer.state_dict()["state"].get(0, {}) for optimizer in optimizers]
    pairs = [(ours, theirs), *((states[0][k], v) for k, v in states[1].items() if k in cls.rule.declaration.buffers)]
    return max(((a - b).abs() / b.abs().clamp_min(1e-300)).max().item() for a, b in pairs)


def scalars_read(cls: type[compiled_optim.Optimizer], options: dict[str, Any]) -> set[str]:
    """The scalars that the kernel of these options reads; those that are not 0 and read by a rule that reduces."""
    choice = cls.rule.declaration.read(cls.rule.declaration.check(options))
    buffers = cls.rule.declaration.kept(choice.switches, torch.float32)
    first = first_scalars(cls.rule, choice.hyper)
    if not cls.elementwise:
        read: set[str] = set()

        class Scalars:
            dtype_eps = torch.finfo(torch.float64).eps

            def __getattr__(self, name: str) -> Any:
                read.add(name)
                return first[name]

        p = torch.ones(2, 2)
        state = SimpleNamespace(**dict.fromkeys(cls.rule.declaration.kept(choice.switches, p.dtype, p.dim()), p))
        cls.update(p, p, state, Scalars(), choice.switches)
        return {name for name in read if first[name]}
    scalars = tuple(first)
    signature = Signature(cls.rule, choice.switches, (torch.float64,) * (1 + len(buffers)), buffers, scalars)
    nodes = trace(signature).graph.graph.nodes
    return {n.meta["role"] for n in nodes if n.op == "placeholder" and n.users} & set(scalars)


@pytest.mark.parametrize(
    ("cls", "options"), EACH_KERNEL, ids=[f"{cls.__name__}-{named(options)}" for cls, options in EACH_KERNEL]
)
def test_a_wrong_scalar_is_seen(
    cls: type[compiled_optim.Optimizer], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every scalar that the kernel reads and everything that is carried, wrong by one part in a thousand.

    By one in a hundred where products of bfloat16 may round less away.
    """
    share = 0.01 if cls.matrices_only else 0.001
    torch.set_default_dtype(torch.float64)  # of it is what torch carries
    assert largest_error(cls, options) < tolerance(cls)
    stock = cls.scalars

    def planted(name: str, factor: float) -> Any:
        def wrong(h: Any, step: Any, *carried: Any) -> dict[str, Any]:
            values = stock(h, step, *carried)
            for s in carried:
                if hasattr(s, name):
                    setattr(s, name, getattr(s, name) * factor)
            return {k: v * factor if k == name else v for k, v in values.items()}

        return staticmethod(wrong)

    for name in {*scalars_read(cls, options), *cls.rule.declaration.carried}:
        errors = []
        for factor in (1 + share, 1 - share):  # a bound is seen from one side
            with monkeypatch.context() as patch:
                patch.setattr(cls, "scalars", planted(name, factor))
                errors.append(largest_error(cls, options))
        assert max(errors) > tolerance(cls), f"a wrong {name} is not seen"
