"""What LBFGS takes as options and as state: checked before anything changes, with errors that name what is wrong."""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compiled_optim._engine.declaration import coerce
from compiled_optim.lbfgs.history import in_memory

_AT_LEAST = {"lr": 0.0, "max_iter": 0, "max_eval": 0, "history_size": 1}
_NUMBERS = (*_AT_LEAST, "tolerance_grad", "tolerance_change")
LISTS = ("old_dirs", "old_stps", "ro")  # the history in checkpoints, the oldest pair first


def options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a param group, with Python's numbers for NumPy's.

    Raises:
        TypeError: for what is no number.
        ValueError: for a number out of its range, or an option that is missing.
        RuntimeError: for an unknown line search, as in torch.optim.
    """
    checked = {}
    for name in _NUMBERS:
        if name not in group:
            raise ValueError(f"LBFGS: expected the option {name!r} in the param group, got {sorted(map(str, group))}")
        value = checked[name] = coerce(group[name])
        low = _AT_LEAST.get(name)
        expected = "a number" if low is None else f"at least {low:g}"
        if isinstance(value, Tensor) and value.numel() != 1:
            shape = tuple(value.shape)
            raise ValueError(f"LBFGS: {name} must be a number or a tensor of one element, got shape {shape}")
        if not isinstance(value, Tensor | numbers.Real):
            raise TypeError(f"LBFGS: {name} must be {expected}, got {value!r} of type {type(value).__name__}")
        if low is not None and not value >= low:  # type: ignore[operator]  # so that NaN fails
            raise ValueError(f"LBFGS: {name} must be {expected}, got {value}")
    if not isinstance(checked["history_size"], numbers.Integral):
        raise TypeError(f"LBFGS: history_size must be a whole number, got {checked['history_size']!r}")
    search = group.get("line_search_fn")
    if search is not None and not (isinstance(search, str) and search == "strong_wolfe"):
        raise RuntimeError(f"LBFGS: line_search_fn must be None or 'strong_wolfe', got {search!r}")
    return {**checked, "line_search_fn": search}


def check_checkpoint(state_dict: Any, elements: int) -> None:
    """Checks a checkpoint for parameters of so many real elements; see `options` and `check_state`."""
    check_mapping("the checkpoint", state_dict)
    for name in ("state", "param_groups"):
        if name not in state_dict:
            raise ValueError(f"LBFGS: expected {name!r} in the checkpoint, got {_text(list(state_dict))}")
    state, groups = state_dict["state"], state_dict["param_groups"]
    check_mapping("'state' of the checkpoint", state)
    if not isinstance(groups, list | tuple) or len(groups) != 1:
        raise ValueError(f"LBFGS: 'param_groups' of the checkpoint must be a list of one dict, got {_text(groups)}")
    check_mapping("the param group of the checkpoint", groups[0])
    options(groups[0])
    params = groups[0].get("params")
    if not isinstance(params, list | tuple):
        raise ValueError(f"LBFGS: 'params' in the param group of the checkpoint must be a list, got {_text(params)}")
    if params:
        check_state(state.get(params[0], {}), elements)


def check_mapping(name: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"LBFGS: {name} must be a dict, got {_text(value)}")


def check_state(state: Any, elements: int) -> None:
    """Checks the state of the first parameter, as torch.optim.LBFGS lays it out or as it is between steps.

    Args:
        elements: of a flat gradient.

    Raises:
        ValueError: naming the key, the value and what was expected.
    """
    check_mapping("the state of the first parameter", state)
    for name in ("n_iter", "func_evals"):
        count = state.get(name, 0)
        _check_number(name, count)
        if not (count >= 0 and count == int(count)):
            raise _wrong(name, "a count, at least 0", count)
    if not state.get("n_iter"):
        return  # nothing else is read
    history = () if "history" in state else (*LISTS, "H_diag")
    for name in ("d", "t", "prev_flat_grad", "prev_loss", *history):
        if state.get(name) is None:
            raise ValueError(f"LBFGS: expected {name!r} in the state after {state['n_iter']} iterations, got None")
    for name in ("d", "prev_flat_grad"):
        _check_vector(name, state[name], elements)
    for name in ("t", "prev_loss", *history[len(LISTS) :]):
        _check_number(name, state[name])
    lists = {name: state[name] for name in history[: len(LISTS)]}
    for name, values in lists.items():
        if not isinstance(values, Sequence) or isinstance(values, str | bytes):
            raise _wrong(name, "a list", values)
        for i, value in enumerate(values):
            if name == "ro":
                _check_number(f"{name}[{i}]", value)
            else:
                _check_vector(f"{name}[{i}]", value, elements)
    lengths = {name: len(values) for name, values in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"LBFGS: expected lists of the same length in the state, got {lengths}")


def _check_vector(name: str, value: Any, elements: int) -> None:
    plain = isinstance(value, Tensor) and value.layout is torch.strided and value.device.type != "meta"
    if not plain or value.shape != (elements,) or not value.is_floating_point():
        raise _wrong(name, f"a dense vector of {elements} real elements, as many as the parameters have", value)
    if type(value) is Tensor and value.is_contiguous() and not in_memory(value):
        raise _wrong(name, f"a vector of {elements} elements in memory", "one whose storage was resized")


def _check_number(name: str, value: Any) -> None:
    held = isinstance(value, Tensor) and value.numel() == 1 and value.device.type != "meta" and not value.is_complex()
    if not held and not isinstance(value, numbers.Real):
        raise _wrong(name, "a number or a tensor of one element", value)


def _wrong(name: str, expected: str, value: Any) -> ValueError:
    return ValueError(f"LBFGS: state {name!r} must be {expected}, got {_text(value)}")


def _text(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {tuple(value.shape)} on {value.device}"
    return f"{repr(value)[:80]} of type {type(value).__name__}"
