"""Hyperparameters that hypothesis draws."""

from __future__ import annotations

from typing import Any

from cases import accepted, numbers_of, ranges
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

import compiled_optim
from compiled_optim.declare import Number


def values_for(cls: type[compiled_optim.Optimizer], switches: dict[str, Any]) -> SearchStrategy[dict[str, Any]]:
    """Values for all numbers, with the same switches on as in ``switches``."""
    numbers = {k: v for k, v in numbers_of(cls).items() if not v.switch or k in switches}
    flags = {k: st.just(v) for k, v in switches.items() if k not in numbers}
    drawn = {k: _values(k, v) for k, v in numbers.items()}
    return st.fixed_dictionaries({**drawn, **flags}).filter(lambda options: accepted(cls, options))


def _values(name: str, field: Number) -> SearchStrategy[Any]:
    if field.integer:
        return st.integers(*ranges(name, field)[0])
    parts = [st.floats(*bounds, exclude_min=field.above is not None) for bounds in ranges(name, field)]
    one = st.tuples(*parts) if isinstance(field.default, tuple) else parts[0]
    # the default stays likely: beside nesterov torch refuses any other dampening
    return one if field.switch else st.just(field.default) | one
