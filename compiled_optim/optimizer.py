"""The base class of all optimizers: the param groups, state and ``step`` of torch.optim, from a declaration."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, overload

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.optim import optimizer as of_torch
from torch.optim.optimizer import ParamsT
from typing_extensions import dataclass_transform

from compiled_optim._engine.declaration import coerce, take_fields
from compiled_optim._engine.documentation import Documentation
from compiled_optim._engine.executions.checks import check_dimensions, is_count, number_of
from compiled_optim._engine.executions.dispatch import Execution
from compiled_optim._engine.executions.scaling import Scaling
from compiled_optim._engine.executions.state import count_tensor, make_state
from compiled_optim._engine.executions.work import Work
from compiled_optim._engine.in_graph import operators
from compiled_optim._engine.one_pass import OnePass
from compiled_optim._engine.rule import Rule
from compiled_optim._engine.torch_private import dynamo, optim
from compiled_optim.around_step import AroundStep
from compiled_optim.attached import attachment
from compiled_optim.backward import StepsInBackward
from compiled_optim.declare import Compiled, Flag, Hyper, Switches, Value, flag, number

if TYPE_CHECKING:
    from torch.optim.lr_scheduler import LRScheduler

T = TypeVar("T")

# What a subclass that overrides one of these has a rule of its own for.
_OF_A_RULE = {"update", "scalars", "elementwise", "accepts_sparse", "accepts_dense", "keeps_untouched_rows"}
_OF_A_RULE |= {"accepts_complex", "matrices_only"}


@dataclass_transform(field_specifiers=(number, flag))  # state is no argument
class _Attributes(AroundStep, StepsInBackward):
    """Attributes that are no fields. Type checkers take those of a subclass for arguments of its constructor."""

    # torch.amp.GradScaler sets these around a step if `_step_supports_amp_scaling`
    # (and multiplies its scale by a `grad_scale` that is there already: no default here)
    grad_scale: Tensor | None
    found_inf: Tensor | None

    _attached: Any = None  # what moves an attached schedule
    _compiled: bool | str = False
    _execution: Execution | None = None  # made by the first step, and again after a copy
    _inputs: Any = None  # of the user's graphs


class Optimizer(_Attributes, torch.optim.Optimizer):
    """The base class of all optimizers: an algorithm that is declared once, and runs eagerly or compiled.

    A subclass declares its hyperparameters (`number`), options (`flag`) and state (`buffer`, `counter`, `carried`) with
    the fields of `compiled_optim.declare`, and has two static methods:

    - ``scalars(h, step)`` returns the numbers that an update needs, by name, given the hyperparameters ``h`` and the
      step count. It is called once per step count. With `carried` state it is ``scalars(h, step, s)``.
    - ``update(p, g, s, k, on)`` returns the new parameter and assigns the new state to attributes of ``s``, given the
      parameter ``p``, its gradient ``g``, those scalars as ``k`` and the switches as ``on``.

    The constructor and the documentation of its arguments follow from the fields; see `compiled_optim.AdamW`.

    Raises:
        ValueError: for a hyperparameter out of its range; the message names argument, value and range.

    Example:
        >>> import torch
        >>> from compiled_optim import Optimizer
        >>> from compiled_optim.declare import number
        >>> class SignDescent(Optimizer):
        ...     lr: float = number(default=0.001, low=0, unit="parameter", help="length of a step")
        ...
        ...     @staticmethod
        ...     def scalars(h, step):
        ...         return {"lr": h.lr}
        ...
        ...     @staticmethod
        ...     def update(p, g, s, k, on):
        ...         return p - g.sign() * k.lr
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, -4.0])
        >>> SignDescent([weight], lr=0.5).step()
        >>> weight.tolist()
        [-0.5, 0.5]
    """

    if TYPE_CHECKING:  # arguments of every constructor that are no options of a param group
        params: ParamsT
        compiled: Compiled = flag(default=False, kw_only=True)
        max_grad_norm: float | None = flag(default=None, kw_only=True)
        norm_type: float = flag(default=2.0, kw_only=True)
        error_if_nonfinite: bool = flag(default=False, kw_only=True)
        skip_nonfinite: bool = flag(default=False, kw_only=True)
        ema_decay: float | Callable[[int], float] | None = flag(default=None, kw_only=True)
        state_dtype: torch.dtype | None = flag(default=None, kw_only=True)
        master_weights: bool = flag(default=False, kw_only=True)
        stochastic_rounding: bool | int = flag(default=False, kw_only=True)

        def __init__(self, params: ParamsT, defaults: dict[str, Any] = ..., **options: Any) -> None: ...

    maximize: bool = flag(default=False, switch=True, kw_only=True)
    foreach: bool | None = flag(default=None, kw_only=True)
    differentiable: bool = flag(default=False, kw_only=True)

    rule: ClassVar[Rule]
    accepts_sparse: ClassVar[bool] = False
    accepts_dense: ClassVar[bool] = True
    accepts_complex: ClassVar[bool] = True
    matrices_only: ClassVar[bool | str] = False
    state_at_construction: ClassVar[bool] = False  # False: state is made when the first gradient arrives
    elementwise: ClassVar[bool] = True  # False: ``update`` is given one whole tensor at a time, and may reduce it

    if not TYPE_CHECKING:

        def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
            """Of a class that declares nothing and has its own step, as those derived from torch's Optimizer."""
            torch.optim.Optimizer.__init__(self, params, defaults)
            self._inputs = operators.inputs_of(self)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        fields = take_fields(cls).values()
        # a class that declares nothing new (a user's subclass, a framework's wrapper) keeps its parent's kernels
        if _OF_A_RULE.intersection(own) or any(v is not None for v in fields):
            cls.rule = Rule(cls)
            if "__init__" not in own:
                cls.__init__ = cls.rule.declaration.constructor(cls.__qualname__)  # type: ignore[method-assign]
                cls.__doc__ = Documentation(cls.rule.declaration, cls.__doc__)  # type: ignore[assignment]

    def _construct(self, params: Any, options: dict[str, Any], compiled: bool | str, around: dict[str, Any]) -> None:
        missing = [name for name in ("scalars", "update") if not hasattr(self, name)]
        if missing:
            raise TypeError(f"{type(self).__name__}: a rule needs `scalars` and `update`, and {missing} is not defined")
        defaults = self.rule.declaration.check(options)
        fused = bool(defaults.get("fused"))
        if compiled not in (False, True, "multi_tensor", "foreach"):
            raise ValueError(f"compiled must be False, True, 'multi_tensor' or 'foreach', got {compiled!r}")
        if defaults.get("differentiable") and (compiled or fused):
            chosen = f"compiled={compiled!r}" if compiled else "fused=True"
            raise RuntimeError(f"{chosen} does not support differentiable=True: a kernel records no graph")
        if fused and defaults.get("foreach"):
            raise RuntimeError("fused=True and foreach=True cannot be combined")
        self.validate(self.rule.declaration.read(defaults).hyper)
        self._surround(OnePass(**around))
        if self.rule.extras.any and defaults.get("differentiable"):
            raise RuntimeError(f"differentiable=True does not go with {sorted(around)}: their updates record no graph")
        torch.optim.Optimizer.__init__(self, params, defaults)
        self._compiled = compiled or fused
        if fused or self.rule.extras.factor:
            self._step_supports_amp_scaling = True
        if self.rule.state_at_construction:
            work = self._work()
            for group, choice in zip(self.param_groups, work.read(), strict=True):
                for p in group["params"]:
                    self.state[p].update(make_state(work, p, group, choice.switches))
        self._inputs = operators.inputs_of(self)

    @classmethod
    def validate(cls, h: Hyper) -> None:
        """Raises ValueError for hyperparameters that do not go together."""

    @classmethod
    def keeps_untouched_rows(cls, on: Switches) -> bool:
        """Whether an update leaves the rows that a sparse gradient does not touch as they are, under these switches.

        If not, a sparse gradient is applied as a dense one.

        Raises:
            RuntimeError: for options that do not go with sparse gradients.
        """
        return False

    scalars: ClassVar[Callable[..., dict[str, Value]]]
    update: ClassVar[Callable[..., Value]]

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], T]) -> T: ...

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one optimization step.

        Args:
            closure: reevaluates the model, computes the gradients and returns the loss.

        Returns:
            What ``closure`` returned; None without one.

        Raises:
            CompileError: in strict mode, if the step cannot be compiled although it was to be.
        """
        if closure is None and not is_dynamo_compiling():
            execution = self._execution
            if execution is not None and execution.quick(self):
                self._opt_called = True
                if self._attached is not None:
                    self._attached.advance()
                return None
        if torch.compiler.is_compiling():
            return operators.trace_step(self) if closure is None else operators.trace_closure(self, closure)
        if closure is not None and dynamo.compiles_frames():  # the closure broke the graph
            return operators.resume_closure(self, closure)
        return self._run_step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # else torch wraps it: 10 us a step, even without hooks
    # Else schedulers wrap it in code that breaks graphs. To check the order of calls, they need `_opt_called` only.
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]

    def _run_step(self, closure: Callable[[], Any] | None) -> Any:
        # A step overridden in a subclass was wrapped by torch, which has run the hooks.
        if optim.step_is_observed(self) and type(self).step is Optimizer.step:
            return _observed_step(self) if closure is None else _observed_step(self, closure=closure)
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._averages_are_in:
            raise RuntimeError("step() must not be called within averaged(), where parameters hold their averages")
        work, execution = self._work(), self._execution
        scale, found_inf = self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")
        scaling = None if scale is None and found_inf is None else Scaling(scale, found_inf)
        if execution.surround(work, self._one_pass, scaling):  # type: ignore[union-attr]
            if self._attached is not None:
                self._attached.check()
            if not execution.quick_update(self):  # type: ignore[union-attr]
                execution.step(work)  # type: ignore[union-attr]
            self._stepped()
        return loss

    def _check_schedule(self) -> None:
        """Raises, before the step changes anything, if the attached schedule has no next value."""
        if self._attached is not None:
            self._attached.check()

    def _stepped(self) -> None:
        """Counts a step that was taken, for torch's schedulers and for the attached one."""
        self._opt_called = True
        if self._attached is not None:
            self._attached.advance()

    def attach(self, schedule: LRScheduler) -> None:
        """Steps a schedule after every step of this optimizer, so that nobody needs to call ``schedule.step()``.

        The result is the same as by hand, also when the schedule or the param groups are changed in between: a step of
        the schedule runs on the host, and calls functions of yours, such as that of a LambdaLR, as often as by hand. In
        a CUDA graph the learning rate must be a tensor, which each replay moves by the formula of the schedule. Once
        the schedule has ended, a step of the optimizer raises the schedule's ValueError and updates nothing.

        The optimizer now holds the schedule, and a schedule of `compiled_optim.lr_scheduler` refers to the optimizer
        weakly. ``state_dict`` does not include the schedule: save and load its own ``state_dict`` too. A copy of the
        optimizer has no schedule.

        Args:
            schedule: built on this optimizer, of `compiled_optim.lr_scheduler`; or of ``torch.optim.lr_scheduler``, as
                libraries make them, which has no formula for a CUDA graph.

        Raises:
            TypeError: for one that is stepped with a metric, as ReduceLROnPlateau.
            ValueError: if it belongs to another optimizer, or a schedule is attached already.
        """
        if self._attached is not None:
            present, name = self._attached.schedule, type(schedule).__name__
            if present is schedule:
                raise ValueError(f"schedule must not be attached twice, got the same {name} again")
            raise ValueError(
                f"schedule must be the only one attached, got a {name} beside a {type(present).__name__}: attach a "
                "ChainedScheduler or a SequentialLR of both, or detach() the first"
            )
        if getattr(schedule, "optimizer", None) is not self:
            raise ValueError(f"schedule must be one of this optimizer, got a {type(schedule).__name__} of another")
        self._attached = attachment(schedule)

    def detach(self, schedule: LRScheduler) -> None:
        """Undoes `attach`. The schedule keeps its place; step it by hand from there.

        Raises:
            ValueError: if it is not attached.
        """
        if self._attached is None or self._attached.schedule is not schedule:
            raise ValueError(f"schedule must be the one that is attached, got a {type(schedule).__name__} that is not")
        schedule._refer(weakly=False)
        self._attached = None

    def _work(self) -> Work:
        """What the engine is handed."""
        if self._execution is None:
            self._execution = Execution(self.rule, self._compiled)
        return self._execution.work_on(self.param_groups, self.state, self.defaults)

    def __getstate__(self) -> dict[str, Any]:
        amp = {k: v for k, v in self.__dict__.items() if k == "_step_supports_amp_scaling"}
        around = {} if self._one_pass is None else {"_one_pass": self._one_pass.but()}
        return {**super().__getstate__(), "_compiled": self._compiled, **amp, **around}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "differentiable" not in self.rule.declaration.options:  # torch adds it, which graphs would be guarded by
            self.defaults.pop("differentiable", None)
        if self._one_pass is not None:
            self._surround(self._one_pass)
        for group in self.param_groups:
            for name, field in self.rule.declaration.options.items():
                if isinstance(field, Flag):
                    group.setdefault(name, field.default)
                    if not field.init:
                        group[name] = field.default
            self._restore_counts(group)
            for p in group["params"]:
                state = self.state.get(p, {})
                kept = {k: v for k, v in state.items() if k in self.rule.declaration.buffers and isinstance(v, Tensor)}
                # torch.optim.SGD keeps the momentum of sparse gradients sparse
                state.update({k: v.to_dense() for k, v in kept.items() if v.is_sparse})
        self._inputs = self._inputs or operators.inputs_of(self)

    def _restore_counts(self, group: dict[str, Any]) -> None:
        """Makes tensors of counts that are numbers, or that torch's ``load_state_dict`` cast like moments."""
        for p in group["params"]:
            for name in self.rule.declaration.counts:
                count = self.state.get(p, {}).get(name)
                readable = p.is_meta or not (isinstance(count, Tensor) and count.is_meta)
                if count is not None and not (name == "step" and is_count(count) and readable):
                    self.state[p][name] = count_tensor(p, group, number_of(self._work(), p, name, count))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a param group, as in torch.optim. Lists and NumPy's numbers among its options become plain values."""
        count = len(self.param_groups)
        try:
            optim.undecorated("add_param_group")(self, param_group)
            group = self.param_groups[-1]
            group.update({name: coerce(group[name]) for name in self.rule.declaration.options})
            check_dimensions(self.rule, group, group["params"], self.param_groups)
        except BaseException:
            del self.param_groups[count:]
            raise

    def state_dict(self) -> dict[str, Any]:
        """Returns the state in torch.optim's layout, so that either library loads what the other saved."""
        saved: dict[str, Any] = optim.undecorated("state_dict")(self)
        for group in saved.get("param_groups", ()):
            options = {k: v for k, v in group.items() if k in self.rule.declaration.options and not isinstance(v, list)}
            group.update({name: coerce(value) for name, value in options.items()})
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads what ``state_dict`` returned, that of this class or of the same class in torch.optim.

        If both optimizers were given ``named_parameters()``, parameters are matched by name, in any order and split
        into param groups, which take the options that their parameters had; otherwise by position, as in torch.optim.
        A learning rate that is a tensor takes the saved value. If this raises, the optimizer is unchanged.

        Raises:
            KeyError, TypeError, ValueError: for a checkpoint of another make; the message names what was expected. For
                names that do not match it lists which are missing, unexpected or of another shape.
        """
        from compiled_optim._engine import checkpoint  # few processes load one

        with checkpoint.all_or_nothing(self):
            checkpoint.load(self, state_dict)
            if self._attached is not None:
                self._attached.optimizer_loaded()

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__()} - _SETTINGS)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients, as in torch.optim."""
        if torch.compiler.is_compiling():
            operators.trace_zero_grad(self, set_to_none)
        elif set_to_none or self._execution is None or not self._execution.zero_gradients(self.param_groups):
            optim.undecorated("zero_grad")(self, set_to_none)
            if self._execution is not None:
                self._execution.restart()


take_fields(Optimizer)
# The rule of subclasses that declare none and step by themselves: without options, so that any param group will do.
Optimizer.rule = Rule(type("Optimizer", (Optimizer,), dict.fromkeys(("maximize", "foreach", "differentiable"))))
_SETTINGS = {k for k, v in vars(Optimizer)["__annotations__"].items() if "ClassVar" in v} - {"scalars", "update"}

# Runs the hooks, and makes an entry in the profiler.
_observed_step = torch.optim.Optimizer.profile_hook_step(Optimizer._step)


def __getattr__(name: str) -> Any:
    """What else ``torch.optim.optimizer`` has, such as ``required`` and the hooks of all optimizers."""
    if not hasattr(of_torch, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(of_torch, name)
