"""What a graph of the user's takes in for an optimizer, or for a schedule: a handle, and tensors."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from operator import is_
from typing import Any, TypeVar

import torch
from torch import Tensor

from compiled_optim._engine.executions.work import hyper_tensors
from compiled_optim._engine.fallback import Fallback
from compiled_optim._engine.torch_private import dynamo, optim, tensor_parts, version

T = TypeVar("T")

# Effect token. Operators declare that they mutate it, so the compiler neither drops nor reorders them.
TOKEN = torch.zeros((), device="cpu")
_fallback = Fallback()  # of all graphs of this process


class Name(dynamo.OpaqueBase):
    """Stands for an optimizer or a schedule among the arguments of an operator."""

    def __init__(self, owner: Any) -> None:
        self.owner = weakref.ref(owner)


class Handle(Name):
    """Stands for one among the inputs of a graph, and guards the graph: its lists are refreshed before each call."""

    def guarded(self) -> list[Any]:
        """Dynamo asks this before each call. A graph is reused only while the answer is the one it was traced with."""
        owner = self.owner()
        return [] if owner is None else owner._inputs.guarded()


_operators: list[tuple[Callable[..., Any], Callable[..., Any], tuple[str, ...]]] = []


def operator(fake: Callable[..., Any], *written: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Makes ``torch.ops.compiled_optim.<name>`` of a function that writes these arguments.

    Args:
        fake: called in its place where there are no values.
    """

    def register(function: Callable[..., T]) -> Callable[..., T]:
        _operators.append((function, fake, written))
        return function

    return register


@functools.cache
def _library() -> Any:
    """The library of the operators, which would be gone with it."""
    dynamo.register_opaque(Name)
    dynamo.register_opaque(Handle, Handle.guarded)
    return torch.library.Library("compiled_optim", "DEF")  # type: ignore[no-untyped-call]


def _define_operators() -> None:
    """Called when a graph is traced, so that a process without graphs does not spend 6 ms on them."""
    # torch.library.custom_op adds 25 us to each call, for autograd and version counters that graphs do not need.
    while _operators:
        function, fake, written = _operators.pop()
        library, name = _library(), function.__name__
        library.define(name + torch.library.infer_schema(function, mutates_args=written))
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"compiled_optim::{name}", fake, lib=library)


class LiveInputs:
    """The tensors of one optimizer, or of a schedule on it.

    They are looked up before each call of a graph, so ``load_state_dict`` and whatever else replaces a tensor needs no
    new graph.
    """

    def __init__(self, owner: Any) -> None:
        self._owner = weakref.ref(owner)
        self._is_schedule = not isinstance(owner, torch.optim.Optimizer)
        # Dynamo checks guards of shorter names first, and this one brings the lists up to date.
        self.id = Handle(owner)
        self.name = Name(owner)
        self.params: list[Tensor] = []
        self.hyper: list[Tensor] = []  # the hyperparameters that are tensors

    @property
    def optimizer(self) -> Any:
        owner = self._owner()
        assert owner is not None, "the operators of a graph outlived their optimizer"
        return owner.optimizer if self._is_schedule else owner

    def refresh(self) -> bool:
        """Brings the lists up to date. Returns whether the parameters changed."""
        groups = self.optimizer.param_groups
        params = groups[0]["params"] if len(groups) == 1 else [p for group in groups for p in group["params"]]
        self.hyper = [v for group in groups for v in hyper_tensors(group)]
        if same(params, self.params):
            return False
        self.params = list(params)
        return True

    def guarded(self) -> list[Any]:
        """Brings the lists up to date. Returns what else a graph depends on."""
        self.refresh()
        return [self._changes_gradients(), self._steps_in_backward()]

    def _changes_gradients(self) -> bool:
        optimizer = self.optimizer
        scaled = vars(optimizer)
        scaling = scaled.get("grad_scale") is not None or scaled.get("found_inf") is not None
        return scaling or optim.step_has_hooks(optimizer)

    def _steps_in_backward(self) -> bool:
        execution = getattr(self.optimizer, "_execution", None)  # an optimizer of torch has none
        return bool(getattr(execution, "in_backward", False))

    # These are called while a graph is traced. What they return is a constant of the graph.

    @dynamo.constant_in_graphs
    def begin_trace(self) -> bool:
        """The first of these calls. Returns whether the step can be a part of the graph."""
        self.refresh()
        if not version.missing:
            _define_operators()
        if obstacle := dynamo.join_trace(type(self._owner())):
            _fallback.tell(f"steps run outside of graphs: {obstacle}", "install a version that is known to work")
        return not obstacle and not self._steps_in_backward()

    @dynamo.constant_in_graphs
    def begin_kernels(self) -> None:
        """Starts to compile the kernels, which takes 4 s, while Dynamo compiles what surrounds the step."""
        work = self.optimizer._work()
        self.optimizer._execution.begin(work)

    @dynamo.constant_in_graphs
    def changes_gradients(self) -> bool:
        """Whether a step may change gradients, by hooks or by scaling. Operators do not declare that they do."""
        return self._changes_gradients()

    @dynamo.constant_in_graphs
    def cannot_be_passed(self) -> bool:
        """Whether Dynamo passes a parameter to no operator: a DTensor, or one whose gradient is of another dtype."""
        return any(tensor_parts.is_dtensor(p) or (p.is_leaf and p.grad_dtype != p.dtype) for p in self.params)

    @dynamo.constant_in_graphs
    def are_those_of_the_optimizer(self) -> bool:
        """Whether the graph of a schedule can use the inputs of its optimizer, so that one guard serves both."""
        return isinstance(getattr(self.optimizer, "_inputs", None), LiveInputs)

    @dynamo.constant_in_graphs
    def gradients_are_traced(self) -> bool:
        """Whether the graph so far reads or makes gradients. They are not in ``.grad`` when it runs then."""
        return dynamo.gradients_are_traced(self.params)

    @dynamo.constant_in_graphs
    def change_is_pending(self) -> bool:
        """Whether the code so far changes what operators read on the host. Such changes happen after the graph."""
        groups = self.optimizer.param_groups
        return dynamo.change_is_pending([groups, *groups, self._owner()])

    def run(self, action: Callable[[], T], *given: tuple[Sequence[Tensor], Sequence[Tensor]]) -> T:
        """Runs an operator. ``given``: pairs of the tensors that it was passed and the real ones.

        If the graph modified a tensor first, it passes a copy. We copy it into the real tensor, run, and copy back.
        """
        pairs = [
            (passed, real)
            for some, reals in given
            if not same(some, reals)
            for passed, real in zip(some, reals, strict=True)
            if passed is not real and not passed.is_set_to(real)
        ]
        with torch.no_grad():
            for passed, real in pairs:
                real.copy_(passed)
            result = action()
            for passed, real in pairs:
                passed.copy_(real)
        return result


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether these are the same objects."""
    return len(a) == len(b) and all(map(is_, a, b))
