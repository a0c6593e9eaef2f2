"""What a compiled optimizer must notice before it touches a pointer: each change is made to a reference too."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside_torch import Lockstep, parameter, tensors
from torch import Tensor

from compiled_optim import SGD, Adam, explain

SHAPES: list[tuple[int, ...]] = [(5, 7), (3, 4, 2, 2), (), (131,)]
Change = Callable[[Any, list[Any]], None]


def adam(initial: list[Tensor] | None = None, **options: Any) -> Lockstep:
    return Lockstep(
        lambda params: torch.optim.Adam(params, **options),
        lambda params: Adam(params, **options, compiled=True),
        tensors(SHAPES) if initial is None else initial,
    )


def sgd(initial: list[Tensor] | None = None) -> Lockstep:
    """With dampening: its first step of a parameter differs from the others."""
    options = {"momentum": 0.9, "dampening": 0.5}
    return Lockstep(
        lambda params: torch.optim.SGD(params, **options),
        lambda params: SGD(params, **options, compiled=True),
        tensors(SHAPES) if initial is None else initial,
    )


def against_eager(initial: list[Tensor]) -> Lockstep:
    """Where torch.optim raises: our own eager path is the reference."""
    return Lockstep(Adam, lambda params: Adam(params, compiled=True), initial)


both_rules = pytest.mark.parametrize("rule", [adam, sgd])


def survives(run: Lockstep, change: Change) -> None:
    run.step(2)
    run.both(change)
    run.step(2)
    run.compare()


def test_values_of_groups_rebuild_nothing() -> None:
    run = adam()
    run.step()
    plan = run.ours._execution.plan
    for value in (0.1, 0.2, torch.tensor(0.3, dtype=torch.float64)):
        run.both(lambda optimizer, _, value=value: optimizer.param_groups[0].update(lr=value, betas=(0.5, 0.6)))
        run.step()
        run.compare()
    assert run.ours._execution.plan is plan


def test_a_mutable_hyperparameter_is_read_in_every_step() -> None:
    run = adam()
    run.both(lambda optimizer, _: optimizer.param_groups[0].update(betas=[0.5, 0.6]))
    run.step()
    run.both(lambda optimizer, _: optimizer.param_groups[0]["betas"].__setitem__(0, 0.1))
    run.step()
    run.compare()


@both_rules
def test_new_gradient_tensors_and_zero_grad(rule: Any) -> None:
    run = rule()
    run.step()
    for set_to_none in (False, True):
        run.both(lambda optimizer, _, none=set_to_none: optimizer.zero_grad(set_to_none=none))
        run.step_as_is()  # with zeros, and then with nothing to do
        run.compare()
        assert all((p.grad is None) == set_to_none for p in run.params[1])
    run.step(2)
    run.compare()


@both_rules
def test_a_gradient_kept_and_written_in_place(rule: Any) -> None:
    run = rule()
    run.step()
    plan = run.ours._execution.plan
    for _ in range(2):
        fresh = tensors(SHAPES)
        run.both(lambda _, params, fresh=fresh: [p.grad.copy_(g) for p, g in zip(params, fresh, strict=True)])
        run.step_as_is()
        run.compare()
    assert run.ours._execution.plan is plan


@both_rules
def test_gradients_come_and_go(rule: Any) -> None:
    """First gradients late, then a different one missing in each step: step counts differ, and no plan is rebuilt."""
    run = rule()
    for missing in ([1, 2, 3], [2, 3], [0, 3], []):
        run.step(missing=missing)
        run.compare()
    plan, kernels = run.ours._execution.plan, len(list(explain(run.ours)))
    for i in [0, 1, 2, 3, 1, 1, 1]:
        run.step(missing=[i])
        run.compare()
    assert run.ours._execution.plan is plan
    assert kernels == 1
    if rule is adam:
        assert len({run.ours.state[p]["step"].item() for p in run.params[1]}) > 2


def test_no_gradient_at_all() -> None:
    run = adam()
    run.step(missing=range(4))
    assert not run.ours.state


STEPS = [
    lambda step: step.double(),
    lambda step: step.reshape(1),
    lambda step: step.reshape(1, 1).double(),
    lambda step: step + 5,
    lambda step: torch.full((3,), step.item())[1],
]


@pytest.mark.parametrize("remade", STEPS, ids=["float64", "1-element", "(1, 1) float64", "larger", "view"])
def test_step_tensors_replaced(remade: Callable[[Tensor], Tensor]) -> None:
    def change(optimizer: Any, params: list[Any]) -> None:
        for p in params[1:]:
            optimizer.state[p]["step"] = remade(optimizer.state[p]["step"])

    survives(adam(), change)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_module_changes_its_dtype_over_old_state(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    models = [torch.nn.Linear(9, 5)]
    models.append(copy.deepcopy(models[0]))
    optimizers = [
        Adam(m.parameters(), lr=0.1, compiled=compiled) for m, compiled in zip(models, (False, True), strict=True)
    ]
    for step in range(4):
        if step == 2:
            for model, optimizer in zip(models, optimizers, strict=True):
                model.to(dtype)
                assert optimizer.state[model.weight]["exp_avg"].dtype == torch.float32
        x = torch.randn(4, 9).to(models[0].weight.dtype)
        for model, optimizer in zip(models, optimizers, strict=True):
            if step != 2:  # the gradients of before, converted with the module
                optimizer.zero_grad()
                model(x).square().sum().backward()
            optimizer.step()
    for expected, actual in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual, expected)
        for name in ("exp_avg", "exp_avg_sq"):
            theirs, ours = optimizers[0].state[expected][name], optimizers[1].state[actual][name]
            assert ours.dtype == theirs.dtype == torch.float32
            torch.testing.assert_close(ours, theirs)
    assert all(row.execution == "multi_tensor" for row in explain(optimizers[1]))


def test_a_freed_parameter_and_a_new_one_in_its_place() -> None:
    """Also where the new objects have the addresses of the old."""
    run = sgd()
    run.step(2)
    old = {id(p) for p in run.params[1]}
    for optimizer, params in zip(run.optimizers, run.params, strict=True):
        optimizer.state.clear()
        del optimizer.param_groups[0]["params"][:], params[:]
    gc.collect()
    many: list[Any] = []
    again: list[Any] = []
    while not again and len(many) < 1_000_000:  # few, unless other tests have left many holes to fill
        many.append(torch.nn.Parameter(torch.empty(0, dtype=torch.float64)))
        again += [p for p in many[-1:] if id(p) in old]
    assert again, "no address was used twice: the test shows nothing"
    for p in again:
        p.data = torch.randn(4, 3, dtype=torch.float64)
    run.params[1].extend(again)
    run.params[0].extend(parameter(p) for p in again)
    run.both(lambda optimizer, params: optimizer.param_groups[0]["params"].extend(params))
    run.step(2)
    run.compare()


@both_rules
def test_version_counters_move(rule: Any) -> None:
    run = rule()
    run.step()
    p = run.params[1][0]
    watched = [p, *run.ours.state[p].values()]
    before = [t._version for t in watched]
    gradient = p.grad._version
    run.ours.step()
    assert all(t._version > v for t, v in zip(watched, before, strict=True))
    assert p.grad._version == gradient


def test_backward_through_a_stepped_parameter_is_an_error() -> None:
    run = adam(tensors([(6, 6)]))
    for optimizer, (p,) in zip(run.optimizers, run.params, strict=True):
        p.grad = torch.ones_like(p)
        x = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
        loss = (x @ p).sum()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_parameter_that_is_a_view() -> None:
    """Its base has the new values, and its base's graphs know that they changed."""
    bases = tensors([(4, 6)]) * 2
    params = [bases[0].clone(), bases[1].clone()]
    views = [p[1:3].requires_grad_() for p in params]
    optimizers = [torch.optim.Adam([views[0]]), Adam([views[1]], compiled=True)]
    for base, view, optimizer in zip(params, views, optimizers, strict=True):
        x = torch.ones(4, 6, dtype=torch.float64, requires_grad=True)
        y = (x * base).sum()
        view.grad = torch.ones_like(view)
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()
    torch.testing.assert_close(params[1], params[0], rtol=1e-12, atol=1e-14)
    assert not torch.equal(params[1], bases[1])
    torch.testing.assert_close(params[1][[0, 3]], bases[1][[0, 3]], rtol=0, atol=0)


@pytest.mark.parametrize("compiled", [False, True, "foreach"])
def test_reading_makes_no_state(compiled: bool | str) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Adam([p], compiled=compiled)
    rows = list(explain(optimizer))
    assert [row.execution for row in rows] == ["eager"]
    assert rows[0].reason == ("no step was taken yet" if compiled else "compiled=False")
    assert optimizer.state_dict()["state"] == {}
    assert not optimizer.state
