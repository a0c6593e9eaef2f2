"""Each change that a user can make between two steps, to an optimizer with each kind of state and to a reference."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from beside_torch import Lockstep, parameter, tensors
from cases import CLASSES, KINDS, filled, fitted, numbers_of, oracle, rich_options, taken, tolerance
from torch import Tensor

from compiled_optim import SGD, AdamW, algorithms

SHAPES: list[tuple[int, ...]] = [(5, 7), (3, 4, 2, 2), (), (131,)]
Change = Callable[[Any, list[Any]], None]


def rich(cls: Any, initial: list[Tensor]) -> Lockstep:
    """With all switches on, and so with all the state there can be."""
    torch.set_default_dtype(torch.float64)  # of it is what torch carries from step to step
    options = rich_options(cls)
    # where torch.optim makes state at construction it raises later if there is none: then ours, eager, is the reference
    reference = cls if cls.state_at_construction else oracle(cls)
    return Lockstep(
        lambda params: reference(params, **options),
        lambda params: cls(params, **options, compiled=True),
        [fitted(cls, t) for t in initial],
    )


def seeded(change: Change) -> Change:
    """Both sides draw the same random numbers."""

    def action(optimizer: Any, params: list[Any]) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            change(optimizer, params)

    return action


def swap_data(_: Any, params: list[Any]) -> None:
    for p in params:
        p.data = torch.randn_like(p.data)


def replace_state_tensors(optimizer: Any, params: list[Any]) -> None:
    for name, value in optimizer.state[params[0]].items():
        # RMSprop subtracts the square of another average from one of squares
        more = 1.0 if name == "square_avg" else 0.0
        optimizer.state[params[0]][name] = copy.copy(value) if name == "step" else torch.rand_like(value) + more


def replace_dictionary(optimizer: Any, params: list[Any]) -> None:
    state = optimizer.state[params[1]]  # equal but for the order of its keys
    optimizer.state[params[1]] = {k: copy.deepcopy(state[k]) for k in sorted(state, reverse=True)}


def add_keys(optimizer: Any, params: list[Any]) -> None:
    for p in params[::2]:
        optimizer.state[p]["of_the_user"] = torch.zeros(2)


def remove_one_state(optimizer: Any, params: list[Any]) -> None:
    del optimizer.state[params[1]]


def clear_one_state(optimizer: Any, params: list[Any]) -> None:
    optimizer.state[params[1]].clear()


def clear_state(optimizer: Any, _: list[Any]) -> None:
    optimizer.state.clear()


def replace_state(optimizer: Any, _: list[Any]) -> None:
    optimizer.state = defaultdict(dict, copy.copy(optimizer.state))


def replace_state_by_nothing(optimizer: Any, _: list[Any]) -> None:
    optimizer.state = defaultdict(dict)


def reorder_state(optimizer: Any, params: list[Any]) -> None:
    optimizer.state[params[0]] = optimizer.state.pop(params[0])


def foreign_state(optimizer: Any, _: list[Any]) -> None:
    optimizer.state["of the user"] = {"exp_avg": 1}


def replace_parameter(optimizer: Any, params: list[Any]) -> None:
    params[1] = optimizer.param_groups[0]["params"][1] = parameter(torch.randn(6, 2, dtype=torch.float64))


def exchange_parameters(optimizer: Any, _: list[Any]) -> None:
    listed = optimizer.param_groups[0]["params"]
    listed[0], listed[3] = listed[3], listed[0]


def shorter_list(optimizer: Any, params: list[Any]) -> None:
    optimizer.param_groups[0]["params"] = params[:2]


def same_in_a_tuple(optimizer: Any, params: list[Any]) -> None:
    optimizer.param_groups[0]["params"] = tuple(params)


def replace_group(optimizer: Any, _: list[Any]) -> None:
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "lr": 0.5}


def replace_groups(optimizer: Any, params: list[Any]) -> None:
    group, *_ = optimizer.param_groups
    optimizer.param_groups = [{**group, "params": params[2:], "lr": 0.2}, {**group, "params": params[:2]}]


def add_group(optimizer: Any, params: list[Any]) -> None:
    params += [parameter(fitted(type(optimizer), t)) for t in tensors([(4, 4), ()])]
    optimizer.add_param_group({"params": params[-2:], "lr": 0.3})


def ours(optimizer: Any) -> Any:
    """Our class, for that of torch too."""
    return getattr(algorithms, type(optimizer).__name__)


def change_values(optimizer: Any, _: list[Any]) -> None:
    eps = numbers_of(ours(optimizer)).get("eps")
    optimizer.param_groups[0].update(lr=0.7, **({} if eps is None else {"eps": filled(eps, 0.3)}))


def change_a_switch(optimizer: Any, _: list[Any]) -> None:
    group = optimizer.param_groups[0]
    switch = "maximize" if "maximize" in group else next(k for k, v in group.items() if isinstance(v, bool))
    group[switch] = not group[switch]


def load_other_state(optimizer: Any, params: list[Any]) -> None:
    donor = oracle(type(optimizer))([parameter(torch.randn_like(p)) for p in params], lr=0.05)
    for _ in range(3):
        for p in donor.param_groups[0]["params"]:
            p.grad = taken(type(donor), torch.randn_like(p))
        donor.step()
    optimizer.load_state_dict(donor.state_dict())


def load_own_state(optimizer: Any, _: list[Any]) -> None:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


CHANGES = [
    swap_data,
    replace_state_tensors,
    replace_dictionary,
    add_keys,
    remove_one_state,
    clear_one_state,
    clear_state,
    replace_state,
    replace_state_by_nothing,
    reorder_state,
    foreign_state,
    replace_parameter,
    exchange_parameters,
    shorter_list,
    same_in_a_tuple,
    replace_group,
    replace_groups,
    add_group,
    change_values,
    change_a_switch,
    load_other_state,
    load_own_state,
]


@pytest.mark.parametrize("cls", KINDS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("shapes", [SHAPES, [(5, 7)] * 4], ids=["shapes", "one shape"])  # equal ones hide a mix-up
@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_change_between_steps(change: Change, shapes: list[tuple[int, ...]], cls: Any) -> None:
    run = rich(cls, tensors(shapes))
    run.step(2)
    run.both(seeded(change))
    run.step(2)
    run.compare(tolerance(cls))


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_several_changes_at_once(cls: Any) -> None:
    run = rich(cls, tensors(SHAPES))
    run.step()
    changes = [load_other_state, load_own_state, replace_parameter, swap_data, add_group, clear_one_state, add_keys]
    for change in (*changes, remove_one_state, exchange_parameters, reorder_state, clear_state):
        run.both(seeded(change))
        run.step()
        run.compare(tolerance(cls))


class Intruder(Tensor):
    """A gradient that runs something when it is first looked at."""

    change: Any = None

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        change, cls.change = cls.change, None
        if change is not None:
            change()
        return super().__torch_function__(function, types, args, kwargs or {})


def test_a_gradient_that_shortens_a_param_group_does_not_mislead_the_next_step() -> None:
    p, q, r = parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = AdamW([{"params": [p, q]}, {"params": [r]}])
    for one in parameters:
        one.grad = torch.ones(3)
    optimizer.step()
    q.grad = torch.ones(3).as_subclass(Intruder)
    Intruder.change = lambda: optimizer.param_groups[0]["params"].pop()
    optimizer.step()
    optimizer.step()
    assert torch.equal(p, r)
    assert not torch.equal(p, q)


def test_a_gradient_that_moves_a_parameter_to_another_param_group_does_not_mislead_the_next_step() -> None:
    p, q, r = parameters = [torch.nn.Parameter(torch.zeros(3)) for _ in range(3)]
    optimizer = SGD([{"params": [p, q], "lr": 1.0}, {"params": [r], "lr": 8.0}])
    for one in parameters:
        one.grad = torch.ones(3)
    q.grad = torch.ones(3).as_subclass(Intruder)

    def move() -> None:
        first, second = (group["params"] for group in optimizer.param_groups)
        second.insert(0, first.pop(0))
        q.grad = torch.ones(3)

    Intruder.change = move
    optimizer.step()
    before = [one.detach().clone() for one in parameters]
    optimizer.step()
    steps = [(b - one.detach())[0].item() for b, one in zip(before, parameters, strict=True)]
    assert steps == [8.0, 1.0, 8.0]
