"""What stands for ``step`` and ``zero_grad`` inside a user's ``torch.compile``d function, for Dynamo to trace.

A compiled step is one operator, however many parameters there are. It takes gradients from ``.grad`` when it runs, so
that one which is missing needs no other graph; but where the graph itself makes or changes gradients, it is given them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compiled_optim._engine.in_graph.handles import TOKEN, Handle, LiveInputs, Name, operator
from compiled_optim._engine.torch_private import dynamo, optim


def inputs_of(optimizer: Any) -> LiveInputs:
    """What the graphs of an optimizer will take in."""
    rule = getattr(optimizer, "rule", None)
    if rule is None or not rule.declaration.options or optimizer._compiled or rule.extras.any:
        return LiveInputs(optimizer)
    # imported here, because compiled optimizers have no use for it and would pay for it in their first step
    from compiled_optim._engine.in_graph.traced import TracedState

    return TracedState(optimizer)


def _enter(owner: Any) -> Any:
    """The inputs of its graphs; None where steps are no part of graphs, be it for the version of torch."""
    inputs = owner._inputs
    if not inputs.begin_trace():
        return None
    if inputs.change_is_pending():
        dynamo.break_graph()
    return inputs


@dynamo.never_traced
def _step_outside_graphs(optimizer: Any) -> None:
    optimizer._run_step(None)


@dynamo.never_traced
def _zero_grad_outside_graphs(optimizer: Any, set_to_none: bool) -> None:
    optim.undecorated("zero_grad")(optimizer, set_to_none)


@dynamo.never_traced
def _schedule_outside_graphs(schedule: Any, args: tuple[Any, ...]) -> None:
    schedule.step(*args)


def trace_step(optimizer: Any) -> None:
    """A step of an optimizer that declares a rule."""
    inputs = _enter(optimizer)
    outside = inputs is None or optimizer.defaults.get("differentiable") or inputs.changes_gradients()
    if outside or inputs.cannot_be_passed():
        _step_outside_graphs(optimizer)  # operators record no derivatives and write no gradients
        return
    if optimizer._compiled:
        inputs.begin_kernels()
    with torch.no_grad():
        whole = optimizer._compiled or optimizer.rule.extras.any  # what precedes the update is no part of a graph
        if whole or inputs.refuses() or not inputs.trace():
            grads = [p.grad for p in inputs.params] if inputs.gradients_are_traced() else []
            torch.ops.compiled_optim.step(inputs.id, TOKEN, inputs.params, grads, inputs.hyper)


def trace_closure(optimizer: Any, closure: Callable[[], Any]) -> Any:
    """A step with a closure, as a part of the graph."""
    with torch.enable_grad():
        loss = closure()
    trace_step(optimizer)
    return loss


def resume_closure(optimizer: Any, closure: Callable[[], Any]) -> Any:
    """A step whose closure broke the graph. The closure and the update are traced as two graphs."""
    with torch.enable_grad():
        loss = closure()
    _update(optimizer, [p for group in optimizer.param_groups for p in group["params"]])
    return loss


def _update(optimizer: Any, params: list[Tensor]) -> None:
    # Dynamo traces only functions that have tensors among their arguments.
    if torch.compiler.is_compiling():
        trace_step(optimizer)
    else:
        optimizer._run_step(None)


def trace_zero_grad(optimizer: Any, set_to_none: bool) -> None:
    """``zero_grad`` of any optimizer here."""
    inputs = _enter(optimizer)
    if inputs is None or inputs.cannot_be_passed():
        _zero_grad_outside_graphs(optimizer, set_to_none)
    elif set_to_none:
        for p in inputs.params:
            p.grad = None
    elif inputs.gradients_are_traced():
        for p in inputs.params:
            if p.grad is not None:
                p.grad = torch.zeros_like(p.grad)
    else:
        torch.ops.compiled_optim.zero_grad(inputs.id, TOKEN)


def trace_schedule(schedule: Any, *args: Any) -> None:
    """A step of a schedule; ``args``: nothing, or a metric as a tensor."""
    inputs = own = _enter(schedule)
    if own is None or (args and not isinstance(args[0], Tensor)):
        _schedule_outside_graphs(schedule, args)  # a number, such as an epoch, would be a constant
        return
    if own.are_those_of_the_optimizer():
        inputs = schedule.optimizer._inputs
    metric = args[0].detach() if args else None
    torch.ops.compiled_optim.schedule(own.name, inputs.id, TOKEN, inputs.hyper, metric)


def _nothing(*arguments: Any) -> None: ...


@operator(_nothing, "token", "params", "hyper")
def step(handle: Handle, token: Tensor, params: list[Tensor], grads: list[Tensor | None], hyper: list[Tensor]) -> None:
    optimizer: Any = handle.owner()
    inputs = optimizer._inputs
    kept = [p.grad for p in inputs.params] if grads else []
    for p, grad in zip(inputs.params, grads, strict=False):
        p.grad = grad
    try:
        inputs.run(lambda: optimizer._run_step(None), (params, inputs.params), (hyper, inputs.hyper))
    finally:
        for p, grad in zip(inputs.params, kept, strict=False):
            p.grad = grad


@operator(_nothing, "token")
def zero_grad(handle: Handle, token: Tensor) -> None:
    optim.undecorated("zero_grad")(handle.owner(), set_to_none=False)


@operator(_nothing, "token", "hyper")
def schedule(name: Name, handle: Handle, token: Tensor, hyper: list[Tensor], metric: Tensor | None) -> None:
    owner: Any = name.owner()
    inputs = handle.owner()._inputs  # type: ignore[union-attr]
    inputs.run(lambda: owner.step(*(() if metric is None else (metric,))), (hyper, inputs.hyper))
