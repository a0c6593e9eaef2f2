"""``swap_in_optimizer_params_and_state``: a step on other parameters, which leaves the optimizer's own alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from beside_torch import MATRICES, assert_equal, both, parameter, set_gradients, tensors, train
from cases import CLASSES, KINDS, rich_options
from minimizing import Run, initial, network
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from compiled_optim import LBFGS, Adam, AdamW, Optimizer, swap_in_optimizer_params_and_state
from compiled_optim.lr_scheduler import ExponentialLR

STOCK = getattr(torch.optim, "swap_in_optimizer_params_and_state", None)  # since torch 2.13


def stepped(cls: type[Optimizer], **options: Any) -> tuple[list[Any], Any, dict[str, Any]]:
    """Parameters and an optimizer that has stepped; with what it would save."""
    params = [parameter(v) for v in tensors(MATRICES)]
    optimizer = cls(params, **options)
    train(2, (optimizer, params))
    return params, optimizer, copy.deepcopy(optimizer.state_dict())


def named(params: list[Any]) -> dict[str, Any]:
    return {str(i): p for i, p in enumerate(params)}


@both
@pytest.mark.parametrize("cls", [cls for cls in KINDS if cls.elementwise], ids=lambda c: c.__name__)
def test_a_step_inside_is_one_of_the_others_and_changes_nothing_outside(cls: type[Optimizer], compiled: bool) -> None:
    options = rich_options(cls)
    params, optimizer, saved = stepped(cls, **options, compiled=compiled)
    others = [parameter(p) for p in params]
    twins = [parameter(p) for p in params]
    twin = cls(twins, **options)
    twin.load_state_dict(copy.deepcopy(saved))
    saved["param_groups"][0]["lr"] = twin.param_groups[0]["lr"] = 0.5
    before, state, groups = [p.detach().clone() for p in params], optimizer.state, [*optimizer.param_groups]
    listed, rate = groups[0]["params"], groups[0]["lr"]
    with swap_in_optimizer_params_and_state(optimizer, named(others), saved):
        assert optimizer.param_groups[0]["params"] == others
        train(2, (optimizer, others), (twin, twins))
    assert_equal(others, twins)
    assert_equal(params, before)
    assert optimizer.state is state
    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
    assert groups[0]["params"] is listed
    assert groups[0]["lr"] == rate
    with torch.no_grad():  # the next step is one of its own again
        torch._foreach_copy_(twins, params)
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(1, (optimizer, params), (twin, twins))
    assert_equal(params, twins)


def test_an_attached_schedule_stays_where_it_is() -> None:
    params, optimizer, saved = stepped(AdamW)
    schedule = ExponentialLR(optimizer, 0.5)
    optimizer.attach(schedule)
    saved = copy.deepcopy(optimizer.state_dict())
    others = [parameter(p) for p in params]
    with swap_in_optimizer_params_and_state(optimizer, named(others), saved):
        train(3, (optimizer, others))
    assert schedule.last_epoch == 0
    train(1, (optimizer, params))
    assert (schedule.last_epoch, optimizer.param_groups[0]["lr"]) == (1, 0.0005)


def test_lbfgs_steps_on_what_was_swapped_in() -> None:
    values = initial(network)
    run, other = (Run(network, values, lambda params: LBFGS(params, lr=0.3, max_iter=3)) for _ in range(2))
    run.step(2)
    other.step(2)
    before = [p.clone() for p in run.values]
    inside = Run(network, run.values, lambda params: run.optimizer)
    saved = run.optimizer.state_dict()
    with swap_in_optimizer_params_and_state(run.optimizer, named(inside.params), saved):
        run.optimizer.step(inside.closure)
    other.step()
    assert_equal(inside.values, other.values)
    assert_equal(run.values, before)
    assert run.step() == [other.loss(*before).item()]


@pytest.mark.parametrize("options", [{}, {"compiled": True}, {"compiled": "foreach"}, {"ema_decay": 0.5}], ids=str)
def test_a_step_on_fake_tensors_is_traced(options: dict[str, Any]) -> None:
    """The graph does what a step does, for real tensors. Nothing is told: no kernel was asked for inside."""
    check_trace(AdamW, options)


def needs_no_number(cls: type[Optimizer]) -> bool:
    """Whether the update is a function of tensors, without a look at the step count."""
    return "capturable" in cls.rule.declaration.options or not cls.rule.declaration.counts


@pytest.mark.parametrize("cls", [*filter(needs_no_number, CLASSES)], ids=lambda c: c.__name__)
def test_a_step_of_each_algorithm_is_traced(cls: type[Optimizer]) -> None:
    rate = {"lr": torch.tensor(0.25)} if not cls.rule.declaration.counts else {}
    check_trace(cls, {"momentum": 0.5, **rate} if cls.__name__ == "SGD" else rate)


def test_a_norm_of_fake_tensors_is_refused() -> None:
    with pytest.raises(RuntimeError, match="max_grad_norm and skip_nonfinite need gradients that can be read"):
        check_trace(AdamW, {"max_grad_norm": 1.0, "compiled": True})


def check_trace(cls: type[Optimizer], options: dict[str, Any]) -> None:
    params, optimizer, saved = stepped(cls, **options)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    grads = tensors(MATRICES)

    def fake(values: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, mode.from_tensor, values)

    def step(params: dict[str, Any], grads: list[Any], saved: dict[str, Any]) -> Any:
        for p, grad in zip(params.values(), grads, strict=True):
            p.grad = grad
        with swap_in_optimizer_params_and_state(optimizer, params, saved):
            optimizer.step()
        return params, saved

    with torch.no_grad():
        traced = make_fx(step)(fake(named([p.detach() for p in params])), fake(grads), fake(saved))
    others = [p.detach().clone() for p in params]
    with torch.no_grad():
        traced(named(others), grads, saved)
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    optimizer.step()
    assert_equal(others, params, 1e-6)  # step counts are of float32, and so is what is computed of them


WRONG: dict[str, tuple[Any, str]] = {
    "no dict": (lambda saved: [saved], "must be a dict as state_dict\\(\\) returns it, got list"),
    "no state": (lambda saved: {"param_groups": []}, "must have a dict 'state' and a list 'param_groups'"),
    "more groups": (
        lambda saved: {**saved, "param_groups": saved["param_groups"] * 2},
        "'param_groups' must be 1, as in the optimizer, got 2",
    ),
    "tensors for numbers": (
        lambda saved: {**saved, "param_groups": [{**saved["param_groups"][0], "params": [torch.ones(1)] * 3}]},
        "param group 0 must be a dict with a list of numbers as 'params'",
    ),
    "fewer parameters": (
        lambda saved: {**saved, "param_groups": [{**saved["param_groups"][0], "params": [0]}]},
        "param group 0 must have 3 parameters, got 1",
    ),
    "another option": (
        lambda saved: {**saved, "param_groups": [{**saved["param_groups"][0], "rate": 1}]},
        r"param group 0 must have the live options, got \[\] missing, \['rate'\] unexpected",
    ),
    "state of nobody": (
        lambda saved: {**saved, "state": {7: {}}},
        "a dict for each number in 'params', got dict for 7",
    ),
    "no state dict": (
        lambda saved: {**saved, "state": {0: 1.0}},
        "a dict for each number in 'params', got float for 0",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name: str) -> None:
    params, optimizer, saved = stepped(Adam)
    change, message = WRONG[name]
    refuse(optimizer, named(params), change(saved), message)
    refuse(optimizer, named(params[:2]), saved, "swapin_parameters must be as many as the optimizer has, got 2")
    refuse(Adam(params), named(params), saved, "the optimizer must have state, got one that has not stepped yet")


def refuse(optimizer: Any, params: dict[str, Any], saved: Any, message: str) -> None:
    """Refuses with this message, where torch refuses too."""
    with pytest.raises(RuntimeError, match=message), swap_in_optimizer_params_and_state(optimizer, params, saved):
        raise AssertionError("it went in")
    if STOCK is not None:
        with pytest.raises(RuntimeError), STOCK(optimizer, params, saved):
            raise AssertionError("it went in")


def test_a_step_that_raises_inside_leaves_the_optimizer_as_it_was() -> None:
    params, optimizer, saved = stepped(Adam)
    others = [parameter(p) for p in params]
    set_gradients(others)
    saved["state"][1]["exp_avg"] = torch.zeros(1)
    state = optimizer.state
    inside = swap_in_optimizer_params_and_state(optimizer, named(others), saved)
    with pytest.raises(RuntimeError, match="must have its shape"), inside:
        optimizer.step()
    assert optimizer.state is state
    assert optimizer.param_groups[0]["params"] == params
    assert_equal(others, params)
