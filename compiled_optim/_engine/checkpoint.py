"""Around torch.optim's ``load_state_dict``: names of parameters, tensors and dtypes that it would not keep, errors."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from compiled_optim._engine import by_name
from compiled_optim._engine.declaration import Declaration
from compiled_optim._engine.torch_private import optim
from compiled_optim.declare import Number

_AS_RETURNED = "as state_dict() returns it"


@contextmanager
def all_or_nothing(optimizer: Any) -> Iterator[None]:
    """Puts param groups and state back if what is done in the context raises."""
    state, groups = optimizer.state, optimizer.param_groups
    tensors = [v for group in groups for v in group.values() if isinstance(v, Tensor)]
    values = [t.detach().clone() for t in tensors]
    try:
        yield
    except BaseException:
        optimizer.state, optimizer.param_groups = state, groups
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        raise


def load(optimizer: Any, state_dict: Any) -> None:
    """Loads a checkpoint, by the names of parameters where it has them.

    Hyperparameters that are tensors stay the same tensors and take the saved values.
    """
    declared = optimizer.rule.declaration
    kept = [{k: v for k, v in group.items() if isinstance(v, Tensor)} for group in optimizer.param_groups]
    # Pre-hooks run in their order, so this sees what those of a user have made of the checkpoint.
    arrange = optimizer.register_load_state_dict_pre_hook(_arranged)
    try:
        with declared_dtypes(optimizer) if optimizer.rule.extras.any else nullcontext():
            optim.undecorated("load_state_dict")(optimizer, state_dict)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise problem(declared.name, declared.slots, state_dict) or error from None
    finally:
        arrange.remove()
    for group, tensors in zip(optimizer.param_groups, kept, strict=True):
        for name, tensor in tensors.items():
            if isinstance(declared.options.get(name), Number) and name in group:
                (value,) = declared.parts(name, group[name])
                with torch.no_grad():
                    tensor.fill_(value.squeeze() if isinstance(value, Tensor) else value)
                group[name] = tensor


def _arranged(optimizer: Any, state_dict: Any) -> dict[str, Any] | None:
    declared: Declaration = optimizer.rule.declaration
    if problem(declared.name, declared.slots, state_dict) is not None:
        return None  # torch raises, and `load` says why

    def shape_of(name: str, shape: torch.Size) -> torch.Size | None:
        return declared.shape_of(name, shape) if name in declared.buffers else None

    return by_name.arranged(declared.name, optimizer.param_groups, shape_of, state_dict)


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
