"""What an optimizer declares: hyperparameters with their bounds, flags, and the state it keeps for each parameter.

From the fields of one class follow its constructor and signature, the checks of its arguments, the defaults of its
param groups, its lazily made state, the key of its kernels, and its test cases.
"""

from __future__ import annotations

import inspect
import numbers
from collections import namedtuple
from collections.abc import Iterable, Sized
from contextlib import suppress
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Number:
    default: Any
    low: float | None
    above: float | None
    high: float | None
    below: float | None
    switch: bool
    kw_only: bool = False
    init: bool = True

    @property
    def range(self) -> str:
        bounds = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds.items() if bound is not None) or "a number"

    def admits(self, value: Any) -> bool:
        # written so that NaN fails where there is a bound
        return (
            (self.low is None or bool(value >= self.low))
            and (self.above is None or bool(value > self.above))
            and (self.high is None or bool(value <= self.high))
            and (self.below is None or bool(value < self.below))
        )


@dataclass(frozen=True)
class Flag:
    default: Any
    switch: bool
    kw_only: bool
    init: bool


@dataclass(frozen=True)
class Buffer:
    when: str | None
    initial: float | str

    def first(self, group: dict[str, Any]) -> float:
        """Its initial value in a param group."""
        value = group[self.initial] if isinstance(self.initial, str) else self.initial
        return float(value.item() if isinstance(value, Tensor) else value)


@dataclass(frozen=True)
class Carried(Buffer):
    pass


@dataclass(frozen=True)
class Counter:
    pass


FIELDS = (Number, Flag, Buffer, Counter)
_PLAIN = {float, int, bool, type(None)}  # of what is read as it stands: 2 us for AdamW, against 4 one by one


# Typed as Any so that a field can be annotated with the type of its value, as in a dataclass. By keyword only, for type
# checkers see no other default.
def number(
    *,
    default: Any,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    switch: bool = False,
) -> Any:
    """Declares a hyperparameter, a float or a tuple of floats, or 0-d tensors in their place.

    Args:
        default: its default value; for a tuple ``names``, the update rule sees ``name1``, ``name2``, ...
        low, high: the least and the greatest value allowed.
        above, below: every value must be greater, or less, than this.
        switch: whether zero and non-zero values take different kernels (different values never do).
    """
    return Number(default, low, above, high, below, switch)


def flag(*, default: Any, switch: bool = False, kw_only: bool = False, init: bool = True) -> Any:
    """Declares an option. ``switch``: its truth selects a kernel; ``init=False``: fixed, not an argument."""
    return Flag(default, switch, kw_only, init)


def buffer(*, when: str | None = None, initial: float | str = 0.0) -> Any:
    """Declares a state tensor shaped like its parameter.

    Args:
        when: kept only while that switch is on.
        initial: the value it begins with, or the name of the hyperparameter that holds it.
    """
    return Buffer(when, initial)


def carried(*, initial: float | str) -> Any:
    """Declares a 0-d state tensor, which ``scalars`` reads from and assigns to ``s``; ``initial`` as in `buffer`."""
    return Carried(None, initial)


def counter() -> Any:
    """Declares the 0-d step count, which ``state_dict`` calls ``"step"``."""
    return Counter()


def take_fields(cls: Any) -> dict[str, Any]:
    """Takes what a class declares from its attributes, which instances of torch's optimizers have not either.

    ``None`` withdraws what a base declares. `Declaration` finds all of them in ``_fields`` of the class.
    """
    declared = {name for base in cls.__mro__[1:] for name in vars(base).get("_fields", ())}
    own = {k: v for k, v in vars(cls).items() if isinstance(v, FIELDS) or (v is None and k in declared)}
    for name in own:
        delattr(cls, name)
    cls._fields = own
    return own


class Choice(NamedTuple):
    """The values of one param group as the update rule sees them."""

    hyper: Any
    switches: Any
    has_tensors: bool  # or other values that change in place


class Declaration:
    """Everything that follows from the fields of one optimizer class, worked out once per class."""

    def __init__(self, cls: type) -> None:
        fields: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            for name, value in {**vars(base), **vars(base).get("_fields", {})}.items():
                # an option that was keyword-only takes its place among the positional ones where it is declared so
                if isinstance(value, Flag) and isinstance(fields.get(name), Flag) and not value.kw_only:
                    del fields[name]
                fields[name] = value
        self.name = cls.__name__
        self.options: dict[str, Number | Flag] = {k: v for k, v in fields.items() if isinstance(v, Number | Flag)}
        state: dict[str, Buffer] = {k: v for k, v in fields.items() if isinstance(v, Buffer)}
        self.carried = {k: v for k, v in state.items() if isinstance(v, Carried)}
        self.buffers = {k: v for k, v in state.items() if k not in self.carried}
        counted = any(isinstance(v, Counter) for v in fields.values())
        if self.carried and not counted:
            raise TypeError(f"{self.name}: what `scalars` carries, {list(self.carried)}, needs a counter() beside it")
        self.counts = ("step", *self.carried) if counted else ()  # 0-d state, which the host reads
        self.slots = (*self.counts, *self.buffers)
        self.switch_type: Any = namedtuple("Switches", [k for k, v in self.options.items() if v.switch])  # type: ignore[misc]
        self._read = itemgetter(*self.options)
        names = [(n, field) for k, field in self.options.items() for n in self._rule_names(k)]
        self.hyper_type: Any = namedtuple("Hyper", [n for n, _ in names])  # type: ignore[misc]
        self._numbers_at = [i for i, (_, field) in enumerate(names) if isinstance(field, Number)]
        self._switches_at = [i for i, (_, field) in enumerate(names) if field.switch]
        # such as betas; the last first, so that to spread one moves no other
        self._tuples_at = [i for i, f in enumerate(self.options.values()) if isinstance(f.default, tuple)][::-1]

    def _rule_names(self, option: str) -> list[str]:
        default = self.options[option].default
        if not isinstance(default, tuple):
            return [option]
        return [f"{option.removesuffix('s')}{i + 1}" for i in range(len(default))]

    def signature(self) -> inspect.Signature:
        """The constructor's: ``params``, the positional hyperparameters in their order, then the flags."""
        P = inspect.Parameter
        options = [(k, v) for k, v in self.options.items() if v.init]
        kinds = (P.POSITIONAL_OR_KEYWORD, P.KEYWORD_ONLY)
        parameters = [P("self", kinds[0]), P("params", kinds[0])]
        for kw_only, kind in enumerate(kinds):
            parameters += [P(k, kind, default=v.default) for k, v in options if v.kw_only == bool(kw_only)]
        return inspect.Signature([*parameters, P("compiled", P.KEYWORD_ONLY, default=False)])

    def check(self, values: dict[str, Any]) -> dict[str, Any]:
        """The values as a param group keeps them.

        Raises:
            ValueError: naming the argument, its value and the range that was expected.
            TypeError: for a value that is no number.
        """
        checked: dict[str, Any] = {}
        for name, field in self.options.items():
            value = values.get(name, field.default)
            checked[name] = coerce(value)
            if not isinstance(field, Number):
                continue
            parts = self.parts(name, value)
            if any(isinstance(p, Tensor) for p in parts) and not all(isinstance(p, Tensor) for p in parts):
                raise ValueError(f"{self.name}: {name} must be all floats or all tensors, got {value!r}")
            for label, part, given in zip(self._rule_names(name), parts, self._given(name, value), strict=True):
                if not field.admits(part):
                    raise ValueError(f"{self.name}: {label} must be {field.range}, got {given!r}")
        return checked

    def read(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The options of a param group as they stand there.

        Raises:
            KeyError: naming the one that is missing.
        """
        try:
            return self._read(group)  # type: ignore[no-any-return]
        except KeyError as error:
            missing, found = error.args[0], [name for name in group if name != "params"]
            raise KeyError(f"{self.name}: a param group must have {missing!r}, got {found}") from None

    def _given(self, name: str, value: Any) -> list[Any]:
        """The parts of a value as they were given, for messages."""
        return list(value) if isinstance(self.options[name].default, tuple) else [value]

    def parts(self, name: str, value: Any) -> tuple[Any, ...]:
        """A hyperparameter as plain numbers and tensors of one element: one, or as many as its default has.

        Raises:
            TypeError, ValueError: naming the argument, its value and what was expected.
        """
        field: Any = self.options[name]
        parts: Any = coerce(value)
        if not isinstance(field.default, tuple):
            parts = (parts,)
        elif isinstance(parts, Tensor) and parts.dim() == 1:
            parts = tuple(parts)
        elif not isinstance(parts, tuple):
            raise TypeError(f"{self.name}: {name} must have {len(field.default)} values, got {value!r}")
        elif len(parts) != len(field.default):
            raise ValueError(f"{self.name}: {name} must have {len(field.default)} values, got {value!r}")
        for label, part, given in zip(self._rule_names(name), parts, self._given(name, value), strict=True):
            if isinstance(part, Tensor):
                if part.numel() != 1 or part.is_complex():
                    got = f"{part.dtype} and shape {tuple(part.shape)}"
                    raise ValueError(f"{self.name}: {label} must be a number or a real tensor of 1 element, got {got}")
            elif not isinstance(part, int | float):
                kind = type(given).__name__
                raise TypeError(f"{self.name}: {label} must be {field.range}, got {given!r} of type {kind}")
            elif isinstance(part, int) and part.bit_length() > 1023:
                got = f"an int of {part.bit_length()} bits"
                raise ValueError(f"{self.name}: {label} must be {field.range} and fit a float, got {got}")
        return tuple(parts)

    def choose(self, group: dict[str, Any], *, keep_tensors: bool = False) -> Choice:
        """Reads a param group; tensors become floats unless they must stay in the graph or on their device.

        For a group in which a hyperparameter is no number, `Choice.hyper` raises that when it is used.
        """
        read = self.read(group)
        for i in self._tuples_at:
            if type(read[i]) is tuple:
                read = (*read[:i], *read[i], *read[i + 1 :])
        if len(read) == len(self.hyper_type._fields) and _PLAIN.issuperset(map(type, read)):
            with suppress(TypeError, OverflowError):  # of None, and of an int beyond all floats
                list(map(float, [read[i] for i in self._numbers_at]))
                on = [bool(read[i]) for i in self._switches_at]
                return Choice(self.hyper_type._make(read), self.switch_type._make(on), False)
        return self._choose(group, keep_tensors)

    def _choose(self, group: dict[str, Any], keep_tensors: bool) -> Choice:
        values: list[Any] = []
        has_tensors = False
        try:
            for (option, field), value in zip(self.options.items(), self.read(group), strict=True):
                parts = self.parts(option, value) if isinstance(field, Number) else (value,)
                fixed = isinstance(field, Flag) or isinstance(value, tuple | numbers.Number)
                has_tensors = has_tensors or not fixed
                for part in parts:
                    if isinstance(part, Tensor):
                        has_tensors = True
                        part = part.squeeze() if keep_tensors else part.item()
                    values.append(part)
            hyper = self.hyper_type._make(values)
            on = [bool(values[i]) for i in self._switches_at]
        except (TypeError, ValueError, RuntimeError) as error:
            return Choice(Unreadable(error), self.switch_type._make([False] * len(self._switches_at)), True)
        return Choice(hyper, self.switch_type._make(on), has_tensors)

    def kept(self, switches: Any) -> tuple[str, ...]:
        """The names of the buffers that exist under these switches."""
        return tuple(k for k, b in self.buffers.items() if b.when is None or getattr(switches, b.when))


class Unreadable:
    """In place of hyperparameters one of which is no number: an error when they are used.

    As in torch.optim, a param group of which nothing is updated may hold anything.
    """

    def __init__(self, error: Exception) -> None:
        self._error = type(error), str(error)

    def __getattr__(self, name: str) -> Any:
        kind, message = self._error
        raise kind(message)


def coerce(value: Any) -> Any:
    """A hyperparameter as a plain Python value, or a tuple of such, as torch.optim's checkpoints can hold it.

    An ``np.float64`` can be saved in a checkpoint but not loaded again with ``weights_only=True``.
    """
    if isinstance(value, Tensor | bool | str) or value is None or type(value) in (int, float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if type(value).__name__ in ("bool", "bool_"):  # NumPy 2 and 1
        return bool(value)
    if getattr(value, "ndim", None) == 0:  # an array of it
        return coerce(value.item())
    if isinstance(value, Sized) and isinstance(value, Iterable):
        return tuple(v.squeeze() if isinstance(v, Tensor) and v.dim() else coerce(v) for v in value)
    return value
