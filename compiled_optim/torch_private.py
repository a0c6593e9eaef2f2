"""What torch keeps private and an optimizer needs: Dynamo's state, its hooks, its methods without decorators.

With lower.py the only file that touches the private parts of torch; `tests/test_private_apis.py` says which upstream
change broke when one of these moves. Dynamo is imported by the functions that a trace calls only. Where a part is
missing, steps are eager and outside of graphs, and say so.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch


def torch_version() -> tuple[int, ...]:
    """Major and minor."""
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


MISSING = ""  # which of these parts this version of torch lacks
try:
    from torch._C._dynamo.eval_frame import (
        _FrameAction,
        _FrameExecStrategy,
        get_eval_frame_callback,
        set_code_exec_strategy,
        set_eval_frame,
    )
    from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
    from torch.autograd import _profiler_enabled  # type: ignore[attr-defined]
    from torch.optim.lbfgs import _strong_wolfe
    from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
    from torch.utils._python_dispatch import _disable_current_modes

    # An object of a class under this base can be an argument of an operator. torch 2.14 prints a warning of the old
    # names when they are imported.
    if TYPE_CHECKING or torch_version() < (2, 14):
        from torch._library.opaque_object import register_opaque_type as _register_opaque
        from torch._opaque_base import OpaqueBase as OpaqueBase

        _BY_REFERENCE = "reference"
    else:
        from torch._custom_class_base import CustomClassBase as OpaqueBase
        from torch._library.opaque_object import register_custom_class as _register_opaque

        _BY_REFERENCE = "symbolic"
except ImportError as error:
    MISSING = f"torch {torch.__version__} lacks a part that compiled_optim needs: {error}"
    OpaqueBase = object  # type: ignore[misc, assignment]

T = TypeVar("T")


def _missing(*args: Any, **options: Any) -> Any:
    raise RuntimeError(MISSING)


def compiling_disabled() -> str | None:
    """Why torch itself was told not to compile, or None."""
    if os.environ.get("TORCH_COMPILE_DISABLE", "0") == "1":
        return "TORCH_COMPILE_DISABLE=1"
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    stance = getattr(getattr(eval_frame, "_stance", None), "stance", "default")
    return f'torch.compiler.set_stance("{stance}")' if stance in ("force_eager", "eager_on_recompile") else None


@contextmanager
def outside_modes() -> Iterator[None]:
    """What the caller has entered is left: inference mode, a default device, autocast, fake tensors, transforms."""
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
    """``function`` kept out of a surrounding ``torch.compile``, but not its last argument, a function."""
    if MISSING:
        return never_traced(function)

    # `torch.compiler.disable` would silently run a closure and the model in it eagerly (#123479)
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
    """``function``, and all it calls, kept out of a surrounding ``torch.compile``."""
    decorate = getattr(torch, "_disable_dynamo", None)
    if decorate is not None:
        return decorate(function)  # type: ignore[no-any-return]

    @functools.wraps(function)
    def outside(*args: Any, **options: Any) -> T:
        return torch.compiler.disable(function)(*args, **options)  # type: ignore[no-untyped-call, no-any-return]

    return outside


def compiles_frames() -> bool:
    """Whether the caller was called by a function under ``torch.compile``, of whose graphs it is no part."""
    return not MISSING and callable(get_eval_frame_callback())


def constant_in_graphs(method: Callable[..., T]) -> Callable[..., T]:
    """``method`` called on the real object while Dynamo traces; what it returns is a constant of the graph."""
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler's decorator imports Dynamo
    return method


def register_opaque(cls: type[OpaqueBase], guard: Callable[[Any], list[Any]] | None = None) -> None:
    """Lets graphs take objects of this class as inputs, by reference; one is right for what ``guard`` answers only."""
    _register_opaque(cls, typ=_BY_REFERENCE, guard_fn=guard)


def join_trace(cls: type) -> str:
    """While Dynamo traces: has it take objects of this class as any other, from now on and in this graph.

    Optimizers would be guarded by identity, so that each instance needs a graph, and a look at ``param_groups`` would
    make every number in them a constant.

    Returns:
        Why that cannot be, or an empty string.
    """
    if MISSING:
        return MISSING
    try:
        from torch._dynamo.exc import RestartAnalysis
        from torch._dynamo.symbolic_convert import InstructionTranslator as InstructionTranslator  # of `_tracing`
        from torch._dynamo.variables.builder import VariableBuilder
        from torch._dynamo.variables.constant import ConstantVariable

        handlers, as_object = VariableBuilder._type_dispatch(), VariableBuilder.wrap_user_defined
    except (ImportError, AttributeError) as error:
        return f"torch {torch.__version__} lacks a part that compiled_optim needs: {error}"
    # One object stands for each of these, in all graphs; and torch 2.13 notes in it where one was read, such as in a
    # missing gradient, to read it there again: `p.grad = None` in another graph then assigned that gradient.
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
    """While Dynamo traces: whether its graph sets ``.grad`` of a parameter, or takes in the memory of a gradient."""
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
    """While Dynamo traces: whether the code so far changes one of these objects, which happens after the graph only."""
    effects = _tracing().side_effects
    variables = (effects.id_to_variable.get(id(o)) for o in objects)
    return any(effects.is_modified(v) for v in variables if v is not None)


def break_graph() -> None:
    """Ends the graph that Dynamo is tracing; traced."""
    torch._dynamo.graph_break()


def mark_static(tensors: Iterable[torch.Tensor]) -> None:
    """Tells CUDA graphs that these stay where they are, or each replay would copy them."""
    for tensor in tensors:
        tensor._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]  # as mark_static_address(guard=False)


@functools.cache
def undecorated(name: str) -> Callable[..., Any]:
    """A method of torch.optim.Optimizer without the decorator that imports Dynamo (1 s in a fresh process)."""
    method: Callable[..., Any] = inspect.unwrap(getattr(torch.optim.Optimizer, name))
    return method


def step_has_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a hook is to run before or after a step."""
    return bool(
        MISSING  # then torch looks for itself
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def step_is_observed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a hook or a profiler wants to know of a step."""
    return step_has_hooks(optimizer) or _profiler_enabled()


def sparse_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values ``[nnz, ...]`` and indices ``[sparse dimensions, nnz]`` of a COO tensor, coalesced or not."""
    return tensor._values(), tensor._indices()


# The line search of torch.optim.LBFGS: (evaluate, x, t, d, loss, grad, gtd, max_ls=) -> (loss, grad, t, evaluations)
strong_wolfe: Callable[..., tuple[float, torch.Tensor, Any, int]] = _missing if MISSING else _strong_wolfe


def check_indices(tensor: torch.Tensor) -> None:
    """Raises RuntimeError for an index out of range in a COO tensor."""
    values, indices = sparse_parts(tensor)
    torch.sparse_coo_tensor(indices, values, tensor.shape, check_invariants=True)


def flatten(tensors: list[torch.Tensor]) -> torch.Tensor:
    """One 1-D tensor with the elements of all."""
    if MISSING:
        return torch.cat([t.reshape(-1) for t in tensors])
    return _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call, no-any-return]


def unflatten(flat: torch.Tensor, like: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The parts of `flatten`'s result, with the shapes of ``like``."""
    if MISSING:
        return tuple(
            part.view_as(t) for part, t in zip(torch.split(flat, [t.numel() for t in like]), like, strict=True)
        )
    return _unflatten_dense_tensors(flat, like)  # type: ignore[no-untyped-call, no-any-return]


def graphs_compiled() -> int:
    """How many graphs Dynamo has compiled in this process; ``torch.compiler.reset`` does not set it back."""
    utils = sys.modules.get("torch._dynamo.utils")
    return int(utils.counters["stats"]["unique_graphs"]) if utils else 0


def is_dtensor(value: Any) -> bool:
    """Whether it is a DTensor, whose module takes 1 s to import: where nobody has, there is none."""
    return isinstance(value, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def local_shard(tensor: Any) -> torch.Tensor:
    """What this process holds of a DTensor, the tensor itself: of a parameter, ``to_local`` is a new view each time."""
    shard: Any = tensor._local_tensor
    # what a collective returned that may be under way
    return shard.trigger_wait() if type(shard).__name__ == "AsyncCollectiveTensor" else shard  # type: ignore[no-any-return]
