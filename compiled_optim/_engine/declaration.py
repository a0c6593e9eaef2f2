"""What follows from the fields of one optimizer class: its signature, the checks of its options, how they are read."""

from __future__ import annotations

import inspect
import numbers
import sys
from collections import namedtuple
from collections.abc import Callable, Iterable, Sized
from contextlib import suppress
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from compiled_optim._engine.one_pass import ARGUMENTS, Extras, OnePass, arithmetic_dtype
from compiled_optim.declare import Buffer, Carried, Compiled, Copy, Counter, Field, Flag, Number

_HINTS = get_type_hints(OnePass)
_PLAIN = {float, int, bool, type(None)}  # types whose values are read as they stand: 2 us for AdamW instead of 4


def take_fields(cls: Any) -> dict[str, Any]:
    """Moves the fields of a class from its attributes to ``_declared``, where `Declaration` finds them.

    As in torch.optim, an optimizer has no attribute ``lr``. ``None`` withdraws what a base declares.
    """
    inherited = {name for base in cls.__mro__[1:] for name in vars(base).get("_declared", ())}
    own = {k: v for k, v in vars(cls).items() if isinstance(v, Field) or (v is None and k in inherited)}
    for name in own:
        delattr(cls, name)
    cls._declared = own
    return own


def _annotations(cls: type, names: Iterable[str]) -> dict[str, Any]:
    """The annotations of these fields; one that cannot be evaluated stays a string."""
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        hints = inspect.get_annotations(base)
        for name in hints.keys() & names:
            found[name] = hint = hints[name]
            if isinstance(hint, str):
                with suppress(Exception):  # such as a name that is imported for type checkers only
                    found[name] = eval(hint, vars(sys.modules[base.__module__]))
    return found


class Group(NamedTuple):
    """The values of one param group as a rule sees them."""

    hyper: Any
    switches: Any
    has_tensors: bool  # whether it holds tensors, or other values that can change in place


class Declaration:
    """Everything that follows from the fields of one optimizer class, worked out once per class."""

    def __init__(self, cls: type, extras: Extras = Extras()) -> None:  # noqa: B008
        self._extras = extras
        fields: dict[str, Any] = {}
        for base in reversed(cls.__mro__):
            for name, value in {**vars(base), **vars(base).get("_declared", {})}.items():
                # A keyword-only option that is declared again as positional moves to its new place in the order.
                if isinstance(value, Flag) and isinstance(fields.get(name), Flag) and not value.kw_only:
                    del fields[name]
                fields[name] = value
        self.name = cls.__name__
        self.options: dict[str, Number | Flag] = {k: v for k, v in fields.items() if isinstance(v, Number | Flag)}
        state: dict[str, Buffer] = {k: v for k, v in fields.items() if isinstance(v, Buffer)}
        self.carried = {k: v for k, v in state.items() if isinstance(v, Carried)}
        self.buffers = {k: v for k, v in state.items() if k not in self.carried}
        self.copies: dict[str, Buffer] = {
            **({"master": Copy(help="the parameter before it was rounded")} if extras.master else {}),
            **({"ema": Copy(help="average of the parameter")} if extras.ema else {}),
        }
        taken = [*self.copies.keys() & state.keys()]
        if taken:
            raise TypeError(f"{self.name}: the state {taken[0]!r} is declared, so this option cannot keep one")
        self.buffers |= self.copies
        counted = extras.counts or any(isinstance(v, Counter) for v in fields.values())
        if self.carried and not counted:
            raise TypeError(f"{self.name}: what `scalars` carries, {list(self.carried)}, needs a counter() beside it")
        self._annotations = _annotations(cls, self.options)
        self.counts = ("step", *self.carried) if counted else ()  # the 0-d state
        self.slots = (*self.counts, *self.buffers)
        self.means = {k: b.mean_over for k, b in self.buffers.items() if b.mean_over is not None}
        for name, b in self.buffers.items():
            if (b.of != "all" or name in self.means) and cls.elementwise:  # type: ignore[attr-defined]
                raise TypeError(f"{self.name}: only a rule with elementwise = False can have the buffer {name!r}")
            if name in self.means and (b.mean_over not in (-1, -2) or b.of != "matrices"):
                raise TypeError(f"{self.name}: mean_over of {name!r} must be -1 or -2, and of 'matrices', got {b}")
        switches = [k for k, v in self.options.items() if v.switch]
        self.switch_type: Any = namedtuple("Switches", switches)  # type: ignore[misc]
        known = {"when": switches, "initial": list(self.options)}
        for name, buffer in state.items():
            for what, there in known.items():
                if isinstance(given := getattr(buffer, what), str) and given.removeprefix("not ") not in there:
                    raise TypeError(f"{self.name}: {what} of {name!r} must be one of {there}, got {given!r}")
        self._values = itemgetter(*self.options) if self.options else lambda group: ()
        names = [(n, field) for k, field in self.options.items() for n in self.rule_names(k)]
        self.hyper_type: Any = namedtuple("Hyper", [n for n, _ in names])  # type: ignore[misc]
        self.numbers = tuple(n for n, field in names if isinstance(field, Number))  # as rules name them
        self._numbers_at = [i for i, (_, field) in enumerate(names) if isinstance(field, Number)]
        self._switches_at = [i for i, (_, field) in enumerate(names) if field.switch]
        # As the host module reads them: see `quick` in host.cpp.
        self.layout = tuple(
            [
                (k, len(v.default) if isinstance(v.default, tuple) else 0, isinstance(v, Number), v.switch)
                for k, v in self.options.items()
            ]
        )
        # Positions of tuples, such as betas; the last comes first, so that spreading one does not move the others.
        self._tuples_at = [i for i, f in enumerate(self.options.values()) if isinstance(f.default, tuple)][::-1]

    def rule_names(self, option: str) -> list[str]:
        """The names by which a rule knows an option: one, or one for each number of a tuple."""
        default = self.options[option].default
        if not isinstance(default, tuple):
            return [option]
        if getattr(self.options[option], "names", ()):
            return [*self.options[option].names]  # type: ignore[union-attr]
        return [f"{option.removesuffix('s')}{i + 1}" for i in range(len(default))]

    def signature(self) -> inspect.Signature:
        """The constructor's: ``params``, the positional options in their order, then the keyword-only ones."""
        P = inspect.Parameter
        kinds = (P.POSITIONAL_OR_KEYWORD, P.KEYWORD_ONLY)
        options = [
            P(k, kinds[v.kw_only], default=v.default, annotation=self._annotations.get(k, P.empty))
            for k, v in self.options.items()
            if v.init
        ]
        options.append(P("compiled", P.KEYWORD_ONLY, default=False, annotation=Compiled))
        options += [P(k, P.KEYWORD_ONLY, default=default, annotation=_HINTS[k]) for k, default in ARGUMENTS.items()]
        required = [P("self", kinds[0]), P("params", kinds[0], annotation=ParamsT)]
        return inspect.Signature([*required, *sorted(options, key=attrgetter("kind"))])

    def constructor(self, qualname: str) -> Callable[..., None]:
        """The ``__init__`` of the class, which hands its arguments to ``_construct``."""
        signature = self.signature()

        def __init__(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            bound = signature.bind(optimizer, *args, **kwargs)
            bound.apply_defaults()
            options = dict(bound.arguments)
            del options["self"]
            around = {name: options.pop(name) for name in ARGUMENTS}
            optimizer._construct(options.pop("params"), options, options.pop("compiled"), around)

        __init__.__signature__ = signature  # type: ignore[attr-defined]
        __init__.__qualname__ = f"{qualname}.__init__"
        return __init__

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
            for label, part, given in self._labelled(name, parts, value):
                if part is not None and not field.admits(part):
                    raise ValueError(f"{self.name}: {label} must be {field.range}, got {given!r}")
        return checked

    def values(self, group: dict[str, Any]) -> tuple[Any, ...]:
        """The options of a param group as they stand there.

        Raises:
            KeyError: naming the one that is missing.
        """
        try:
            return self._values(group)
        except KeyError as error:
            missing, found = error.args[0], [name for name in group if name != "params"]
            raise KeyError(f"{self.name}: a param group must have {missing!r}, got {found}") from None

    def _labelled(self, name: str, parts: Any, value: Any) -> Iterable[tuple[str, Any, Any]]:
        """Each part of a hyperparameter with its name, and as it was given, for messages."""
        given = value if isinstance(self.options[name].default, tuple) else [value]
        labels = self.rule_names(name)
        if getattr(self.options[name], "names", ()):  # which the user of the class does not know
            labels = [f"{name}[{i}]" for i in range(len(labels))]
        return zip(labels, parts, given, strict=True)

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
        for i, (label, part, given) in enumerate(self._labelled(name, parts, value)):
            if part is None and field.takes_none(i):
                continue
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

    def read(self, group: dict[str, Any], *, keep_tensors: bool = False) -> Group:
        """Reads a param group. Tensors become floats unless they must stay in the graph or on their device.

        If a hyperparameter is no number, using `Group.hyper` raises the error that says so.
        """
        values = self.values(group)
        for i in self._tuples_at:
            if type(values[i]) is tuple:
                values = (*values[:i], *values[i], *values[i + 1 :])
        if len(values) == len(self.hyper_type._fields) and _PLAIN.issuperset(map(type, values)):
            with suppress(TypeError, OverflowError):  # raised for None, and for an int that no float can hold
                list(map(float, [values[i] for i in self._numbers_at]))
                on = [bool(values[i]) for i in self._switches_at]
                return Group(self.hyper_type._make(values), self.switch_type._make(on), False)
        return self._read_tensors(group, keep_tensors)

    def _read_tensors(self, group: dict[str, Any], keep_tensors: bool) -> Group:
        values: list[Any] = []
        has_tensors = False
        try:
            for (option, field), value in zip(self.options.items(), self.values(group), strict=True):
                parts = self.parts(option, value) if isinstance(field, Number) else (value,)
                fixed = isinstance(field, Flag) or isinstance(value, tuple | numbers.Number)
                has_tensors = has_tensors or not fixed
                for part in parts:
                    if isinstance(part, Tensor):
                        has_tensors = True
                        part = part.squeeze() if keep_tensors else part.item()
                    values.append(part)
            hyper = self.hyper_type._make(values)
            on = [_is_on(values[i]) for i in self._switches_at]
        except (TypeError, ValueError, RuntimeError) as error:
            return Group(Unreadable(error), self.switch_type._make([False] * len(self._switches_at)), True)
        return Group(hyper, self.switch_type._make(on), has_tensors)

    def kept(self, switches: Any, dtype: torch.dtype, dim: int = 0) -> tuple[str, ...]:
        """The names of the buffers that a parameter of ``dtype`` and ``dim`` dimensions has under these switches."""
        whole = arithmetic_dtype(dtype) == dtype  # and needs no master
        return tuple(
            k
            for k, b in self.buffers.items()
            if b.is_kept(switches) and b.belongs_to(dim) and not (whole and k == "master" and k in self.copies)
        )

    def shape_of(self, name: str, shape: torch.Size) -> torch.Size:
        """The shape of a buffer of a parameter of this shape."""
        over = self.means.get(name)
        return shape if over is None else torch.Size([*shape[:over], 1, *shape[len(shape) + over + 1 :]])

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The dtype of a buffer of a parameter of ``dtype``."""
        return arithmetic_dtype(dtype) if name in self.copies else self._extras.dtype_of_state(dtype)


class Unreadable:
    """Stands for hyperparameters of which one is no number, and raises that error when one of them is used.

    As in torch.optim, a param group in which nothing is updated may hold anything.
    """

    def __init__(self, error: Exception) -> None:
        self._error = type(error), str(error)

    def __getattr__(self, name: str) -> Any:
        kind, message = self._error
        raise kind(message)


def _is_on(value: Any) -> bool:
    """Whether a switch is on. A tensor on a device counts as on, because reading it would block."""
    return (isinstance(value, Tensor) and not value.is_cpu) or bool(value)


def coerce(value: Any) -> Any:
    """A hyperparameter as a plain Python value or a tuple of them.

    A checkpoint with an ``np.float64`` can be saved, but not loaded with ``weights_only=True``.
    """
    if isinstance(value, Tensor | bool | str) or value is None or type(value) in (int, float):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    if type(value).__name__ in ("bool", "bool_"):  # NumPy 2 and 1
        return bool(value)
    if getattr(value, "ndim", None) == 0:  # an array of one number
        return coerce(value.item())
    if isinstance(value, Sized) and isinstance(value, Iterable):
        return tuple(v.squeeze() if isinstance(v, Tensor) and v.dim() else coerce(v) for v in value)
    return value
