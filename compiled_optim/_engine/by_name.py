"""A checkpoint in the order and the param groups of the optimizer that loads it, matched by the names of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor

ShapeOf = Callable[[str, torch.Size], torch.Size | None]
_NOT_OPTIONS = ("params", "param_names")
# What torch.compile, FSDP, checkpointed activations and DistributedDataParallel put into the names of what they wrap.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_REMEDY = "to load it by position, as torch.optim does, remove 'param_names' from its param groups"


def arranged(
    optimizer: str, groups: Sequence[dict[str, Any]], shape_of: ShapeOf, state_dict: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The checkpoint as if this optimizer had saved it. What wrappers of a model add to names makes no difference.

    Each param group takes the options of the saved group that has its parameters.

    Args:
        optimizer: the name of its class; groups: its param groups.
        shape_of: the shape of a state, given its name and the shape of its parameter; None if there is no such rule.
        state_dict: in the layout of torch.optim.

    Returns:
        None if there are no names on one of the sides, or if all are in the same places already.

    Raises:
        ValueError: listing the parameters that are missing, unexpected or of another shape; or naming the option that
            differs between saved groups of which one group here takes parameters.
    """
    saved = state_dict["param_groups"]
    if not all("param_names" in group for group in (*groups, *saved)):
        return None
    if any(len(group["param_names"]) != len(group["params"]) for group in groups):  # somebody has changed a param group
        return None
    names = [list(group["param_names"]) for group in groups]
    bare, bare_saved = _bare(groups), _bare(saved)
    if bare == bare_saved:
        return None
    if any(isinstance(number, str) for group in saved for number in group["params"]):
        # torch.distributed.checkpoint has put all in their places, by names of its own, but for the list of names.
        found = [{**group, "param_names": own} for group, own in zip(saved, names, strict=False)]
        return {**state_dict, "param_groups": found} if len(saved) == len(groups) else None
    at = _places(optimizer, saved, bare_saved)
    params = [
        (n, p) for own, group in zip(bare, groups, strict=True) for n, p in zip(own, group["params"], strict=True)
    ]
    if len(dict(params)) < len(params):
        raise ValueError(f"{optimizer}: parameters must have different names, got {[*chain(*names)]}; {_REMEDY}")
    states = {name: state_dict["state"].get(number, {}) for name, (_, number) in at.items()}
    _check_fit(optimizer, dict(params), states, shape_of)
    numbers = {name: i for i, (name, _) in enumerate(params)}
    of_params = {number for _, number in at.values()}
    state = {key: value for key, value in state_dict["state"].items() if key not in of_params}
    state |= {numbers[name]: state_dict["state"][old] for name, (_, old) in at.items() if old in state_dict["state"]}
    made = [
        {**_options(optimizer, i, group, own, saved, at), "params": [numbers[n] for n in own], "param_names": names[i]}
        for i, (group, own) in enumerate(zip(groups, bare, strict=True))
    ]
    return {**state_dict, "state": state, "param_groups": made}


def _bare(groups: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The names of each param group as they were before the model was wrapped."""
    parts = [[[part for part in n.split(".") if part not in _WRAPPERS] for n in g["param_names"]] for g in groups]
    wrapped = all(len(own) > 1 and own[0] == "module" for own in chain(*parts))
    return [[".".join(own[wrapped:]) for own in group] for group in parts]


def _places(
    optimizer: str, saved: Sequence[Mapping[str, Any]], names_of: Sequence[list[str]]
) -> dict[str, tuple[int, Any]]:
    """Of each name in a checkpoint: its param group, and its number in ``state``."""
    at: dict[str, tuple[int, Any]] = {}
    for i, group in enumerate(saved):
        names, numbers = names_of[i], group["params"]
        if len(names) != len(numbers):
            got = f"{len(names)} names for {len(numbers)} parameters"
            raise ValueError(f"{optimizer}: 'param_names' of param group {i} must name its parameters, got {got}")
        for name, number in zip(names, numbers, strict=True):
            if name in at:
                raise ValueError(f"{optimizer}: 'param_names' must be unique, got {name!r} twice; {_REMEDY}")
            at[name] = i, number
    return at


def _check_fit(optimizer: str, params: Mapping[str, Tensor], states: Mapping[str, Any], shape_of: ShapeOf) -> None:
    missing = [name for name in params if name not in states]
    unexpected = [name for name in states if name not in params]
    others = [
        f"{name} (its {key!r} has {tuple(value.shape)}, the parameter {tuple(params[name].shape)})"
        for name, state in states.items()
        for key, value in state.items()
        if name in params and isinstance(value, Tensor) and shape_of(key, params[name].shape) not in (None, value.shape)
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another shape": others}
    if any(found.values()):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in found.items() if names)
        raise ValueError(
            f"{optimizer}: the parameters of the checkpoint must be those of the optimizer, got {listed}; {_REMEDY}"
        )


def _options(
    optimizer: str,
    index: int,
    group: Mapping[str, Any],
    names: Sequence[str],
    saved: Sequence[Mapping[str, Any]],
    at: Mapping[str, Any],
) -> dict[str, Any]:
    """The options of a param group, which are the same in all saved groups that its parameters were in."""
    sources = [*dict.fromkeys(at[name][0] for name in names)]
    found = [{k: v for k, v in saved[i].items() if k not in _NOT_OPTIONS} for i in sources]
    if not found:
        return {k: v for k, v in group.items() if k not in _NOT_OPTIONS}
    for i, options in zip(sources, found, strict=True):
        for name in {**found[0], **options}:
            first, other = found[0].get(name), options.get(name)
            if not _equal(first, other):
                raise ValueError(
                    f"{optimizer}: param group {index} has parameters of the saved groups {sources[0]} and {i}, which "
                    f"must have the same {name!r}, got {first!r} and {other!r}"
                )
    return deepcopy(found[0])  # a tensor among them may go to several groups, each of which changes its own


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return bool(a == b)
