"""Around torch.optim's ``load_state_dict``: why it could not load a checkpoint, and dtypes that it would not keep."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import Tensor

_AS_RETURNED = "as state_dict() returns it"


def problem(optimizer: str, state_names: Collection[str], state_dict: Any) -> Exception | None:
    """An error that names the key, the value and what was expected there; None if nothing is found.

    Args:
        optimizer: the name of its class; state_names: of the state that it keeps.
    """
    if not isinstance(state_dict, Mapping):
        return TypeError(f"{optimizer}: state_dict must be a dict {_AS_RETURNED}, got {_shown(state_dict)}")
    for key in ("state", "param_groups"):
        if key not in state_dict:
            return KeyError(f"{optimizer}: state_dict must have {key!r}, {_AS_RETURNED}, got {list(state_dict)}")
    state, groups = state_dict["state"], state_dict["param_groups"]
    if not isinstance(groups, list | tuple):
        return TypeError(f"{optimizer}: 'param_groups' must be a list of dicts, got {_shown(groups)}")
    for i, group in enumerate(groups):
        where = f"{optimizer}: param group {i} of the checkpoint"
        if not isinstance(group, Mapping):
            return TypeError(f"{where} must be a dict, got {_shown(group)}")
        if "params" not in group:
            return KeyError(f"{where} must have 'params', the numbers of its parameters, got {list(group)}")
        if not isinstance(group["params"], list | tuple):
            return TypeError(f"{where} must have a list of numbers as 'params', got {_shown(group['params'])}")
    if not isinstance(state, Mapping):
        return TypeError(f"{optimizer}: 'state' must be a dict of dicts, got {_shown(state)}")
    for key, values in state.items():
        if not isinstance(values, Mapping):
            return TypeError(f"{optimizer}: 'state' of parameter {key!r} must be a dict, got {_shown(values)}")
        for name, value in values.items():
            # torch.optim would load a string, and change it
            if (name in state_names and isinstance(value, str)) or _is_array(value):
                what = f"{optimizer}: state {name!r} of parameter {key!r}"
                return TypeError(f"{what} must be a tensor or a number, got {_shown(value)}")
    return None


@contextmanager
def declared_dtypes(optimizer: Any) -> Iterator[None]:
    """Keeps what ``load_state_dict`` loads in the dtypes that are declared. torch.optim casts it to the parameter's."""
    declaration = optimizer.rule.declaration
    given: list[Any] = []

    def load(optimizer: Any) -> None:
        ids = chain.from_iterable(group["params"] for group in given[-1]["param_groups"])
        params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
        for i, p in zip(ids, params, strict=True):
            saved = given[-1]["state"].get(i, {})
            for name in declaration.buffers.keys() & saved.keys():
                dtype, value = declaration.dtype_of(name, p.dtype), saved[name]
                if isinstance(value, Tensor) and dtype != p.dtype:
                    optimizer.state[p][name] = (value.to_dense() if value.is_sparse else value).to(p.device, dtype)

    # after the hooks that change what is loaded, and before those that see what was
    before = optimizer.register_load_state_dict_pre_hook(lambda _, state_dict: given.append(state_dict))
    after = optimizer.register_load_state_dict_post_hook(load, prepend=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and not isinstance(value, Tensor) and value.ndim > 0


def _shown(value: Any) -> str:
    text = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
    return f"{text if len(text) < 80 else text[:80] + '...'} of type {type(value).__name__}"
