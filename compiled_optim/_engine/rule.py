"""One update of one value by an algorithm's rule, the same for every execution.

A value is a flat tensor (traced), a tensor with a graph (differentiable), or a list of tensors (`TensorList`). The rule
sees plain arithmetic on values; what all algorithms share, the width of the arithmetic and ``maximize``, is done here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from compiled_optim.optimizer import Optimizer

_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


class Namespace:
    """Attributes by name; unlike types.SimpleNamespace, Dynamo can construct one."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an update of parameters of ``dtype`` is computed in."""
    return _WIDER.get(dtype, dtype)


def evaluate(algorithm: type[Optimizer], h: Any, counts: Sequence[Any]) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The scalars of one step, and what the algorithm carries on to the next.

    Args:
        h: the hyperparameters of the param group.
        counts: the step count after this step, and the values that were carried here; numbers or tensors.
    """
    step, *carried = counts
    names = algorithm.declaration.carried
    if not names:
        return algorithm.scalars(h, step), ()
    s = Namespace(dict(zip(names, carried, strict=True)))
    return algorithm.scalars(h, step, s), tuple(getattr(s, name) for name in names)


def first_counts(algorithm: type[Optimizer], h: Any) -> tuple[float, ...]:
    """The counts of a first step."""
    return (1.0, *(c.first(h._asdict()) for c in algorithm.declaration.carried.values()))


def apply(
    algorithm: type[Optimizer], on: Any, p: Any, g: Any, state: Mapping[str, Any], scalars: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Runs the rule once.

    Args:
        algorithm: the class that declares ``update``.
        on: its switches, a named tuple of bools.
        p: the parameter's value; g: its gradient; state: the kept buffers by name; scalars: what ``scalars`` returned.

    Returns:
        The new parameter and the new buffers, each in the dtype it came in. Nothing is written.
    """
    width = arithmetic_dtype(p.dtype)
    g = g.to(width)
    if on.maximize:
        g = -g
    s = Namespace({name: value.to(width) for name, value in state.items()})
    new = algorithm.update(p.to(width), g, s, Namespace(scalars), on)
    return new.to(p.dtype), {name: getattr(s, name).to(value.dtype) for name, value in state.items()}
