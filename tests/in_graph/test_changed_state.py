"""State, parameters and groups that change between the steps of a compiled loop, as in an uncompiled one of torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import Pair, compile_alone
from torch import Tensor

from compiled_optim import SGD, AdamW
from compiled_optim.testing import assert_compiles

both = pytest.mark.parametrize("compiled", [False, True], ids=["traced", "compiled"])
CHANGES: list[Callable[[Any, Tensor], Any]] = [
    lambda o, p: o.state[p].update(exp_avg=torch.full_like(p, 0.3)),
    lambda o, p: o.state[p].update(step=torch.tensor(5.0)),
    lambda o, p: o.state[p]["step"].fill_(3.0),
    lambda o, p: o.state.update({p: {}}),
    lambda o, p: o.state[p].clear(),
    lambda o, p: o.state.pop(p),
    lambda o, p: o.state.clear(),
    lambda o, p: [state.update(step=torch.tensor(9.0)) for state in o.state.values()],
]


@both
def test_state_that_is_replaced(compiled: bool) -> None:
    pair = Pair(AdamW, {"lr": 0.01, "compiled": compiled})
    pair.step()
    for change in CHANGES:
        for inside in (True, False):
            pair.both(lambda optimizer, params, change=change: change(optimizer, params[0]))
            pair.step(inside=inside)
            pair.step()
            pair.compare(1e-9)


@both
@pytest.mark.parametrize("cls", [AdamW, SGD], ids=lambda cls: cls.__name__)
def test_state_that_is_taken_away_time_and_again(cls: Any, compiled: bool) -> None:
    """More often than Dynamo would compile; of SGD, the next gradient enters its momentum whole."""
    options = {"momentum": 0.9, "dampening": 0.5} if cls is SGD else {}
    pair = Pair(cls, {"lr": 0.01, "compiled": compiled, **options})
    with assert_compiles() as found:
        pair.step()
        for i in range(9):
            pair.both(lambda optimizer, params: optimizer.state[params[0]].clear())
            pair.step(inside=i % 3 != 2)
            pair.step()
            pair.compare(1e-9)
    # a traced rule has another where parameters differ in their step counts
    assert found.graphs <= 2 + (not compiled)


@both
def test_state_that_a_step_outside_makes(compiled: bool) -> None:
    """In a dict that was there, empty, when a graph saw it."""
    pair = Pair(AdamW, {"lr": 0.01, "compiled": compiled})

    def zero_grad(optimizer: Any, x: Tensor) -> Tensor:
        optimizer.zero_grad()
        return x + 1

    pair.both(lambda optimizer, params: [optimizer.state[p] for p in params])
    compile_alone(zero_grad)(pair.ours, torch.ones(1))
    for inside in (False, True, True):
        pair.step(inside=inside)
        pair.compare(1e-9)


def replace_first(model: Any, optimizer: Any) -> None:
    layer: Any = model.layers[0]
    layer.weight = model.trained[0] = optimizer.param_groups[0]["params"][0] = torch.nn.Parameter(layer.weight * 0.5)


@both
def test_a_parameter_that_is_replaced(compiled: bool) -> None:
    pair = Pair(AdamW, {"lr": 0.05, "compiled": compiled})
    pair.step(2)
    for model, optimizer in zip(pair.models, pair.optimizers, strict=True):
        replace_first(model, optimizer)
    for inside in (True, True, False, True):
        pair.step(inside=inside)
        pair.compare(1e-9)


@both
def test_a_param_group_more(compiled: bool) -> None:
    pair = Pair(AdamW, {"lr": 0.05, "compiled": compiled})
    pair.both(lambda optimizer, params: optimizer.param_groups[0].update(params=params[:3]))
    pair.step(2)
    pair.both(lambda optimizer, params: optimizer.add_param_group({"params": params[3:], "lr": 0.01}))
    for inside in (True, True, False, True):
        pair.step(inside=inside)
        pair.compare(1e-9)
