"""A user's update rule is compiled for what it does, and only as long as it does that."""

from __future__ import annotations

import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import compiled_optim
from compiled_optim import CompileError, CompileFallbackWarning, Optimizer, explain
from compiled_optim.declare import buffer, number

BETA = 0.5
CONFIG = types.SimpleNamespace(beta=0.5)


class Rule(Optimizer):
    lr: float = number(default=0.25)
    decay: float = number(default=0.5)

    momentum = buffer()

    @staticmethod
    def scalars(h: Any, step: Any) -> dict[str, Any]:
        return {"lr": h.lr, "decay": h.decay}

    @staticmethod
    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        s.momentum = s.momentum * k.decay + g
        return p - s.momentum * (k.lr * BETA)


def rule(update: Callable[..., Any], **attributes: Any) -> type[Optimizer]:
    return type("Mine", (Rule,), {"update": staticmethod(update), **attributes})


def outcome(cls: type[Optimizer], compiled: bool | str, change: Callable[[], None] = lambda: None) -> Any:
    """The parameters and state after four steps, with a change after the second, or the error."""
    params = [torch.nn.Parameter(torch.linspace(-1, 1, n, dtype=torch.float64).reshape(s)) for n, s in SHAPES]
    optimizer = cls(params, compiled=compiled)
    try:
        for i in range(4):
            if i == 2:
                change()
            for p in params:
                p.grad = p.detach() + 1.5
            optimizer.step()
    except (AttributeError, TypeError) as error:
        return str(error)
    return [*params, *(optimizer.state[p]["momentum"] for p in params)]


SHAPES: list[tuple[int, tuple[int, ...]]] = [(6, (2, 3)), (5, (5,)), (1, ()), (24, (1, 2, 3, 4))]


def by_branch(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
    return p - g * k.lr if k.decay > 0.3 else p + g


def by_equality(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
    return p - g * k.lr if k.decay != 0 else p + g


def by_minimum(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
    return p - g * min(k.lr, 0.1)


def by_dimensions(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
    return p - g * (k.lr if p.ndim > 1 else 1.0)


def by_four_dimensions(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
    return p - g * k.lr if len(p.shape) == 4 else p


def by_length(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
    return p - g * k.lr if p.numel() < 10**9 else p


def per_element(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
    return p - g / p.numel()


def flipped(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
    return p - g.flip(0) * k.lr


def cumulated(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
    return p - g.cumsum(-1) * k.lr


def centred(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
    return p - (g - g.mean()) * k.lr


def into_gradient(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
    return p - g.mul_(k.lr)


def into_state(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
    return p - s.momentum.mul_(k.decay).add_(g) * k.lr


def noisy(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
    return p - g.bernoulli() * k.lr


TRAPS = [by_branch, by_equality, by_minimum, by_dimensions, by_four_dimensions, by_length, per_element]
TRAPS += [flipped, cumulated, centred, into_gradient, into_state, noisy]


@pytest.mark.parametrize("update", TRAPS, ids=lambda f: f.__name__)
def test_what_a_trace_would_get_wrong_runs_eagerly(update: Any, lenient: None) -> None:
    cls = rule(update)
    expected = outcome(cls, False)
    with pytest.warns(CompileFallbackWarning, match="steps eagerly: the update of Mine") as caught:
        actual = outcome(cls, True)
    assert len(caught) == 1
    if isinstance(expected, str):
        assert actual == expected
    else:
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_strict_mode_refuses_it_and_writes_nothing() -> None:
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = rule(by_branch)([p], compiled=True)
    with pytest.raises(CompileError, match="Mine"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))
    assert not optimizer.state


def test_a_kernel_of_its_own_for_what_the_rule_refers_to(monkeypatch: pytest.MonkeyPatch, lenient: None) -> None:
    """A change under an optimizer is seen, a new one has its kernel, and so has the next process."""
    here = sys.modules[__name__]

    def train(change: Callable[[], None] = lambda: None) -> tuple[float, Any]:
        p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
        optimizer = Rule([p], lr=1.0, decay=0.0, compiled=True)
        for i in range(2):
            if i == 1:
                change()
            p.grad = torch.ones_like(p)
            optimizer.step()
        (row,) = explain(optimizer)
        return p[0].item(), (row.execution, row.origin)

    compiled_optim.cache_clear()
    monkeypatch.setattr(here, "BETA", 0.5)
    with pytest.warns(CompileFallbackWarning, match="what it refers to, has changed") as caught:
        assert train(lambda: setattr(here, "BETA", 0.125)) == (-0.625, ("eager", ""))
    assert len(caught) == 1
    assert train() == (-0.25, ("multi_tensor", "compiled"))
    monkeypatch.setattr(here, "BETA", 0.5)
    assert train() == (-1.0, ("multi_tensor", "memory"))
    compiled_optim.cache_clear()  # as in another process
    for beta in (0.5, 0.125):
        monkeypatch.setattr(here, "BETA", beta)
        assert train() == (-2 * beta, ("multi_tensor", "disk"))


def test_a_rule_that_is_replaced(monkeypatch: pytest.MonkeyPatch, lenient: None) -> None:
    cls = rule(lambda p, g, s, k, on: p - g * (k.lr * BETA))
    change = {way: lambda: setattr(cls, "update", staticmethod(lambda p, g, s, k, on: p + g)) for way in (False, True)}
    expected = outcome(cls, False, change[False])
    monkeypatch.setattr(cls, "update", staticmethod(lambda p, g, s, k, on: p - g * (k.lr * BETA)))
    with pytest.warns(CompileFallbackWarning, match="the update of Mine, or what it refers to, has changed"):
        actual = outcome(cls, True, change[True])
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_what_may_change_unseen_is_compiled_with_guards(lenient: None) -> None:
    """``torch.compile`` guards the attributes of objects."""

    def update(p: Any, g: Any, s: Any, k: Any, on: Any) -> Any:
        return p - g * (k.lr * vars(CONFIG)["beta"])

    cls, values = rule(update), {}
    for way in (False, True):
        CONFIG.beta = 0.5
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            values[way] = outcome(cls, way, lambda: setattr(CONFIG, "beta", 0.125))
        assert [str(w.message) for w in caught if w.category is CompileFallbackWarning] == (
            ["the update of Mine refers to vars, which is a builtin_function_or_method: no change of it would be seen; "
             'it is compiled as with compiled="foreach"'] if way else []
        )  # fmt: skip
    torch.testing.assert_close(values[True], values[False], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("update", [by_branch, by_equality, by_minimum], ids=lambda f: f.__name__)
def test_lists_do_not_decide_a_branch(update: Any, lenient: None) -> None:
    """By name: scalars are lists in a graph, of which every comparison would be true."""
    cls = rule(update)
    with pytest.warns(CompileFallbackWarning):
        actual = outcome(cls, "foreach")
    torch.testing.assert_close(actual, outcome(cls, False), rtol=1e-12, atol=1e-12)
