"""The base class of the schedulers: torch's ``step``, closed forms, and learning rates that stay what they are."""

from __future__ import annotations

import functools
import types
import warnings
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor, compiler, no_grad
from torch.optim import lr_scheduler

from compiled_optim._engine.in_graph import operators
from compiled_optim._engine.in_graph.handles import LiveInputs
from compiled_optim.lr_scheduler.formulas import Form, evaluate

if TYPE_CHECKING:
    import sympy as sp  # type: ignore[import-untyped]

T = TypeVar("T", float, Tensor)  # a step, and a value at it


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
    if isinstance(new, Tensor) and (new.dim() or new.requires_grad):
        new = new.detach().reshape(())
    (old.detach() if old.requires_grad else old).fill_(new)
    return old


class _Step:
    """A scheduler's ``step``, or in a user's graph an operator.

    No function is wrapped around torch's ``step``, because that one warns in the name of its direct caller.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    def __get__(self, scheduler: Any, owner: Any) -> Any:
        if scheduler is None:
            return self.function
        if compiler.is_dynamo_compiling():
            return functools.partial(operators.trace_schedule, scheduler)
        return types.MethodType(self.function, scheduler)


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
    _calls: ClassVar[str] = ""  # which of the user's functions a step calls, in words
    _take_step = lr_scheduler.LRScheduler.step  # what ``step`` is outside of graphs
    step = _Step(_take_step)
    optimizer = _Reference()
    _inputs: LiveInputs
    _reference: Callable[[], Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__init__ is not lr_scheduler.LRScheduler.__init__:
            # so that a learning rate that requires grad can be filled, and copies of it are detached
            cls.__init__ = no_grad()(cls.__init__)  # type: ignore[method-assign]
        # a class of torch's comes after Scheduler in this order, with a step of its own or the one that all have
        step = next(vars(base)["step"] for base in cls.__mro__ if base is not Scheduler and "step" in vars(base))
        if step is not lr_scheduler.LRScheduler.step and not isinstance(step, _Step):
            cls._take_step, cls.step = step, _Step(step)

    def __new__(cls, *args: Any, **kwargs: Any) -> Scheduler:
        scheduler = super().__new__(cls)
        scheduler._inputs = LiveInputs(scheduler)
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

    def expression(self, group: int = 0, of: str = "lr") -> sp.Expr:
        """The schedule of a param group as a sympy expression in ``t``, which is ``Symbol("t", nonnegative=True)``.

        Args:
            group: the index of the param group.
            of: "lr"; or "momentum" (beta1 for Adam) where the scheduler moves it.

        Raises:
            TypeError: if the schedule is not symbolic; the message says why.
            ValueError: for a group or a quantity that the scheduler does not have.
            ZeroDivisionError: for parameters that the formula divides by zero.
        """
        import sympy as sp

        from compiled_optim.lr_scheduler.symbolic import t

        form = self._checked(group, of)
        expression = sp.sympify(form(t))
        if expression.has(sp.zoo, sp.nan):
            raise ZeroDivisionError(f"{type(self).__name__} divides by zero with {form.values}")
        return expression

    def value(self, t: T, group: int = 0, of: str = "lr") -> T:
        """The value at step ``t`` by the closed form.

        Args:
            t: a number, or a tensor of steps.
            group, of: as for `expression`, and so are the errors.

        Returns:
            A float for a number. For a tensor, a tensor like it, computed on its device without waiting for that.
        """
        return evaluate(self._checked(group, of), t)  # type: ignore[no-any-return]

    def function(self, group: int = 0, of: str = "lr") -> Callable[[Any], Any]:
        """The closed form with all but the step looked up, which is a number or a tensor of steps, as for `value`."""
        return functools.partial(evaluate, self._checked(group, of))

    def latex(self, group: int = 0, of: str = "lr") -> str:
        r"""The formula of a param group in LaTeX, such as ``\eta_{t} = 0.1 \cdot {0.9}^{t}``."""
        import sympy as sp

        return rf"\{'eta' if of == 'lr' else 'mu'}_{{t}} = {sp.latex(self.expression(group, of), mul_symbol='dot')}"

    def _checked(self, group: int, of: str) -> Form:
        self._check(group, of)
        return self._closed_form(group, of)

    def _check(self, group: int, of: str) -> None:
        if of not in self.schedules:
            raise ValueError(f"of must be one of {self.schedules} for this {type(self).__name__}, got {of!r}")
        if group not in range(len(self.optimizer.param_groups)):
            raise ValueError(f"group must be from 0 to {len(self.optimizer.param_groups) - 1}, got {group!r}")

    def _closed_form(self, group: int, of: str, **given: Any) -> Form:
        """The closed form, of values that are looked up now unless they are given."""
        raise TypeError(f"{type(self).__name__} is not symbolic: it has no closed form in the step")

    def _form(self, formula: Callable[..., Any], group: int, given: dict[str, Any]) -> Form:
        """A formula with the values of its arguments after ``t``."""
        code = formula.__code__
        names = code.co_varnames[1 : code.co_argcount]
        return Form(formula, {name: given[name] if name in given else self._parameter(name, group) for name in names})

    def _parameter(self, name: str, group: int) -> Any:
        """The value of an attribute, of ``<name>s[group]``, or of the param group."""
        if hasattr(self, name):
            return getattr(self, name)
        several = getattr(self, f"{name}s", None)
        return self.optimizer.param_groups[group][name] if several is None else several[group]

    def _follow(self) -> None:
        """Takes a step after one of the optimizer that this is attached to."""
        optimizer = self._reference()
        self.optimizer = optimizer  # for a moment: the reference takes longer to look up
        try:
            self._take_step()
        finally:
            if optimizer._attached is not None and optimizer._attached.schedule is self:
                del self.optimizer

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
        self.last_epoch = self.last_epoch + 1 if epoch is None else epoch
        self._set(self.get_lr if epoch is None else getattr(self, "_get_closed_form_lr", self.get_lr))

    def _warn_of_get_lr(self) -> None:
        if not self._get_lr_called_within_step:
            text = "To get the last learning rate computed by the scheduler, please use `get_last_lr()`."
            warnings.warn(text, UserWarning, stacklevel=3)

    def _set(self, get_lr: Callable[[], list[Any]]) -> None:
        self._get_lr_called_within_step = True
        try:
            values = get_lr()
        finally:
            self._get_lr_called_within_step = False
        self._assign(values)

    def _assign(self, values: list[Any], *, strict: bool = True) -> None:
        last: list[Any] = []
        for group, value in zip(self.optimizer.param_groups, values, strict=strict):
            if type(value) is float and type(group["lr"]) is float:
                group["lr"] = value
                last.append(value)
            else:
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


class Relative(Scheduler):
    r"""A schedule that moves the learning rate on from what it is, as torch's does.

    Its closed form is :math:`\eta_t = m + (\eta_0 - m) f(t)`. A learning rate changed by hand stays changed, and
    schedulers can be chained.
    """

    floor: ClassVar[str | None] = None  # the name of m; None is 0
    _formula: Callable[..., Any]

    def _closed_form(self, group: int, of: str, **given: Any) -> Form:
        return self._form(self._formula, group, given)

    def _get_closed_form_lr(self) -> list[Any]:
        forms = [self._closed_form(i, "lr") for i in range(len(self.base_lrs))]
        return [form.formula(self.last_epoch, **form.values) for form in forms]  # nothing is read from a device
