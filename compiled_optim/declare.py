"""The fields of an optimizer: hyperparameters with their bounds, options, and the state of each parameter.

Beside them, functions with which a rule that says ``elementwise = False`` looks at whole tensors. One that needs no
more than `mean`, `batched` and `of_shape` is compiled to native loops on the CPU, others through ``torch.compile``.

From the fields of a class follow its constructor, the checks of its arguments, its documentation, its lazily made
state, the key of its kernels and its test cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from torch import Tensor

from compiled_optim._engine.values import batched as batched
from compiled_optim._engine.values import mean as mean
from compiled_optim._engine.values import of_shape as of_shape

# What ``scalars`` and ``update`` are given. All are Any to a type checker, because one rule runs on numbers, on tensors
# and on lists of tensors.
Value: TypeAlias = Any  # a number, a tensor or a list of tensors, under elementwise arithmetic
Hyper: TypeAlias = Any  # h: the hyperparameters of a param group as attributes; betas are h.beta1 and h.beta2
State: TypeAlias = Any  # s: the buffers of a parameter as attributes, which the rule reads and assigns
Scalars: TypeAlias = Any  # k: what ``scalars`` returned, as attributes
Switches: TypeAlias = Any  # on: the fields with ``switch=True`` as attributes, each a bool

Compiled: TypeAlias = Literal[False, True, "multi_tensor", "foreach"]


@dataclass(frozen=True, kw_only=True)
class Field:
    """``help``: what it is, for the documentation of its class."""

    help: str = ""


@dataclass(frozen=True)
class Number(Field):
    default: Any
    low: float | None
    above: float | None
    high: float | None
    below: float | None
    switch: bool
    unit: str = ""
    names: tuple[str, ...] = ()
    integer: bool = False
    kw_only: bool = False
    init: bool = True

    @property
    def bounds(self) -> str:
        """Such as "at least 0 and below 1"; empty for a number without bounds."""
        bounds = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None)

    @property
    def range(self) -> str:
        kind = "an integer" if self.integer else "a number"
        return f"{kind}, {self.bounds}" if self.integer and self.bounds else self.bounds or kind

    def takes_none(self, position: int) -> bool:
        """Whether None may stand in this place of a tuple, as it does in the default."""
        return isinstance(self.default, tuple) and self.default[position] is None

    def admits(self, value: Any) -> bool:
        # Comparisons with NaN are false, so it fails wherever there is a bound.
        return (
            (self.low is None or bool(value >= self.low))
            and (self.above is None or bool(value > self.above))
            and (self.high is None or bool(value <= self.high))
            and (self.below is None or bool(value < self.below))
            and (not self.integer or bool(value % 1 == 0))
        )


@dataclass(frozen=True)
class Flag(Field):
    default: Any
    switch: bool
    kw_only: bool
    init: bool


@dataclass(frozen=True)
class Buffer(Field):
    when: str | None
    initial: float | str
    of: Literal["all", "matrices", "vectors"] = "all"
    mean_over: int | None = None

    def is_kept(self, switches: Any) -> bool:
        """Whether it exists under these switches."""
        if self.when is None:
            return True
        switch = self.when.removeprefix("not ")
        return bool(getattr(switches, switch)) == (switch == self.when)

    def belongs_to(self, dim: int) -> bool:
        """Whether parameters of ``dim`` dimensions have it."""
        return self.of == "all" or (self.of == "matrices") == (dim > 1)

    def first(self, group: dict[str, Any]) -> float | Tensor:
        """Its initial value in a param group: a 0-d tensor where reading it would make the host wait for a device."""
        value = group[self.initial] if isinstance(self.initial, str) else self.initial
        if isinstance(value, Tensor) and value.device.type != "cpu":
            return value.detach().reshape(())
        return float(value)


@dataclass(frozen=True)
class Copy(Buffer):
    """Begins as a copy of its parameter, in the dtype of arithmetic."""

    when: str | None = None
    initial: float | str = 0.0


@dataclass(frozen=True)
class Carried(Buffer):
    pass


@dataclass(frozen=True)
class Counter(Field):
    pass


# These return Any so that a field can be annotated with the type of its value, as in a dataclass. ``default`` is passed
# by keyword because type checkers recognize it by that name only.
def number(
    *,
    default: Any,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    switch: bool = False,
    unit: str = "",
    names: tuple[str, ...] = (),
    integer: bool = False,
    help: str = "",
) -> Any:
    """Declares a hyperparameter: a float, or a tuple of floats, or 0-d tensors in their place.

    Args:
        default: its default value; for a tuple ``names``, the update rule sees ``name1``, ``name2``, ... A part that is
            None may be None.
        low, high: the least and the greatest value allowed.
        above, below: every value must be greater, or less, than this.
        switch: whether zero and non-zero values take different kernels (different values never do).
        unit: its unit, such as ``"parameter / gradient"``; empty for a pure number.
        names: what the update rule calls the values of a tuple, if not as above.
        integer: whether it must have no fraction.
        help: what it is, for the documentation of the class.
    """
    return Number(default, low, above, high, below, switch, unit, names, integer, help=help)


def flag(*, default: Any, switch: bool = False, kw_only: bool = False, init: bool = True, help: str = "") -> Any:
    """Declares an option.

    Args:
        default: its default value.
        switch: whether its truth selects a kernel. Rules read switches only.
        kw_only: whether it is a keyword-only argument.
        init: False for an option that is fixed and no argument.
        help: what it does, for the documentation of the class.
    """
    return Flag(default, switch, kw_only, init, help=help)


def buffer(
    *,
    when: str | None = None,
    initial: float | str = 0.0,
    of: Literal["all", "matrices", "vectors"] = "all",
    mean_over: int | None = None,
    help: str = "",
) -> Any:
    """Declares a state tensor shaped like its parameter.

    Args:
        when: the name of a switch; the buffer exists only while that is on, or with "not " before it while it is off.
        initial: the value it begins with, or the name of the hyperparameter that holds it.
        of: which parameters have it: "matrices" are those of two dimensions or more, "vectors" the others. Only a rule
            with ``elementwise = False`` may tell them apart.
        mean_over: -1 or -2, a dimension in which it has the size 1, as the `mean` over it. For matrices only.
        help: what it holds, for the documentation of the class.
    """
    return Buffer(when, initial, of, mean_over, help=help)


def carried(*, initial: float | str, help: str = "") -> Any:
    """Declares a 0-d state tensor, which ``scalars`` reads from ``s`` and assigns to it.

    Args:
        initial, help: as in `buffer`.
    """
    return Carried(None, initial, help=help)


def counter() -> Any:
    """Declares the 0-d step count, which ``state_dict`` calls ``"step"``."""
    return Counter(help="number of steps taken")
