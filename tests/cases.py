"""Test cases derived from the declarations: a new optimizer is tested by existing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

import compiled_optim
from compiled_optim import algorithms
from compiled_optim.declare import Flag, Number

CLASSES = [getattr(algorithms, name) for name in algorithms.__all__]
_NO_RULE = {"foreach", "differentiable", "fused", "capturable"}  # flags that select an execution, not a formula


def oracle(cls: type[compiled_optim.Optimizer]) -> Any:
    """The class of torch.optim that `cls` stands in for."""
    return getattr(torch.optim, cls.__name__)


def sample(field: Number) -> Any:
    """A value that is neither the default nor zero."""
    if isinstance(field.default, tuple):
        return tuple(0.8 + 0.1 * i for i in range(len(field.default)))
    return 0.3 if not field.default else field.default * 3 if field.below is None else field.default * 0.9


def option_sets(cls: type[compiled_optim.Optimizer]) -> Iterator[dict[str, Any]]:
    """The defaults, every combination of switches that torch accepts, and another value of every number."""
    fields = {k: v for k, v in cls.declaration.options.items() if v.init and k not in _NO_RULE}
    switches = {k: v for k, v in fields.items() if v.switch}
    numbers = {k: sample(v) for k, v in fields.items() if isinstance(v, Number)}
    yield {}
    for chosen in itertools.product(*([False, True] for _ in switches)):
        picked = itertools.compress(switches, chosen)
        on = {k: True if isinstance(switches[k], Flag) else numbers[k] for k in picked}
        if any(chosen) and accepted(cls, on):
            yield on
    for name, value in numbers.items():
        base = {k: v for k, v in numbers.items() if k in switches}  # so that the number has an effect
        options = {**base, name: value}
        if accepted(cls, options):
            yield options


def accepted(cls: type[compiled_optim.Optimizer], options: dict[str, Any]) -> bool:
    try:
        oracle(cls)([torch.zeros(1, requires_grad=True)], **options)
    except ValueError:
        return False
    return True


def unique_option_sets(cls: type[compiled_optim.Optimizer]) -> list[dict[str, Any]]:
    return [dict(items) for items in dict.fromkeys(tuple(o.items()) for o in option_sets(cls))]


def switch_sets(cls: type[compiled_optim.Optimizer]) -> list[dict[str, Any]]:
    """Every combination of switches that torch accepts, each once: as many kernels for each dtype."""
    switches = {k for k, v in cls.declaration.options.items() if v.switch}
    return [options for options in unique_option_sets(cls) if options.keys() <= switches]


def rich_options(cls: type[compiled_optim.Optimizer]) -> dict[str, Any]:
    """As many switches at once as torch accepts."""
    return max(switch_sets(cls), key=len)


def values_for(cls: type[compiled_optim.Optimizer], switches: dict[str, Any]) -> SearchStrategy[dict[str, Any]]:
    """Values for all numbers, with the same switches on as in ``switches``."""
    numbers = {k: v for k, v in cls.declaration.options.items() if isinstance(v, Number)}
    drawn = {k: _values(k, v) for k, v in numbers.items() if not v.switch or k in switches}
    flags = {k: st.just(v) for k, v in switches.items() if k not in numbers}
    return st.fixed_dictionaries({**drawn, **flags}).filter(lambda options: accepted(cls, options))


def _values(name: str, field: Number) -> SearchStrategy[Any]:
    low = 1e-3 if field.switch or field.low is None else field.low
    one = st.floats(low, 0.999 if field.below is not None else 0.5)
    if name == "dampening":  # nesterov, which torch refuses with another, must stay likely
        one = st.just(0.0) | one
    return st.tuples(*(one for _ in field.default)) if isinstance(field.default, tuple) else one


def named(options: dict[str, Any]) -> str:
    return ",".join(f"{k}={v}" for k, v in options.items()) or "defaults"


ALL = [(cls, options) for cls in CLASSES for options in unique_option_sets(cls)]
IDS = [f"{cls.__name__}-{named(options)}" for cls, options in ALL]
