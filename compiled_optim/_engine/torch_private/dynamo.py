"""Dynamo's state, and what a traced step asks of it.

Dynamo is imported by the functions that only a trace calls: a warm start must not pay a second for it.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from compiled_optim._engine.torch_private import version

try:
    from torch._C._dynamo.eval_frame import (
        _FrameAction,
        _FrameExecStrategy,
        get_eval_frame_callback,
        set_code_exec_strategy,
        set_eval_frame,
    )
    from torch.utils._python_dispatch import _disable_current_modes

    # Objects of a class under this base can be arguments of an operator. Importing the old names in torch 2.14 warns.
    if TYPE_CHECKING or version.torch_version() < (2, 14):
        from torch._library.opaque_object import register_opaque_type as _register_opaque
        from torch._opaque_base import OpaqueBase as OpaqueBase

        _BY_REFERENCE = "reference"
    else:
        from torch._custom_class_base import CustomClassBase as OpaqueBase
        from torch._library.opaque_object import register_custom_class as _register_opaque

        _BY_REFERENCE = "symbolic"
except ImportError as error:
    version.missing.append(version.lacks(error))
    OpaqueBase = object  # type: ignore[misc, assignment]

T = TypeVar("T")


def compiling_disabled() -> str | None:
    """Why torch itself was told not to compile, or None."""
    if os.environ.get("TORCH_COMPILE_DISABLE", "0") == "1":
        return "TORCH_COMPILE_DISABLE=1"
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    stance = getattr(getattr(eval_frame, "_stance", None), "stance", "default")
    return f'torch.compiler.set_stance("{stance}")' if stance in ("force_eager", "eager_on_recompile") else None


def watched() -> tuple[tuple[Any, ...], ...]:
    """Where the host module sees that nothing compiles and torch was not told not to: see `quick` in host.cpp."""
    return (
        (vars(torch.compiler), "_is_compiling_flag", False),
        (sys.modules, "torch._dynamo.eval_frame", "_stance", "stance", "default"),
    )


@contextmanager
def outside_modes() -> Iterator[None]:
    """Leaves all modes that the caller has entered: inference, default device, autocast, fake tensors, transforms."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    with ExitStack() as stack:
        while torch._C._len_torch_function_stack():  # a default device is one of these
            stack.enter_context(torch.overrides._pop_mode_temporarily())
        stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C._DisableAutocast())
        stack.enter_context(torch.inference_mode(False))
        yield


def outside_graphs(function: Callable[..., T]) -> Callable[..., T]:
    """Keeps ``function`` out of a surrounding ``torch.compile``, but not the function that is its last argument."""
    if version.missing:
        return never_traced(function)

    # `torch.compiler.disable` would silently run the closure, and the model in it, eagerly.
    @functools.wraps(function)
    def outside(*args: Any) -> Any:
        *others, closure = args
        compiling = set_eval_frame(None)

        def compiled(*inner: Any, **options: Any) -> Any:
            set_eval_frame(compiling)
            try:
                return closure(*inner, **options)
            finally:
                set_eval_frame(None)

        try:
            return function(*others, compiled)
        finally:
            set_eval_frame(compiling)

    code: Any = outside.__code__  # type: ignore[attr-defined]
    set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT))
    outside._torchdynamo_disable = True  # type: ignore[attr-defined]
    return outside


def never_traced(function: Callable[..., T]) -> Callable[..., T]:
    """Keeps ``function``, and all it calls, out of a surrounding ``torch.compile``."""
    decorate = getattr(torch, "_disable_dynamo", None)
    if decorate is not None:
        return decorate(function)  # type: ignore[no-any-return]

    @functools.wraps(function)
    def outside(*args: Any, **options: Any) -> T:
        return torch.compiler.disable(function)(*args, **options)  # type: ignore[no-untyped-call, no-any-return]

    return outside


def skipped(function: Callable[..., T]) -> Callable[..., T]:
    """Keeps ``function``, and all it calls, from being compiled where compiled code calls it outside of its graphs.

    Unlike `never_traced` this costs nothing per call, and Dynamo must not see the call in what it traces.
    """
    if not version.missing:
        code: Any = function.__code__
        set_code_exec_strategy(code, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return function


def compiles_frames() -> bool:
    """Whether a compiled function called this one outside of its graphs."""
    return not version.missing and callable(get_eval_frame_callback())


def constant_in_graphs(method: Callable[..., T]) -> Callable[..., T]:
    """Lets Dynamo call ``method`` on the real object while it traces. The result is a constant of the graph."""
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler's decorator imports Dynamo
    return method


def register_opaque(cls: type[OpaqueBase], guard: Callable[[Any], list[Any]] | None = None) -> None:
    """Lets graphs take objects of this class as inputs, by reference.

    A graph is reused only while ``guard`` returns what it returned when the graph was traced.
    """
    _register_opaque(cls, typ=_BY_REFERENCE, guard_fn=guard)


def join_trace(cls: type) -> str:
    """While Dynamo traces: makes it treat objects of this class like any other, from now on and in this graph.

    Optimizers would be guarded by identity, so that each instance needs a graph, and a look at ``param_groups`` would
    make every number in them a constant.

    Returns:
        Why that cannot be, or an empty string.
    """
    if version.missing:
        return version.missing[0]
    try:
        from torch._dynamo.exc import RestartAnalysis
        from torch._dynamo.symbolic_convert import InstructionTranslator as InstructionTranslator  # of `_tracing`
        from torch._dynamo.variables.builder import VariableBuilder
        from torch._dynamo.variables.constant import ConstantVariable

        handlers, as_object = VariableBuilder._type_dispatch(), VariableBuilder.wrap_user_defined
    except (ImportError, AttributeError) as error:
        return version.lacks(error)
    # Dynamo has one object for each of these in all graphs. torch 2.13 notes in it where the constant was read, such as
    # in a missing gradient, and reads it there again: `p.grad = None` in another graph then assigned that gradient.
    for constant in (None, True, False):
        ConstantVariable.create(constant).source = None
    if cls not in handlers and issubclass(cls, torch.optim.Optimizer):
        handlers[cls] = as_object
        raise RestartAnalysis(restart_reason=f"{cls.__name__} is traced as an object")
    return ""


def _tracing() -> Any:
    """The graph that Dynamo is tracing."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx().output


def gradients_are_traced(params: Sequence[torch.Tensor]) -> bool:
    """While Dynamo traces: whether its graph sets ``.grad`` of a parameter, or has a gradient among its inputs."""
    output = _tracing()
    known, attributes = output.side_effects.id_to_variable, output.side_effects.store_attr_mutations
    if any("grad" in attributes.get(known.get(id(p)), ()) for p in params):
        return True

    def memory(t: Any) -> int | None:
        dense = isinstance(t, torch.Tensor) and t.layout == torch.strided
        return t.untyped_storage()._cdata if dense else None

    gradients = {memory(p.grad) for p in params} - {None}
    return any(memory(argument.example) in gradients for argument in output.graphargs)


def change_is_pending(objects: Iterable[Any]) -> bool:
    """While Dynamo traces: whether the code so far changes one of these objects. That takes effect after the graph."""
    effects = _tracing().side_effects
    variables = (effects.id_to_variable.get(id(o)) for o in objects)
    return any(effects.is_modified(v) for v in variables if v is not None)


def break_graph() -> None:
    """Ends the graph that Dynamo is tracing. Dynamo traces this function itself."""
    torch._dynamo.graph_break()


def mark_static(tensors: Iterable[torch.Tensor]) -> None:
    """Tells CUDA graphs that these tensors stay where they are. Otherwise each replay would copy them."""
    for tensor in tensors:
        tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]  # as mark_static_address(guard=False)


def graphs_compiled() -> int:
    """How many graphs Dynamo has compiled in this process. ``torch.compiler.reset`` does not reset it."""
    utils = sys.modules.get("torch._dynamo.utils")
    return int(utils.counters["stats"]["unique_graphs"]) if utils else 0
