"""A schedule as a sympy expression in the step ``t``: its value on the host, its code for tensors, its LaTeX."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import sympy as sp  # type: ignore[import-untyped]
import torch
from torch import Tensor
from torch.optim import lr_scheduler

from compiled_optim._engine.in_graph import operators
from compiled_optim._engine.in_graph.handles import Inputs
from compiled_optim.lr_scheduler.code import Form, base_lr, compiled, evaluate, t


def number(value: Any) -> sp.Expr:
    """A number or a tensor of one, as sympy shows it best: 20 for 20.0."""
    value = float(value)
    return sp.Integer(int(value)) if value.is_integer() else sp.sympify(value)


def copied(value: Any) -> Any:
    """What shares no tensor and no list with ``value``."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    return {k: copied(v) for k, v in value.items()} if type(value) is dict else value


def assigned(old: Any, new: Any) -> Any:
    """What stands in for ``old`` once it has the value ``new``: a tensor is filled, a number stays a number."""
    if not isinstance(old, Tensor):
        return float(new) if isinstance(new, Tensor) else new
    value = new.detach().reshape(()) if isinstance(new, Tensor) and (new.dim() or new.requires_grad) else new
    if not old.requires_grad:
        return old.fill_(value)
    with torch.no_grad():
        return old.fill_(value)


class _Step:
    """A scheduler's ``step``: the function itself, or torch's, for torch warns in the name of its caller; in a user's
    graph an operator."""

    def __init__(self, function: Callable[..., None] | None = None) -> None:
        self._function = function

    def __get__(self, scheduler: Any, owner: Any) -> Any:
        if scheduler is not None and torch.compiler.is_compiling():
            return functools.partial(operators.trace_schedule, scheduler)
        if self._function is None:
            return super(Scheduler, owner if scheduler is None else scheduler).step  # type: ignore[misc]
        return self._function.__get__(scheduler, owner)


class _Reference:
    """The optimizer of a schedule that is attached, which it does not keep. In ``__dict__`` is that of any other."""

    def __get__(self, schedule: Any, owner: Any) -> Any:
        optimizer = None if schedule is None else schedule._reference()
        if optimizer is None:
            raise AttributeError(f"{owner.__name__} has no optimizer, or is attached to one that exists no more")
        return optimizer


def _none() -> None: ...


class Scheduler(lr_scheduler.LRScheduler):
    """What all schedulers here have beyond torch's: a formula to look at, and learning rates that stay what they are.

    A tensor learning rate is filled, never replaced, and nothing a scheduler holds or returns shares its memory.
    """

    __slots__ = ("_inputs", "_reference")  # not in ``__dict__``, which is torch's

    schedules: tuple[str, ...] = ("lr",)
    step = _Step()
    optimizer = _Reference()
    _inputs: Inputs
    _reference: Callable[[], Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__init__ is not lr_scheduler.LRScheduler.__init__:
            # so that a learning rate that requires grad can be filled, and copies of it are detached
            cls.__init__ = torch.no_grad()(cls.__init__)  # type: ignore[method-assign]
        if "step" in vars(cls):
            cls.step = _Step(vars(cls)["step"])

    def __new__(cls, *args: Any, **kwargs: Any) -> Scheduler:
        scheduler = super().__new__(cls)
        scheduler._inputs = Inputs(scheduler)
        scheduler._reference = _none
        return scheduler

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "optimizer": self.optimizer}

    def _refer(self, *, weakly: bool) -> None:
        """Whether to keep the optimizer alive: two objects that keep each other would wait for the collector."""
        optimizer = self.optimizer
        self._reference = weakref.ref(optimizer) if weakly else _none
        if weakly:
            self.__dict__.pop("optimizer", None)
        else:
            self.optimizer = optimizer
        for scheduler in getattr(self, "_schedulers", ()):
            scheduler._refer(weakly=weakly)

    def expression(self, group: int = 0, of: str = "lr") -> sp.Expr:
        """The schedule of a param group as a sympy expression in ``t``, which is ``Symbol("t", nonnegative=True)``.

        Args:
            group: the index of the param group.
            of: "lr"; or "momentum" (beta1 for Adam) where the scheduler moves it.

        Raises:
            TypeError: if the schedule is not symbolic; the message says why.
            ValueError: for a group or a quantity that the scheduler does not have.
        """
        expression, values = self._checked(group, of)
        exact = expression.xreplace({s: number(values[s.name]) for s in expression.free_symbols - {t}})
        if exact.has(sp.zoo, sp.nan):
            raise ZeroDivisionError(f"{type(self).__name__} divides by zero with {values}")
        return exact

    def value(self, t: Any, group: int = 0, of: str = "lr") -> Any:
        """The value at step ``t`` by the closed form; arguments and errors as for `expression`.

        Args:
            t: a number, for a float; or a tensor of steps, for a tensor like it, computed on its device by torch
                operations only, without waiting for it.
        """
        return evaluate(self._checked(group, of), t)

    def function(self, group: int = 0, of: str = "lr") -> Callable[[Any], Any]:
        """The closed form with all but the step looked up, which is a number or a tensor of steps, as for `value`.

        A number takes 1 us. With `value` it is 4 to 20, and hundreds where that has to trace a Python function.
        """
        form = self._checked(group, of)
        names, of_numbers = compiled(form[0])

        @functools.cache
        def numbers() -> list[float]:  # a step that is a tensor needs none, and nothing is read from a device
            return [float(form[1][name]) for name in names]

        return lambda step: evaluate(form, step) if isinstance(step, Tensor) else of_numbers(float(step), *numbers())

    def latex(self, group: int = 0, of: str = "lr") -> str:
        r"""The formula of a param group in LaTeX, such as ``\eta_{t} = 0.1 \cdot {0.9}^{t}``."""
        return rf"\{'eta' if of == 'lr' else 'mu'}_{{t}} = {sp.latex(self.expression(group, of), mul_symbol='dot')}"

    def _checked(self, group: int, of: str) -> Form:
        self._check(group, of)
        return self._closed_form(group, of)

    def _check(self, group: int, of: str) -> None:
        if of not in self.schedules:
            raise ValueError(f"of must be one of {self.schedules} for this {type(self).__name__}, got {of!r}")
        if group not in range(len(self.optimizer.param_groups)):
            raise ValueError(f"group must be from 0 to {len(self.optimizer.param_groups) - 1}, got {group!r}")

    def _closed_form(self, group: int, of: str) -> Form:
        raise TypeError(f"{type(self).__name__} is not symbolic: it has no closed form in the step")

    def _parameter(self, name: str, group: int) -> Any:
        """The value of the symbol of this name: of an attribute, of ``<name>s[group]``, or of the param group."""
        value = getattr(self, name, None)
        if value is None:
            several = getattr(self, f"{name}s", None)
            value = self.optimizer.param_groups[group][name] if several is None else several[group]
        return value

    def _form(self, expression: sp.Expr, group: int, **given: Any) -> Form:
        names, _ = compiled(expression)
        return expression, given | {name: self._parameter(name, group) for name in names if name not in given}

    def get_lr(self) -> list[float | Tensor]:
        """The learning rates of the step that is being taken, as in torch."""
        if not self._get_lr_called_within_step:
            text = "To get the last learning rate computed by the scheduler, please use `get_last_lr()`."
            warnings.warn(text, UserWarning, stacklevel=2)
        return self._new_lrs()

    def _new_lrs(self) -> list[Any]:
        raise NotImplementedError

    def _check_by_hand(self) -> None:
        """Of a step that the optimizer does not take: refuses it if it does, and warns if it takes those of another."""
        attached = getattr(self.optimizer, "_attached", None)
        if attached is None or attached.is_moving or self._is_initial:
            return
        if attached.schedule is self:
            raise RuntimeError(f"this {type(self).__name__} is attached, and moves with optimizer.step() alone")
        attached.warn_of_another(f"A {type(self).__name__} stepped by hand")

    def _check_next(self) -> None:
        """Raises if there is no next step."""

    def _update_lr(self, epoch: int | None = None) -> None:
        self._check_by_hand()  # here, for torch's step() warns in the name of its caller
        self._get_lr_called_within_step = True
        try:
            self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
            closed = None if epoch is None else getattr(self, "_get_closed_form_lr", None)
            values = closed() if closed else self.get_lr()
        finally:
            self._get_lr_called_within_step = False
        self._assign(values)

    def _assign(self, values: list[Any], *, strict: bool = True) -> None:
        last = []
        for group, value in zip(self.optimizer.param_groups, values, strict=strict):
            lr = group["lr"] = assigned(group["lr"], value)
            last.append(copied(lr))
        self._last_lr = last

    @property
    def _steps_taken(self) -> int:
        return self.last_epoch

    @property
    def _groups_seen(self) -> int:
        """How many param groups have a closed form: those that were there when the schedule was built."""
        return len(getattr(self, "base_lrs", self.optimizer.param_groups))

    def _move_to(self, step: int) -> None:
        """What else but learning rates a step changes; for a schedule that is attached."""
        self.last_epoch, self._step_count = step, step + 1

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rates that the last step set; copies, also of tensors."""
        return copied(super().get_last_lr())  # type: ignore[no-any-return]

    def state_dict(self) -> dict[str, Any]:
        """The state as torch lays it out; either side loads the other's."""
        return copied(super().state_dict())  # type: ignore[no-any-return]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict`` of this class or of torch's returned."""
        super().load_state_dict(copied(state_dict))
        attached = getattr(self.optimizer, "_attached", None)
        if attached is not None and attached.schedule is self:
            attached.schedule_loaded()


class Absolute(Scheduler):
    """A schedule that sets the learning rate, whatever it was."""

    def _new_lrs(self) -> list[Any]:
        return [self._at(self.last_epoch, self._closed_form(i, "lr")) for i in range(len(self.base_lrs))]

    @staticmethod
    def _at(step: Any, form: Form) -> Any:
        expression, values = form
        names, function = compiled(expression)
        return function(float(step), *[values[name] for name in names])


class Relative(Scheduler):
    r"""A schedule :math:`\eta_t = m + (\eta_0 - m) f(t)` that moves the learning rate on from what it is.

    A step does :math:`\eta \leftarrow m + (\eta - m) f(t) / f(t-1)`, and :math:`\eta \leftarrow \eta + (\eta_0 - m)
    f(t)` where :math:`f(t-1) = 0`. So a learning rate changed by hand stays changed, and schedulers can be chained.
    """

    floor: ClassVar[sp.Symbol | None] = None  # m; None is 0

    @property
    def formula(self) -> sp.Expr:
        """f(t). Symbols other than ``t`` stand for attributes of these names."""
        raise NotImplementedError

    def _closed_form(self, group: int, of: str) -> Form:
        return self._form(scaled(self.floor, base_lr, self.formula), group)

    def _new_lrs(self) -> list[Any]:
        if self._is_initial:
            return super(Scheduler, self).get_lr()
        groups, step = self.optimizer.param_groups, self._position()
        try:
            ratio = self._number(_recursion(self.formula) if step > 0 else compiled(self.formula), step)
        except ZeroDivisionError:
            return self._from_zero(self._closed(step))
        if self.floor is None:
            return [group["lr"] * ratio for group in groups]
        return [scaled(floor, group["lr"], ratio) for floor, group in zip(self._floors(), groups, strict=True)]

    def _position(self) -> int:
        return self.last_epoch

    def _number(self, code: tuple[tuple[str, ...], Callable[..., Any]], step: int) -> Any:
        names, function = code
        return function(step, *[getattr(self, name) for name in names])

    def _floors(self) -> list[Any]:
        return [self.floor and self._parameter(self.floor.name, i) for i in range(len(self.optimizer.param_groups))]

    def _closed(self, step: int) -> list[Any]:
        factor = self._number(compiled(self.formula), step)
        return [scaled(floor, base, factor) for floor, base in zip(self._floors(), self.base_lrs, strict=True)]

    def _from_zero(self, closed: list[Any]) -> list[Any]:
        rises = zip(self.optimizer.param_groups, closed, self._floors(), strict=True)
        return [group["lr"] + (lr if floor is None else lr - floor) for group, lr, floor in rises]

    def _get_closed_form_lr(self) -> list[Any]:
        return self._closed(self.last_epoch)


def scaled(floor: Any, value: Any, factor: Any) -> Any:
    """m + (value - m) f, of numbers, tensors and expressions."""
    return value * factor if floor is None else floor + (value - floor) * factor


@functools.lru_cache(maxsize=1024)
def _recursion(factor: sp.Expr) -> tuple[tuple[str, ...], Callable[..., Any]]:
    if factor == 0:
        raise ZeroDivisionError
    # powers of one base become one power: it neither underflows nor divides by zero
    return compiled(sp.powsimp(factor / factor.subs(t, t - 1)))
