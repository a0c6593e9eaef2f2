"""The interface of torch.optim.Optimizer: param groups, ``zero_grad``, the profiler and what ``step`` is."""

from __future__ import annotations

import gc
import types
import weakref
from typing import Any

import pytest
import torch
from beside_torch import assert_equal, both, executions, parameters, set_gradients, train
from cases import CLASSES, numbers_of, oracle, sample

from compiled_optim import Adam, AdamW, Optimizer, explain

every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)


# ---- param groups


@every_class
@both
def test_groups_have_options_of_their_own(cls: type[Optimizer], compiled: bool) -> None:
    """Every number differs, and so do the switches, so that there are two kernels."""
    torch.set_default_dtype(torch.float64)  # of it is what torch carries
    ours, stock = parameters(2)
    values = [{k: sample(k, field, fraction) for k, field in numbers_of(cls).items()} for fraction in (0.2, 0.4, 0.7)]
    values[1] = {"lr": values[1]["lr"], "maximize": True}

    def groups(params: list[Any]) -> list[dict[str, Any]]:
        return [{"params": [p], **options} for p, options in zip(params, values, strict=True)]

    mine = cls(groups(ours), compiled=compiled)
    theirs = oracle(cls)(groups(stock))
    for _ in range(10):
        train(1, (mine, ours), (theirs, stock))
        assert_equal(ours, stock)
    assert executions(mine) == ({"multi_tensor": ""} if compiled else {"eager": "compiled=False"})


@both
def test_options_of_groups_may_change_between_steps(compiled: bool) -> None:
    ours, stock = parameters(2)
    pair = [AdamW(ours, compiled=compiled), torch.optim.AdamW(stock)]
    for i in range(6):
        set_gradients(ours, stock)
        for optimizer in pair:
            optimizer.param_groups[0].update(lr=0.1 / (i + 1), betas=(0.1 * i, 0.9), weight_decay=0.1 * i, eps=10.0**-i)
            optimizer.step()
        assert_equal(ours, stock)
    assert len(explain(pair[0]).rebuilt) == int(compiled)


@both
def test_a_group_added_later(compiled: bool) -> None:
    ours, stock = parameters(2)
    pair = [AdamW(ours[:2], lr=0.1, compiled=compiled), torch.optim.AdamW(stock[:2], lr=0.1)]
    for i in range(6):
        if i == 3:
            pair[0].add_param_group({"params": ours[2:], "lr": 0.5})
            pair[1].add_param_group({"params": stock[2:], "lr": 0.5})
        set_gradients(ours, stock)
        for optimizer in pair:
            optimizer.step()
        assert_equal(ours, stock)
    assert [group["lr"] for group in pair[0].param_groups] == [0.1, 0.5]


@both
def test_named_parameters(compiled: bool) -> None:
    model = torch.nn.Linear(3, 2, dtype=torch.float64)
    optimizer = AdamW(model.named_parameters(), compiled=compiled)
    model(torch.ones(3, dtype=torch.float64)).sum().backward()
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["param_names"] == ["weight", "bias"]
    other = AdamW(list(torch.nn.Linear(3, 2, dtype=torch.float64).named_parameters()))
    other.load_state_dict(saved)
    assert other.param_groups[0]["param_names"] == ["weight", "bias"]
    grouped = AdamW([{"params": [("w", model.weight)]}, {"params": [("b", model.bias)], "lr": 1.0}])
    assert [group["param_names"] for group in grouped.param_groups] == [["w"], ["b"]]


def test_arguments_that_torch_refuses() -> None:
    p = parameters()[0]
    for make in (AdamW, torch.optim.AdamW):
        with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
            make([])
        with pytest.raises(TypeError, match="ordered collections"):
            make([{"params": {p}}])
        with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
            make(p)
        with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
            make([p * 2])
        with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
            make([{"params": [p]}, {"params": [p]}])
        with pytest.raises(TypeError, match="optimizer can only optimize Tensors"):
            make([3])
        with pytest.raises(UserWarning, match="duplicate parameters"):
            make([p, p])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_a_parameter_listed_twice_is_stepped_twice() -> None:
    ours, stock = parameters(2)
    mine, theirs = AdamW([ours[0], ours[0], ours[1]]), torch.optim.AdamW([stock[0], stock[0], stock[1]], foreach=False)
    for _ in range(3):
        set_gradients(ours, stock)
        mine.step()
        theirs.step()
        assert_equal(ours, stock)


@both
def test_an_empty_second_group(compiled: bool) -> None:
    ours, stock = parameters(2)
    pair = [
        AdamW([{"params": ours}, {"params": [], "weight_decay": 0.0}], compiled=compiled),
        torch.optim.AdamW([{"params": stock}, {"params": [], "weight_decay": 0.0}]),
    ]
    for _ in range(2):
        set_gradients(ours, stock)
        for optimizer in pair:
            optimizer.step()
    assert_equal(ours, stock)
    pair[0].load_state_dict(pair[1].state_dict())
    assert len(pair[0].state_dict()["param_groups"]) == 2


@both
def test_a_step_without_any_gradient_does_nothing(compiled: bool) -> None:
    ours = parameters()
    before = [p.detach().clone() for p in ours]
    optimizer = AdamW(ours, compiled=compiled)
    assert optimizer.step() is None
    assert_equal(ours, before)
    assert not optimizer.state


# ---- the rest of the interface


@both
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_zero_grad(compiled: bool, options: dict[str, Any]) -> None:
    params = parameters()
    optimizer = AdamW(params, compiled=compiled, **options)
    set_gradients(params)
    kept = [p.grad for p in params]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is g and not g.any() for p, g in zip(params, kept, strict=True))
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@both
def test_the_profiler_names_the_step(compiled: bool) -> None:
    params = parameters()
    set_gradients(params)
    optimizer = AdamW(params, compiled=compiled)
    with torch.autograd.profiler.profile() as record:
        optimizer.step()
    assert [e.name for e in record.function_events].count("Optimizer.step#AdamW.step") == 1
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        optimizer.step()
        optimizer.zero_grad()
    names = [e.key for e in trace.key_averages()]
    assert "Optimizer.step#AdamW.step" in names
    assert "Optimizer.zero_grad#AdamW.zero_grad" in names


@both
def test_step_is_an_ordinary_method(compiled: bool) -> None:
    params = parameters()
    optimizer = AdamW(params, compiled=compiled)
    assert isinstance(optimizer.step, types.MethodType)
    assert optimizer.step.__self__ is optimizer
    assert optimizer.step.__func__ is type(optimizer).step
    stock, calls = optimizer.step, []
    optimizer.step = lambda closure=None: (calls.append(1), stock(closure))[1]
    set_gradients(params)
    optimizer.step()
    assert calls == [1]
    assert optimizer.state[params[0]]["step"] == 1


@both
def test_an_optimizer_is_freed_with_its_last_reference(compiled: bool) -> None:
    params = parameters()
    set_gradients(params)
    optimizer = AdamW(params, compiled=compiled)
    optimizer.step()
    state = weakref.ref(optimizer.state[params[0]]["exp_avg"])
    reference = weakref.ref(optimizer)
    assert reference() is optimizer
    gc.disable()
    try:
        del optimizer
        assert reference() is None  # by reference counts: nothing of ours refers back to it
        assert state() is None
    finally:
        gc.enable()


@both
def test_foreach_false_and_gradients_are_never_written(compiled: bool) -> None:
    ours, stock = parameters(2)
    mine = Adam(ours, lr=0.1, weight_decay=0.1, maximize=True, foreach=False, compiled=compiled)
    theirs = torch.optim.Adam(stock, lr=0.1, weight_decay=0.1, maximize=True, foreach=False)
    for _ in range(3):
        set_gradients(ours, stock)
        versions = [p.grad._version for p in ours]
        mine.step()
        theirs.step()
        assert [p.grad._version for p in ours] == versions
        assert_equal([p.grad for p in ours], [p.grad for p in stock])
    assert_equal(ours, stock)


@both
def test_a_step_moves_the_version_of_what_it_writes(compiled: bool) -> None:
    """Or autograd would not notice that a saved tensor is stale."""
    params = parameters()
    set_gradients(params)
    optimizer = AdamW(params, compiled=compiled)
    optimizer.step()
    x = torch.ones(4, dtype=torch.float64, requires_grad=True)
    loss = (params[0] @ x).sum()
    versions = [p._version for p in params], optimizer.state[params[0]]["exp_avg"]._version
    optimizer.step()
    assert all(p._version > v for p, v in zip(params, versions[0], strict=True))
    assert optimizer.state[params[0]]["exp_avg"]._version > versions[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
