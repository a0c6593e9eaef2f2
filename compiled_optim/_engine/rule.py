"""One update of one value by an optimizer's rule, the same for every execution.

A value is a flat tensor (traced), a tensor with a graph (differentiable), or a list of tensors (`TensorList`). The rule
sees plain arithmetic on values; what all algorithms share, the width of the arithmetic and ``maximize``, is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from compiled_optim._engine.declaration import Declaration

_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


class Namespace:
    """Attributes by name; unlike types.SimpleNamespace, Dynamo can construct one."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)


class Rule:
    """An optimizer class as the engine sees it: what it declares, and its two functions.

    The functions are looked up in the class each time, because a user may assign other ones.
    """

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.declaration = Declaration(owner)
        self.name: str = owner.__name__

    def __repr__(self) -> str:
        return f"<rule of {self.owner.__module__}.{self.owner.__qualname__}>"

    @property
    def scalars(self) -> Callable[..., dict[str, Any]]:
        return self.owner.scalars  # type: ignore[no-any-return]

    @property
    def update(self) -> Callable[..., Any]:
        return self.owner.update  # type: ignore[no-any-return]

    def frozen(self, on_device: bool) -> tuple[Callable[..., Any], ...]:
        """The functions that a kernel is traced from: a change of what they refer to makes it stale.

        ``on_device``: whether the kernel computes the scalars too.
        """
        return (self.update, self.scalars) if on_device else (self.update,)

    @property
    def keeps_untouched_rows(self) -> Callable[[Any], bool]:
        return self.owner.keeps_untouched_rows  # type: ignore[no-any-return]

    @property
    def elementwise(self) -> bool:
        return bool(self.owner.elementwise)

    @property
    def accepts_sparse(self) -> bool:
        return bool(self.owner.accepts_sparse)

    @property
    def accepts_dense(self) -> bool:
        return bool(self.owner.accepts_dense)

    @property
    def state_at_construction(self) -> bool:
        return bool(self.owner.state_at_construction)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that an update of parameters of ``dtype`` is computed in."""
    return _WIDER.get(dtype, dtype)


def evaluate(rule: Rule, h: Any, counts: Sequence[Any]) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The scalars of one step, and what the rule carries on to the next.

    Args:
        h: the hyperparameters of the param group.
        counts: the step count after this step, and the values that were carried here; numbers or tensors.
    """
    step, *carried = counts
    names = rule.declaration.carried
    s = Namespace(dict(zip(names, carried, strict=True))) if names else None
    try:
        values = rule.scalars(h, step, s) if names else rule.scalars(h, step)
    except AttributeError as error:
        _explain(error, rule, "scalars", h=h, s=s)
        raise
    if not isinstance(values, dict):
        raise TypeError(f"{rule.name}: `scalars` must return a dict of numbers, got {values!r}")
    return values, _read_all(s, names, rule, "scalars") if names else ()


def first_scalars(rule: Rule, h: Any) -> dict[str, Any]:
    """The scalars of a first step; raises TypeError if one of them is no number."""
    values, _ = evaluate(rule, h, (1.0, *(c.first(h._asdict()) for c in rule.declaration.carried.values())))
    check_numbers(rule, values)
    return values


def apply(
    rule: Rule, on: Any, p: Any, g: Any, state: Mapping[str, Any], scalars: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Runs the rule once.

    Args:
        rule: whose ``update`` is run.
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
    k = Namespace(scalars)
    try:
        new = rule.update(p.to(width), g, s, k, on)
    except (AttributeError, TypeError) as error:
        _explain(error, rule, "update", s=s, k=k, on=on)
        raise
    if new is None:
        raise TypeError(f"{rule.name}: `update` must return the new parameter, got None")
    written = _read_all(s, state, rule, "update")
    return new.to(p.dtype), {name: v.to(state[name].dtype) for name, v in zip(state, written, strict=True)}


# ---- errors in the words of a rule

_GIVEN = {"h": "hyperparameters", "s": "buffers", "k": "scalars", "on": "fields declared with switch=True"}


def _explain(error: AttributeError | TypeError, rule: Rule, function: str, **given: Any) -> None:
    """Raises what is wrong with a rule if that is known: a name that does not exist, or a scalar that is no number."""
    if isinstance(error, TypeError):
        check_numbers(rule, vars(given["k"]))
        return
    for letter, values in given.items():
        if values is not None and values is error.obj:
            names = getattr(values, "_fields", None) or vars(values)
            raise _unknown(rule, f"`{function}` reads {letter}.{error.name}", letter, names) from None


def _unknown(rule: Rule, what: str, letter: str, names: Iterable[str]) -> AttributeError:
    return AttributeError(f"{rule.name}: {what}, which is not among the {_GIVEN[letter]}: {list(names)}")


def _read_all(s: Any, names: Collection[str], rule: Rule, function: str) -> tuple[Any, ...]:
    """The state that a rule leaves; raises AttributeError if it assigned anything else."""
    if len(vars(s)) > len(names):
        unknown = [name for name in vars(s) if name not in names]
        raise _unknown(rule, f"`{function}` assigns s.{unknown[0]}", "s", names)
    return tuple([getattr(s, name) for name in names])


def check_numbers(rule: Rule, values: Mapping[str, Any]) -> None:
    """Raises TypeError unless all are numbers."""
    for name, value in values.items():
        if not hasattr(value, "__float__") and not hasattr(value, "dtype"):
            raise TypeError(f"{rule.name}: `scalars` must return a dict of numbers, got {value!r} as {name!r}")
