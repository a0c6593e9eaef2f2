"""Checkpoints and options that are not what they should be: what torch.optim takes is taken, the rest is named."""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from beside_torch import assert_equal, both, parameters, set_gradients, train
from cases import CLASSES, KINDS, oracle, tolerance
from frozen import assert_frozen, frozen, through_a_file
from torch import Tensor

from compiled_optim import SGD, Adagrad, Adam, AdamW, Optimizer, Rprop

Edit = Callable[[dict[str, Any]], Any]


def setting(*path: Any, to: Any) -> Edit:
    def edit(saved: dict[str, Any]) -> dict[str, Any]:
        inner: Any = saved
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = to
        return saved

    return edit


def without(*path: Any) -> Edit:
    def edit(saved: dict[str, Any]) -> dict[str, Any]:
        inner: Any = saved
        for key in path[:-1]:
            inner = inner[key]
        del inner[path[-1]]
        return saved

    return edit


group, state = ("param_groups", 0), ("state", 0)
REFUSED: dict[str, tuple[Edit, Any, str]] = {
    "None": (lambda saved: None, TypeError, "state_dict must be a dict .*got None"),
    "a list": (lambda saved: [1], TypeError, r"state_dict must be a dict .*got \[1\]"),
    "empty": (lambda saved: {}, KeyError, "must have 'state'"),
    "no groups": (without("param_groups"), KeyError, "must have 'param_groups'"),
    "groups of another number": (setting("param_groups", to=[]), ValueError, "different number of parameter groups"),
    "groups that are no list": (setting("param_groups", to=3), TypeError, "'param_groups' must be a list"),
    "a group that is no dict": (setting(*group, to=3), TypeError, "param group 0 .*must be a dict, got 3"),
    "a group without params": (without(*group, "params"), KeyError, "param group 0 .*must have 'params'"),
    "params that are no list": (setting(*group, "params", to=None), TypeError, "'params', got None"),
    "fewer params": (lambda saved: (saved["param_groups"][0]["params"].pop(), saved)[1], ValueError, "size"),
    "state that is a list": (setting("state", to=[]), TypeError, r"'state' must be a dict of dicts, got \[\]"),
    "state of None": (setting(*state, to=None), TypeError, "'state' of parameter 0 must be a dict, got None"),
    "state of a list": (setting(*state, to=[1]), TypeError, r"'state' of parameter 0 must be a dict, got \[1\]"),
    "state of a tensor": (setting(*state, to=torch.ones(2)), TypeError, "'state' of parameter 0 .*got a tensor"),
    "text for a step": (
        setting(*state, "step", to="abc"),
        TypeError,
        "Adam: state 'step' of parameter 0 must .*got 'abc'",
    ),
    "a list for a step": (setting(*state, "step", to=[1]), TypeError, r"Adam: state 'step' .*index 0"),
    "a huge step": (setting(*state, "step", to=10**400), TypeError, "Adam: state 'step' .*got an int of 1329 bits"),
    "two steps": (setting(*state, "step", to=torch.ones(2)), TypeError, r"Adam: state 'step' .*shape \(2,\)"),
    "no step at all": (setting(*state, "step", to=torch.ones(0)), TypeError, r"Adam: state 'step' .*shape \(0,\)"),
    "a complex step": (setting(*state, "step", to=torch.tensor(1j)), TypeError, "Adam: state 'step' .*complex64"),
    "a step of no value": (setting(*state, "step", to=torch.tensor(1.0, device="meta")), TypeError, "'step' .*on meta"),
    "an array": (setting(*state, "exp_avg", to=np.zeros((3, 4))), TypeError, "state 'exp_avg' of parameter 0 must be"),
    "text for a tensor lr": (setting(*group, "lr", to="0.1"), TypeError, "Adam: lr must be at least 0, got '0.1'"),
    "None for a tensor lr": (setting(*group, "lr", to=None), TypeError, "Adam: lr must be at least 0, got None"),
    "two for a tensor lr": (setting(*group, "lr", to=torch.ones(2)), ValueError, r"Adam: lr .*shape \(2,\)"),
}


@both
@pytest.mark.parametrize(("edit", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_a_checkpoint_that_is_refused_changes_nothing(edit: Edit, error: Any, message: str, compiled: bool) -> None:
    params = parameters()
    lr = torch.tensor(0.5)
    optimizer = Adam(params, lr=lr, compiled=compiled)
    train(2, (optimizer, params))
    saved = copy.deepcopy(optimizer.state_dict())
    before, groups, tensors = frozen(optimizer, params), optimizer.param_groups, optimizer.state[params[0]]
    options = {k: v for k, v in groups[0].items() if k != "params"}
    saved["param_groups"][0]["lr"] = 0.25
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(edit(saved))
    assert_frozen(optimizer, params, before)
    assert optimizer.param_groups is groups
    assert optimizer.state[params[0]] is tensors
    assert {k: v for k, v in groups[0].items() if k != "params"} == options
    assert lr.item() == 0.5
    train(1, (optimizer, params))


def test_a_hook_that_raises_after_loading_changes_nothing() -> None:
    params = parameters()
    optimizer = Adam(params, lr=torch.tensor(0.5))
    train(2, (optimizer, params))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"].fill_(0.25)
    train(1, (optimizer, params))

    def hook(_: Any) -> None:
        raise KeyboardInterrupt

    optimizer.register_load_state_dict_post_hook(hook)
    before = frozen(optimizer, params)
    with pytest.raises(KeyboardInterrupt):
        optimizer.load_state_dict(saved)
    assert_frozen(optimizer, params, before)
    assert optimizer.param_groups[0]["lr"].item() == 0.5


@both
@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
def test_a_part_of_the_state_that_is_missing(name: str, compiled: bool) -> None:
    params = parameters()
    optimizer = Adam(params, compiled=compiled)
    train(2, (optimizer, params))
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["state"][1][name]
    optimizer.load_state_dict(saved)
    before = frozen(optimizer, params)
    with pytest.raises(KeyError, match=f"Adam: state '{name}' .*shape .*5, 2.* at index 1 .* is missing"):
        optimizer.step()
    assert_frozen(optimizer, params, before)


def test_add_param_group_that_raises_adds_none() -> None:
    params = parameters()
    optimizer = Adam(params[:2])

    class Unsized(list[float]):
        def __iter__(self) -> Any:
            raise ArithmeticError("planted")

    for new, error in (({"params": params[2:], "betas": Unsized([0.9, 0.99])}, ArithmeticError),
                       ({"params": params[:1]}, ValueError), ({"params": [3]}, TypeError)):  # fmt: skip
        with pytest.raises(error):
            optimizer.add_param_group(new)
        assert len(optimizer.param_groups) == 1


# ---- step counts in other forms

COUNTED = [cls for cls in KINDS if cls.rule.declaration.counts and cls.accepts_dense]
COUNTS: dict[str, Callable[[Tensor], Any]] = {
    "int": int,
    "float": float,
    "bool": lambda t: True,
    "int64": Tensor.long,
    "int32": Tensor.int,
    "float64": Tensor.double,
    "bfloat16": Tensor.bfloat16,
    "float16": Tensor.half,
    "one element": lambda t: t.reshape(1),
    "numpy": lambda t: np.float32(t.item()),
}


@both
@pytest.mark.parametrize("loaded", [True, False], ids=["loaded", "assigned"])
@pytest.mark.parametrize("form", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("cls", COUNTED, ids=lambda cls: cls.__name__)
def test_step_counts_in_other_forms(cls: Any, form: Callable[[Tensor], Any], loaded: bool, compiled: bool) -> None:
    ours, same = parameters(2)
    mine, reference = cls(ours, compiled=compiled), oracle(cls)(same)
    train(1, (mine, ours), (reference, same))
    if loaded:
        saved = copy.deepcopy(mine.state_dict())
        saved["state"][1]["step"] = form(saved["state"][1]["step"])
        mine.load_state_dict(saved)
    else:
        mine.state[ours[1]]["step"] = form(mine.state[ours[1]]["step"])
    train(3, (mine, ours), (reference, same))
    assert_equal(ours, same, max(1e-9, tolerance(cls)))
    assert [float(mine.state[p]["step"]) for p in ours] == [4, 4, 4]


# ---- options

WRONG: list[tuple[str, Any]] = [
    *(("lr", v) for v in ("0.1", None, [0.1, 0.2], torch.ones(2), 1j, 10**400, np.ones(2), {})),
    *(("betas", v) for v in (0.9, (0.9,), (0.9, 0.9, 0.9), (0.9, "x"), "ab", None, (0.9, 1j), (10**400, 0.9))),
    *(("eps", v) for v in (None, "x", torch.ones(2))),
    *(("weight_decay", v) for v in ([1, 2], "0.01", None)),
]


@both
@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_a_wrong_option_is_named_and_changes_nothing(name: str, value: Any, compiled: bool) -> None:
    params = parameters()
    with pytest.raises((TypeError, ValueError), match=f"Adam: {name.removesuffix('s')}"):
        Adam(params, **{name: value})
    optimizer = Adam(params, compiled=compiled)
    train(2, (optimizer, params))
    before = frozen(optimizer, params)
    right = optimizer.param_groups[0][name]
    optimizer.param_groups[0][name] = value
    for _ in range(2):
        with pytest.raises((TypeError, ValueError), match=f"Adam: {name.removesuffix('s')}"):
            optimizer.step()
        assert_frozen(optimizer, params, before)
    optimizer.param_groups[0][name] = right
    train(1, (optimizer, params))


@both
@pytest.mark.parametrize(("name", "value"), [*WRONG, ("betas", (1.0, 0.9))], ids=str)
def test_a_wrong_option_of_a_group_that_is_not_updated(name: str, value: Any, compiled: bool) -> None:
    """Is not looked at, as in torch.optim: set before the first step, or after."""
    for early in (False, True):
        ours, stock = parameters(2)
        pair = (Adam([{"params": ours[:1]}, {"params": ours[1:]}], compiled=compiled), torch.optim.Adam(stock[:1]))
        for i in range(4):
            set_gradients(ours, stock)
            ours[0].grad = stock[0].grad
            if i >= 2 or early:
                pair[0].param_groups[1][name] = value
                for p in ours[1:]:
                    p.grad = None
            for optimizer in pair:
                optimizer.step()
            assert_equal(ours[:1], stock[:1])


@both
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_step_without_gradients_evaluates_nothing(cls: type[Optimizer], compiled: bool) -> None:
    params = parameters()
    optimizer = cls(params, compiled=compiled)
    for name in optimizer.rule.declaration.options:
        optimizer.param_groups[0][name] = "x"
    optimizer.step()
    for name in ("betas", "momentum_decay"):
        optimizer.param_groups[0][name] = (1.0, 1.0)
    optimizer.step()


class ListConfig(collections.abc.Sequence[Any]):
    """As a configuration library has it: no list, and no tuple."""

    def __init__(self, values: Any) -> None:
        self.values = values

    def __getitem__(self, i: Any) -> Any:
        return self.values[i]

    def __len__(self) -> int:
        return len(self.values)


@both
@pytest.mark.parametrize("make", [list, ListConfig, np.array, lambda v: np.array(v, "f4"), torch.tensor, tuple])
def test_tuples_as_any_sequence(make: Callable[[list[float]], Any], compiled: bool) -> None:
    for cls, name, values in ((AdamW, "betas", [0.75, 0.875]), (Rprop, "etas", [0.5, 1.25])):
        ours, stock = parameters(2)
        theirs = oracle(cls)(stock, **{name: tuple(values)})
        steps = []
        steps.append(cls(ours, **{name: make(values)}, compiled=compiled))
        steps.append(cls([{"params": ours, name: make(values)}], compiled=compiled))
        steps.append(cls(ours, compiled=compiled))
        steps[-1].param_groups[0][name] = make(values)
        steps.append(cls(ours[:1], compiled=compiled))
        steps[-1].add_param_group({"params": ours[1:], name: make(values)})
        steps[-1].param_groups[0][name] = make(values)
        for mine in steps:
            start = [p.detach().clone() for p in ours]
            torch.nn.utils.vector_to_parameters(torch.nn.utils.parameters_to_vector(ours), stock)
            theirs.state.clear()
            train(2, (mine, ours), (theirs, stock))
            assert_equal(ours, stock)
            assert not all(torch.equal(p, q) for p, q in zip(ours, start, strict=True))
            saved = through_a_file(mine.state_dict())
            assert all(list(map(float, g[name])) == values for g in saved["param_groups"])


@both
def test_numbers_of_other_types(compiled: bool) -> None:
    for value in (np.float64(0.25), np.float32(0.25), Fraction(1, 4), np.array(0.25), np.array([0.25])[0]):
        ours, stock = parameters(2)
        mine, theirs = SGD(ours, compiled=compiled), torch.optim.SGD(stock, lr=0.25)
        mine.param_groups[0]["lr"] = value
        train(2, (mine, ours), (theirs, stock))
        assert_equal(ours, stock)
        assert through_a_file(mine.state_dict())["param_groups"][0]["lr"] == 0.25


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_an_option_that_is_missing_is_named(compiled: bool) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Adam([p], compiled=compiled)
    p.grad = torch.ones(3)
    optimizer.step()
    before = p.tolist()
    del optimizer.param_groups[0]["eps"]
    with pytest.raises(KeyError, match=r"Adam: a param group must have .*eps.*, got .*betas"):
        optimizer.step()
    assert p.tolist() == before
    assert optimizer.state[p]["step"] == 1


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_state_that_was_taken_away_begins_as_the_constructor_said(compiled: bool) -> None:
    """As in torch.optim, where an initial value in a param group counts for nothing."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = Adagrad([p], initial_accumulator_value=0.5, compiled=compiled)
    optimizer.param_groups[0]["initial_accumulator_value"] = 9.0
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.state.clear()
    optimizer.step()
    assert optimizer.state[p]["sum"].tolist() == [1.5] * 3
