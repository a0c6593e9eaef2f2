"""What users, frameworks and other threads do to an optimizer between two of its steps, or during one."""

from __future__ import annotations

import copy
import fractions
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import tensors
from .subjects import Average, Closure, Subject

NUMBERS: list[Any] = [
    *(0.05, 0, 1, True, 1e-320, 1e308, math.nan, math.inf, -0.1, 10**400),
    *(np.float32(0.1), np.float64(0.1), np.int64(0), np.array(0.1), fractions.Fraction(1, 10)),
    *(torch.tensor(0.1), torch.tensor([0.1]), torch.tensor([0.1, 0.2])),
    *("0.1", None, 1j, [0.1]),
]
STATES: list[Any] = [3, 2.0, None, "x", True, [1.0], *map(torch.tensor, ([2.0], 3, -1.0, math.nan))]


# ---- of parameters


def parameter_moves(s: Subject) -> None:
    p = s.random.choice(s.params)
    x = tensors.values(s.random, tuple(p.shape), p.dtype)
    p.data = tensors.laid_out(x, s.random.choice(tensors.OWN_MEMORY)).detach()


def parameter_takes_memory_of_another(s: Subject) -> None:
    p, q = s.random.choice(s.params), s.random.choice(s.params)
    if p is not q and p.dtype == q.dtype and 0 < p.numel() <= q.numel() and q.is_contiguous():
        p.data = q.data.reshape(-1)[: p.numel()].view(p.shape)


def parameter_in_shared_memory(s: Subject) -> None:
    s.random.choice(s.params).data.share_memory_()


def parameter_dtype(s: Subject) -> None:
    p = s.random.choice(s.params)
    p.grad, p.data = None, p.data.to(s.random.choice([torch.float64, torch.float32, torch.bfloat16]))


def parameter_shape(s: Subject) -> None:
    p = s.random.choice(s.params)
    p.grad, p.data = None, tensors.values(s.random, s.random.choice(tensors.SHAPES), p.dtype)


def parameter_subclass(s: Subject) -> None:
    p = s.random.choice(s.params)
    p.data = p.data.clone().as_subclass(tensors.Subclass)


def parameter_conjugated(s: Subject) -> None:
    p = s.random.choice(s.params)
    if p.is_complex():
        p.data = p.data.conj()


def parameter_storage(s: Subject) -> None:
    """Torch itself may read what is no longer there: nothing is done after the step."""
    s.broken = True
    s.random.choice(s.params).untyped_storage().resize_(s.random.choice([0, 8]))


def requires_grad(s: Subject) -> None:
    p = s.random.choice(s.params)
    p.requires_grad_(not p.requires_grad)


def gradient_gone(s: Subject) -> None:
    s.random.choice(s.params).grad = None


# ---- of state


def _entry(s: Subject) -> tuple[dict[Any, Any], Any]:
    """A random entry of the state: the dict that holds it, and its key; or an entry of no state."""
    state = s.optimizer.state.get(s.random.choice(s.params))
    names = [k for k in state if k != "history"] if isinstance(state, dict) else []
    return (state, s.random.choice(names)) if names else ({"": None}, "")


def _change_tensor(s: Subject, change: Any) -> None:
    state, name = _entry(s)
    if isinstance(state[name], Tensor):
        state[name] = change(state[name].detach())


def state_copied(s: Subject) -> None:
    _change_tensor(s, Tensor.clone)


def state_layout(s: Subject) -> None:
    _change_tensor(s, lambda x: tensors.laid_out(tensors.plain(x), s.random.choice(tensors.OWN_MEMORY)).detach())


def state_dtype(s: Subject) -> None:
    _change_tensor(s, lambda x: x.to(s.random.choice([torch.float32, torch.float64, torch.bfloat16, torch.int64])))


def state_shape(s: Subject) -> None:
    _change_tensor(s, lambda x: torch.ones(s.random.choice(tensors.SHAPES), dtype=x.dtype))


def state_subclass(s: Subject) -> None:
    _change_tensor(s, lambda x: x.as_subclass(tensors.Subclass))


def state_on_meta(s: Subject) -> None:
    _change_tensor(s, lambda x: torch.empty_like(x, device="meta"))


def state_in_a_graph(s: Subject) -> None:
    _change_tensor(s, lambda x: x.clone().requires_grad_(x.is_floating_point()))


def state_storage(s: Subject) -> None:
    state, name = _entry(s)
    if isinstance(state[name], Tensor) and state[name].layout is torch.strided:
        s.broken = True
        state[name].untyped_storage().resize_(s.random.choice([0, 8]))


def state_number(s: Subject) -> None:
    state, name = _entry(s)
    state[name] = s.random.choice(STATES)


def state_extra(s: Subject) -> None:
    state = s.optimizer.state.get(s.random.choice(s.params))
    if isinstance(state, dict):
        state[s.random.choice(["extra", 5, "\udc80", None, (1, 2)])] = s.random.choice([1, torch.zeros(2), None])


def state_is_the_parameter(s: Subject) -> None:
    p = s.random.choice(s.params)
    state = s.optimizer.state.get(p)
    for name, value in state.items() if isinstance(state, dict) else ():
        if isinstance(value, Tensor) and (value.shape, value.dtype) == (p.shape, p.dtype) and p.dim():
            state[name] = p.detach()


def state_shared(s: Subject) -> None:
    p, q = s.random.choice(s.params), s.random.choice(s.params)
    state, other = s.optimizer.state.get(p), s.optimizer.state.get(q)
    if isinstance(state, dict) and isinstance(other, dict) and p.shape == q.shape and p.dtype == q.dtype:
        state.update({k: v for k, v in other.items() if k in state and k != "history"})


def state_key_gone(s: Subject) -> None:
    state, name = _entry(s)
    del state[name]


def state_gone(s: Subject) -> None:
    s.optimizer.state.pop(s.random.choice(s.params), None)


def all_state_gone(s: Subject) -> None:
    s.optimizer.state.clear()


# ---- of param groups


def _group(s: Subject) -> dict[str, Any]:
    group: dict[str, Any] = s.random.choice(s.optimizer.param_groups)
    return group


def list_copied(s: Subject) -> None:
    group = _group(s)
    group["params"] = s.random.choice([list, tuple])(group["params"])


def list_reversed(s: Subject) -> None:
    _group(s)["params"] = list(_group(s)["params"])[::-1] if len(s.optimizer.param_groups) == 1 else s.params[::-1]


def list_shorter(s: Subject) -> None:
    group = _group(s)
    group["params"] = list(group["params"])[1:]


def list_longer(s: Subject) -> None:
    s.params.append(s.new_parameter())
    group = _group(s)
    group["params"] = [*group["params"], s.params[-1]]


def listed_twice(s: Subject) -> None:
    group = _group(s)
    group["params"] = [*group["params"], *group["params"][:1]]


def group_added(s: Subject) -> None:
    s.params.append(s.new_parameter())
    s.optimizer.add_param_group({"params": [s.params[-1]], "lr": 0.02})


def groups_reversed(s: Subject) -> None:
    s.optimizer.param_groups.reverse()


def groups_copied(s: Subject) -> None:
    s.optimizer.param_groups[:] = [dict(group) for group in s.optimizer.param_groups]


def option(s: Subject) -> None:
    group = _group(s)
    fixed = {"params", "foreach", "fused", "differentiable", "capturable"}
    name = s.random.choice([k for k in group if k not in fixed])
    value, wild = group[name], s.random.random() < 0.5
    choices = NUMBERS if wild else [0.05, 0.5, 0.1]
    if isinstance(value, tuple):
        group[name] = tuple(s.random.choice(choices) for _ in value)
    elif not isinstance(value, bool):
        group[name] = s.random.choice(choices)


def option_flag(s: Subject) -> None:
    group = _group(s)
    names = [k for k, v in group.items() if isinstance(v, bool) and k in ("maximize", "amsgrad")]
    if names:
        name = s.random.choice(names)
        group[name] = not group[name]


def learning_rate(s: Subject) -> None:
    _group(s)["lr"] = s.random.choice([0.0, 1e-3, 0.05, torch.tensor(0.02, dtype=torch.float64)])


def reloaded(s: Subject) -> None:
    state = s.optimizer.state_dict()
    s.optimizer.load_state_dict(state if s.random.random() < 0.5 else copy.deepcopy(state))


def loaded_malformed(s: Subject) -> None:
    """It must be refused, or be loaded whole; `reloaded` says what is right."""
    try:
        checkpoint = copy.deepcopy(s.optimizer.state_dict())
    except KeyError:  # as torch.optim raises it for state of a parameter that is listed no more
        return
    states = [x for x in checkpoint["state"].values() if isinstance(x, dict) and x]
    change = s.random.randrange(4)
    if change == 0 and states:
        state = s.random.choice(states)
        state[s.random.choice(list(state))] = s.random.choice([*STATES, torch.zeros(2, 2)])
    elif change == 1:
        s.random.choice(checkpoint["param_groups"]).pop("lr")
    elif change == 2:
        checkpoint["param_groups"][0]["params"] = [*checkpoint["param_groups"][0]["params"], 99]
    else:
        checkpoint[s.random.choice(["state", "param_groups"])] = s.random.choice(["x", None, {}, []])
    before = s.snapshot()
    try:
        s.optimizer.load_state_dict(checkpoint)
    except Exception:
        if s.snapshot() != before:
            raise HalfLoadedError from None
        raise


class HalfLoadedError(Exception):
    """A checkpoint was refused, but something of it stayed."""


PARAMETERS = [parameter_moves, parameter_takes_memory_of_another, parameter_in_shared_memory, requires_grad]
STRANGE_PARAMETERS = [parameter_dtype, parameter_shape, parameter_subclass, parameter_conjugated, parameter_storage]
STATE = [state_copied, state_gone, all_state_gone, state_shared]
STRANGE_STATE = [
    *(state_layout, state_dtype, state_shape, state_subclass, state_on_meta, state_in_a_graph, state_storage),
    *(state_number, state_extra, state_is_the_parameter, state_key_gone),
]
LISTS = [list_copied, list_reversed, list_shorter, list_longer, group_added, groups_reversed, groups_copied]
# what needs a kernel that nothing else needs; lazily conjugated parameters; memory that is shared, or gone, where
# torch crashes too
HARSH = {
    *(parameter_dtype, state_dtype, option, option_flag, parameter_takes_memory_of_another),
    *(parameter_conjugated, state_shared, state_is_the_parameter, listed_twice, parameter_storage, state_storage),
}


def between(s: Subject, mild: bool) -> tuple[list[Any], list[Any]]:
    """The changes that are usual, and those that are not, for this subject."""
    if isinstance(s, Average):
        usual, strange = PARAMETERS, [parameter_dtype, parameter_shape, parameter_subclass, parameter_storage]
    elif isinstance(s, Closure):
        usual = [*PARAMETERS, *STATE, learning_rate, groups_copied, reloaded]
        strange = [*STRANGE_PARAMETERS, *STRANGE_STATE, option, option, option_flag, loaded_malformed]
        strange.remove(parameter_storage)  # the closure reads it
    else:
        usual = [*PARAMETERS, *STATE, *LISTS, gradient_gone, learning_rate, reloaded]
        strange = [*STRANGE_PARAMETERS, *STRANGE_STATE, option, option, option, option_flag]
        strange += [listed_twice, loaded_malformed]
    if s.reduces:  # torch writes the parameter or its state before it has read all of the other
        strange.remove(state_is_the_parameter)
    if mild:
        usual, strange = ([c for c in found if c not in HARSH] for found in (usual, strange))
    return usual, strange


DURING = [gradient_gone, parameter_moves, state_copied, all_state_gone, list_copied, list_reversed, list_shorter]


class Intruder(torch.Tensor):
    """A gradient whose operations change the optimizer that uses it, as another thread might."""

    change: Any = None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        change, Intruder.change = Intruder.change, None
        if change is not None:
            change()
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
