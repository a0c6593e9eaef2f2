"""One update of one value by an optimizer's rule, the same for every execution.

A value is a flat tensor (traced), a tensor with a graph (differentiable), or a list of tensors (`TensorList`). The rule
sees plain arithmetic on values; what all algorithms share, the width of the arithmetic and ``maximize``, is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch

from compiled_optim._engine.declaration import Declaration
from compiled_optim._engine.one_pass import RANDOM_NUMBERS, Extras, arithmetic_dtype
from compiled_optim._engine.values import lerp, rounded_at_random, where

_STEP_FACTOR = 0x9E3779  # odd, so that all numbers have their turn before one returns


class Namespace:
    """Attributes by name; unlike types.SimpleNamespace, Dynamo can construct one."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)


class Rule:
    """An optimizer class as the engine sees it: what it declares, and its two functions.

    The functions are looked up in the class each time, because a user may assign other ones. ``extras``: what is done
    beside the update, the same way for all algorithms.
    """

    def __init__(self, owner: Any, extras: Extras = Extras()) -> None:  # noqa: B008
        self.owner = owner
        self.extras = extras
        self.given = extras.numbers  # the names of `Work.given`
        self.declaration = Declaration(owner, extras)
        self.name: str = owner.__name__
        self._extended = {extras: self}

    def extended(self, extras: Extras) -> Rule:
        """The rule with these extras, always the same object, so that optimizers share kernels."""
        if extras not in self._extended:
            self._extended[extras] = Rule(self.owner, extras)
        return self._extended[extras]

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
        # the average of a row moves on also where the row itself stays
        return (lambda on: False) if self.extras.ema else self.owner.keeps_untouched_rows

    @property
    def elementwise(self) -> bool:
        return bool(self.owner.elementwise)

    @property
    def accepts_sparse(self) -> bool:
        return bool(self.owner.accepts_sparse)

    @property
    def accepts_complex(self) -> bool:
        return bool(self.owner.accepts_complex)

    @property
    def matrices_only(self) -> bool | str:
        """Whether all parameters must have two dimensions; or the switch of a param group that says so for its own."""
        return self.owner.matrices_only  # type: ignore[no-any-return]

    @property
    def accepts_dense(self) -> bool:
        return bool(self.owner.accepts_dense)

    def rounds(self, dtype: torch.dtype) -> bool:
        """Whether parameters of ``dtype`` are rounded at random."""
        return self.extras.rounding and dtype is torch.bfloat16

    @property
    def state_at_construction(self) -> bool:
        return bool(self.owner.state_at_construction)


def evaluate(
    rule: Rule, h: Any, counts: Sequence[Any], given: Mapping[str, Any] = MappingProxyType({})
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The scalars of one step, and what the rule carries on to the next.

    Args:
        h: the hyperparameters of the param group.
        counts: the step count after this step, and the values that were carried here; numbers or tensors.
        given: the `Extras.numbers` of this step.
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
    if rule.given:
        values = {**values, **_extra_scalars(rule.extras, step, given)}
    return values, _read_all(s, names, rule, "scalars") if names else ()


def _extra_scalars(extras: Extras, step: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    scalars = {"grad_factor": given["grad_factor"]} if extras.factor else {}
    if extras.ema:
        decay = given["ema_decay"]
        # the first average is the parameter
        scalars["ema_weight"] = where(step == 1, 1.0, 1 - (decay(int(step)) if callable(decay) else decay))
    if extras.rounding:
        exact = step.double() if isinstance(step, torch.Tensor) else step
        scalars["rounding_noise"] = (given["rounding_seed"] + exact * _STEP_FACTOR) % RANDOM_NUMBERS
    return scalars


def first_scalars(rule: Rule, h: Any) -> dict[str, Any]:
    """The scalars of a first step; raises TypeError if one of them is no number."""
    given = dict.fromkeys(rule.extras.numbers, 1.0)
    values, _ = evaluate(rule, h, (1.0, *(c.first(h._asdict()) for c in rule.declaration.carried.values())), given)
    check_numbers(rule, values)
    return values


def apply(
    rule: Rule, on: Any, p: Any, g: Any, state: Mapping[str, Any], scalars: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Runs the rule once.

    Args:
        rule: whose ``update`` is run.
        on: its switches, a named tuple of bools.
        p: the parameter's value; g: its gradient; state: the kept buffers by name; scalars: what `evaluate` returned;
            "first" among them is the place of the value's first element in the parameter, if that is not 0.

    Returns:
        The new parameter and the new buffers, each in the dtype it came in. Nothing is written.
    """
    width = arithmetic_dtype(p.dtype)
    g = g.to(width)
    k: Any = Namespace(scalars if rule.elementwise else {**scalars, "dtype_eps": torch.finfo(p.dtype).eps})
    if rule.extras.factor:
        g = g * k.grad_factor
    if getattr(on, "maximize", False):
        g = -g
    own = {name: value.to(width) for name, value in state.items() if name not in rule.declaration.copies}
    s = Namespace(own)
    start = p.to(width)
    if "master" in rule.declaration.copies and "master" in state:
        start = _unrounded(start, state["master"], p.dtype)
    try:
        new = rule.update(start, g, s, k, on)
    except (AttributeError, TypeError) as error:
        _explain(error, rule, "update", s=s, k=k, on=on)
        raise
    if new is None:
        raise TypeError(f"{rule.name}: `update` must return the new parameter, got None")
    written = zip(own, _read_all(s, own, rule, "update"), strict=True)
    made = {name: value.to(state[name].dtype) for name, value in written}
    for name in rule.declaration.copies:
        if name in state:
            made[name] = (new if name == "master" else lerp(state[name], new, k.ema_weight)).to(state[name].dtype)
    if rule.extras.rounding and rule.rounds(p.dtype):
        new = rounded_at_random(new, k.rounding_noise, scalars.get("first", 0))
    return new.to(p.dtype), made


def _unrounded(p: Any, master: Any, dtype: torch.dtype) -> Any:
    """The master, but the parameter where that has been changed since: it is further away than rounding can take it.

    A comparison with the rounded master would be exact, but Inductor leaves out conversions to a dtype and back.
    """
    about = torch.finfo(dtype)
    reach = p.abs() * (about.eps * 0.50001)
    if dtype is torch.float16:  # whose subnormal numbers are normal ones of float32
        reach = reach + about.smallest_normal * about.eps
    return where((p - master).abs() < reach, master, p)


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
