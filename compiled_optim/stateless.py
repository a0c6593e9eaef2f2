"""A step on other parameters and another state than an optimizer's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def swap_in_optimizer_params_and_state(
    optimizer: torch.optim.Optimizer, swapin_parameters: dict[str, Tensor], swapin_optim_state: dict[str, Any]
) -> Iterator[None]:
    """Puts other parameters, state and options into an optimizer, and its own back at the end of the context.

    torch.optim has this since torch 2.13. ``step`` and hooks see what was put in, so that a step can be traced or tried
    out. A compiled optimizer updates fake tensors eagerly.

    Args:
        optimizer: any, with state.
        swapin_parameters: the parameters by name, in the order in which the param groups list theirs.
        swapin_optim_state: as ``state_dict()`` returns it, with as many groups and parameters, and the same options, as
            the optimizer has. Its tensors are written in place, so copy what is the optimizer's own; state that a step
            makes or replaces is dropped. An attached schedule does not move.

    Raises:
        RuntimeError: for state that does not fit the optimizer, and for an optimizer without state.

    Example:
        >>> import torch
        >>> from compiled_optim import SGD, swap_in_optimizer_params_and_state
        >>> weight, other = torch.nn.Parameter(torch.ones(1)), torch.zeros(1)
        >>> optimizer = SGD([weight], lr=1.0, momentum=0.5)
        >>> weight.grad = other.grad = torch.ones(1)
        >>> optimizer.step()
        >>> with swap_in_optimizer_params_and_state(optimizer, {"weight": other}, optimizer.state_dict()):
        ...     optimizer.step()
        >>> weight.item(), other.item(), optimizer.state[weight]["momentum_buffer"].item()
        (0.0, -1.5, 1.5)
    """
    params = _checked(optimizer, [*swapin_parameters.values()], swapin_optim_state)
    live_state, live_groups = optimizer.state, [dict(group) for group in optimizer.param_groups]
    attached = vars(optimizer).pop("_attached", None)
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    try:
        for group, saved, own in zip(optimizer.param_groups, swapin_optim_state["param_groups"], params, strict=True):
            group.update(saved, params=own)
            for p, number in zip(own, saved["params"], strict=True):
                state[p] = dict(swapin_optim_state["state"].get(number, {}))
        optimizer.state = state
        yield
    finally:
        for group, live in zip(optimizer.param_groups, live_groups, strict=True):
            group.clear()
            group.update(live)
        optimizer.state = live_state
        if attached is not None:
            vars(optimizer)["_attached"] = attached


def _checked(optimizer: torch.optim.Optimizer, params: list[Tensor], given: Any) -> list[list[Tensor]]:
    """The parameters of each param group."""
    if not optimizer.state:
        raise _wrong("the optimizer must have state, got one that has not stepped yet")
    if not isinstance(given, Mapping):
        raise _wrong(f"swapin_optim_state must be a dict as state_dict() returns it, got {type(given).__name__}")
    state, groups = given.get("state"), given.get("param_groups")
    if not isinstance(state, Mapping) or not isinstance(groups, list):
        kinds = f"{type(state).__name__} and {type(groups).__name__}"
        raise _wrong(f"swapin_optim_state must have a dict 'state' and a list 'param_groups', got {kinds}")
    if len(groups) != len(optimizer.param_groups):
        raise _wrong(f"'param_groups' must be {len(optimizer.param_groups)}, as in the optimizer, got {len(groups)}")
    split: list[list[Tensor]] = []
    numbers: set[Any] = set()
    for i, (live, group) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        own = group.get("params") if isinstance(group, Mapping) else None
        if not isinstance(own, list) or not all(isinstance(number, int) for number in own):
            raise _wrong(f"param group {i} must be a dict with a list of numbers as 'params', got {own!r}")
        if len(own) != len(live["params"]):
            raise _wrong(f"param group {i} must have {len(live['params'])} parameters, got {len(own)}")
        if group.keys() != live.keys():
            missing, unexpected = [*(live.keys() - group.keys())], [*(group.keys() - live.keys())]
            raise _wrong(f"param group {i} must have the live options, got {missing} missing, {unexpected} unexpected")
        begin = sum(map(len, split))
        split.append(params[begin : begin + len(own)])
        if len(split[-1]) < len(own):
            raise _wrong(f"swapin_parameters must be as many as the optimizer has, got {len(params)}")
        numbers.update(own)
    for number, values in state.items():
        if number not in numbers or not isinstance(values, Mapping):
            raise _wrong(
                f"'state' must hold a dict for each number in 'params', got {type(values).__name__} for {number!r}"
            )
    return split


def _wrong(what: str) -> RuntimeError:
    return RuntimeError(f"swap_in_optimizer_params_and_state: {what}")
