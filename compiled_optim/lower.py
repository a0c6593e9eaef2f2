"""The only file that touches the private parts of torch: tracing on symbolic lengths, Inductor, Dynamo's state.

Checked against torch 2.13; `tests/test_private_apis.py` says which upstream change broke when one of these moves.
Inductor and Dynamo are imported by the functions that lower something, for a warm start must not pay 2 s for them.
"""

from __future__ import annotations

import functools
import inspect
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    get_eval_frame_callback,
    set_code_exec_strategy,
    set_eval_frame,
)
from torch._library.opaque_object import register_opaque_type
from torch._opaque_base import OpaqueBase as OpaqueBase  # an object of such a class can be an argument of an operator
from torch.optim.lbfgs import _strong_wolfe
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from compiled_optim.cache.build import BuildError, find_compiler

if TYPE_CHECKING:
    from compiled_optim.trace import Traced

T = TypeVar("T")

SUPPORTED = ((2, 13), (2, 16))

# The length that lowering sees as a hint; no power of two and no small number, which would be specialised on.
_HINT = 1_000_003
# Inductor's state is process-wide.
_lock = threading.RLock()


class LoweringError(RuntimeError):
    """The rule could not be lowered to one loop over one flat tensor."""


@dataclass(frozen=True)
class Lowered:
    """A C++ function ``kernel``: its source, and for each of its arguments which input it is (None: the length)."""

    source: str
    arguments: tuple[int | None, ...]


def unsupported_version() -> str | None:
    """None, or why this version of torch is not known to work."""
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    low, below = SUPPORTED
    if low <= version < below:
        return None
    return f"torch {torch.__version__} is not known to work: compiled_optim was checked with torch>=2.13,<2.16"


def trace_flat(
    body: Callable[..., list[Any]], flat: Sequence[torch.dtype], scalars: Sequence[torch.dtype], device: str
) -> tuple[torch.fx.GraphModule, Any, list[Any]]:
    """Traces ``body`` on fake 1-D tensors of one symbolic length, followed by 0-d tensors."""
    from torch._dynamo.source import ConstantSource
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    shapes = ShapeEnv()
    with _lock, FakeTensorMode(shape_env=shapes) as mode, torch.no_grad():
        symbol = shapes.create_symbol(_HINT, ConstantSource("numel"))
        numel = shapes.create_symintnode(symbol, hint=_HINT)
        inputs = [torch.empty(numel, device=device, dtype=d) for d in flat]
        inputs += [torch.empty((), device=device, dtype=d) for d in scalars]
        graph = make_fx(body, decomposition_table=select_decomp_table())(*inputs)
    return graph, mode, inputs


class _Recorder:
    """Stands in for a compiled C++ kernel: keeps its source, and the arguments of one call."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.call: tuple[Any, ...] = ()

    def __call__(self, *args: Any) -> None:
        self.call = args


@contextmanager
def _inductor(settings: dict[str, Any]) -> Iterator[None]:
    """Inductor, one thread at a time, with these settings and the compiler that is used: it probes what that can do."""
    import torch._inductor.config as config
    from torch._inductor import cpu_vec_isa

    compiler = find_compiler()  # Inductor's is from CXX when it was imported, and must be one word
    # torch knows its instruction set; Inductor compiles and loads a probe for each, in a directory that is not ours
    widest_first = [
        type("Known", (stock_isa,), {"__bool__": lambda self: True, "__hash__": stock_isa.__hash__})()
        for stock_isa in (cpu_vec_isa.VecAVX512, cpu_vec_isa.VecAVX2)
    ]
    names = {"AVX512": widest_first, "AVX2": widest_first[1:]}
    known = names.get(torch.backends.cpu.get_cpu_capability())
    with _lock, config.patch(settings | ({} if compiler is None else {"cpp.cxx": (compiler.path,)})):
        stock = cpu_vec_isa.valid_vec_isa_list
        if known is not None:
            cpu_vec_isa.valid_vec_isa_list = lambda: known  # type: ignore[assignment]
        try:
            yield
        except Exception as error:  # of parts that are private, or a compiler that does not tell its version
            raise BuildError(f"Inductor raised {type(error).__name__}: {error}") from error
        finally:
            cpu_vec_isa.valid_vec_isa_list = stock


def lower_cpp(traced: Traced, vector_bits: int | None = None) -> Lowered:
    """Lowers to one serial, vectorised C++ loop. Nothing is compiled and no file is written.

    Args:
        vector_bits: the width of the vectors, if not the widest that this machine has.

    Raises:
        LoweringError: when Inductor makes more than one kernel or allocates a buffer.
    """
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    # threads=1: the launcher shares out the work. vec_isa_ok: no 5 s of probes where the instruction set is none that
    # is named above. compile_threads=1: no worker pool, which would steal a core from the training it speeds up.
    settings = {
        "cpp.threads": 1,
        "cpp.simdlen": vector_bits,
        "cpp.vec_isa_ok": True,
        "compile_threads": 1,
        "cpp.force_inline_kernel": True,
        "cpp.enable_kernel_profile": False,
        "cpp_wrapper": False,
    }
    recorders: list[_Recorder] = []

    def record(self: Any, argtypes: Any, source: str) -> _Recorder:
        recorders.append(_Recorder(source))
        return recorders[-1]

    with _inductor(settings), V.set_fake_mode(traced.fake_mode), V.set_debug_handler(DebugContext()):
        lowering = GraphLowering(
            traced.graph, example_inputs=traced.inputs, shape_env=traced.fake_mode.shape_env, is_inference=True
        )
        with V.set_graph_handler(lowering):
            lowering.run(*traced.inputs)
            wrapper = lowering.codegen()[0].value
        stock = AsyncCompile.cpp_pybinding
        AsyncCompile.cpp_pybinding = record  # type: ignore[assignment, method-assign]
        try:
            namespace: dict[str, Any] = {"__name__": "compiled_optim.lowered"}
            exec(compile(wrapper, "<compiled_optim wrapper>", "exec"), namespace)
        finally:
            AsyncCompile.cpp_pybinding = stock  # type: ignore[method-assign]
    if len(recorders) != 1:
        raise LoweringError(f"{traced.signature.name} is not one fusible loop: Inductor made {len(recorders)} kernels")
    # One call on small tensors shows which input is which argument: no generated text is parsed.
    probes = [torch.zeros(64 if t.dim() else (), dtype=t.dtype) for t in traced.inputs]
    namespace["call"](list(probes))
    place = {t.data_ptr(): i for i, t in enumerate(probes)}
    arguments: list[int | None] = []
    for value in recorders[0].call:
        if isinstance(value, torch.Tensor) and value.data_ptr() not in place:
            raise LoweringError(f"{traced.signature.name} is not one fusible loop: Inductor allocates a buffer")
        arguments.append(place[value.data_ptr()] if isinstance(value, torch.Tensor) else None)
    return Lowered(recorders[0].source, tuple(arguments))


def cpp_flags() -> list[str]:
    """The compiler's flags for source that `lower_cpp` returned: headers, vector instructions, semantics."""
    from torch._inductor.cpu_vec_isa import pick_vec_isa

    with _inductor({"cpp.vec_isa_ok": True}):
        isa = pick_vec_isa()
    macros = ["TORCH_INDUCTOR_CPP_WRAPPER", "STANDALONE_TORCH_HEADER", "C10_USING_CUSTOM_GENERATED_MACROS"]
    return [
        *BASE_FLAGS,
        "-O3",
        "-march=native",
        "-fopenmp",
        "-fno-semantic-interposition",  # or the kernel is not inlined in its driver, and reads its scalars per vector
        # as Inductor compiles it: no trapping, no errno, the sign of zero is not kept, and no fused multiply-add
        *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=off"),
        *(f"-D{m}" for m in (*macros, *isa.build_macro())),
        *isa.build_arch_flags().split(),
    ]


def _torch_directory(name: str) -> str:
    return str(Path(torch.__file__).parent / name)


# Linked by name: the loader then finds the copies that torch has loaded, libgomp among them (one pool of threads).
BASE_FLAGS = [
    *("-std=c++20", "-DNDEBUG", "-w"),
    f"-I{_torch_directory('include')}",
    f"-L{_torch_directory('lib')}",
    "-lc10",
]


def compiling_disabled() -> str | None:
    """Why torch itself was told not to compile, or None."""
    if os.environ.get("TORCH_COMPILE_DISABLE", "0") == "1":
        return "TORCH_COMPILE_DISABLE=1"
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")
    stance = getattr(getattr(eval_frame, "_stance", None), "stance", "default")
    return f'torch.compiler.set_stance("{stance}")' if stance in ("force_eager", "eager_on_recompile") else None


def outside_graphs(function: Callable[..., T]) -> Callable[..., T]:
    """``function`` kept out of a surrounding ``torch.compile``, but not its last argument, a function."""

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
    return torch._disable_dynamo(function)  # type: ignore[attr-defined]


def compiles_frames() -> bool:
    """Whether the caller was called by a function under ``torch.compile``, of whose graphs it is no part."""
    return callable(get_eval_frame_callback())


def constant_in_graphs(method: Callable[..., T]) -> Callable[..., T]:
    """``method`` called on the real object while Dynamo traces; what it returns is a constant of the graph."""
    method._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler's decorator imports Dynamo
    return method


def register_opaque(cls: type[OpaqueBase], guard: Callable[[Any], list[Any]] | None = None) -> None:
    """Lets graphs take objects of this class as inputs, by reference; one is right for what ``guard`` answers only."""
    register_opaque_type(cls, typ="reference", guard_fn=guard)


def join_trace(cls: type) -> None:
    """While Dynamo traces: has it take objects of this class as any other, from now on and in this graph.

    Optimizers would be guarded by identity, so that each instance needs a graph, and a look at ``param_groups`` would
    make every number in them a constant.
    """
    from torch._dynamo.exc import RestartAnalysis
    from torch._dynamo.variables.builder import VariableBuilder
    from torch._dynamo.variables.constant import ConstantVariable

    # One object stands for each of these, in all graphs; and torch 2.13 notes in it where one was read, such as in a
    # missing gradient, to read it there again: `p.grad = None` in another graph then assigned that gradient.
    for constant in (None, True, False):
        ConstantVariable.create(constant).source = None
    handlers = VariableBuilder._type_dispatch()
    if cls not in handlers and issubclass(cls, torch.optim.Optimizer):
        handlers[cls] = VariableBuilder.wrap_user_defined
        raise RestartAnalysis(restart_reason=f"{cls.__name__} is traced as an object")


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
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )


def step_is_observed(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a hook or a profiler wants to know of a step."""
    return step_has_hooks(optimizer) or bool(torch.autograd._profiler_enabled())  # type: ignore[attr-defined]


def sparse_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values ``[nnz, ...]`` and indices ``[sparse dimensions, nnz]`` of a COO tensor, coalesced or not."""
    return tensor._values(), tensor._indices()


# The line search of torch.optim.LBFGS: (evaluate, x, t, d, loss, grad, gtd, max_ls=) -> (loss, grad, t, evaluations)
strong_wolfe: Callable[..., tuple[float, torch.Tensor, Any, int]] = _strong_wolfe


def check_indices(tensor: torch.Tensor) -> None:
    """Raises RuntimeError for an index out of range in a COO tensor."""
    values, indices = sparse_parts(tensor)
    torch.sparse_coo_tensor(indices, values, tensor.shape, check_invariants=True)


def flatten(tensors: list[torch.Tensor]) -> torch.Tensor:
    """One 1-D tensor with the elements of all."""
    return torch._utils._flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call, no-any-return]


def unflatten(flat: torch.Tensor, like: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The parts of `flatten`'s result, with the shapes of ``like``."""
    return torch._utils._unflatten_dense_tensors(flat, like)  # type: ignore[no-untyped-call, no-any-return]


def inductor_directory() -> Path:
    """Where ``torch.compile`` builds its libraries, and loads them from."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def kernels_generated() -> int:
    """How many kernels Inductor has generated in this process, for what goes through ``torch.compile``."""
    metrics = sys.modules.get("torch._inductor.metrics")
    return int(metrics.generated_kernel_count) if metrics else 0


def graphs_compiled() -> int:
    """How many graphs Dynamo has compiled in this process; ``torch.compiler.reset`` does not set it back."""
    utils = sys.modules.get("torch._dynamo.utils")
    return int(utils.counters["stats"]["unique_graphs"]) if utils else 0
