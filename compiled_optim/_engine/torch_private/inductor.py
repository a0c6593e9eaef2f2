"""Lowering: a rule traced on a symbolic length, and what Inductor makes of it.

Inductor is imported by the functions that lower something: a warm start must not pay two seconds for it.
"""

from __future__ import annotations

import builtins
import os
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from compiled_optim._engine.cache.compiler import BuildError, find_compiler
from compiled_optim._engine.torch_private import dynamo

# The hint for the symbolic length. Inductor would specialise on a power of two or a small number.
_HINT = 1_000_003
# Inductor's state is process-wide. See `alone`.
_lock = threading.RLock()
_FORK_SECONDS = 60.0  # a lowering takes a few
_torn = False  # whether this process was forked during a lowering all the same


class LoweringError(RuntimeError):
    """The rule could not be lowered to one loop over one flat tensor."""


class UntraceableError(RuntimeError):
    """A user's rule raised while it was traced, or its trace does something other than the rule."""


@dataclass(frozen=True)
class FlatGraph:
    """A rule traced on flat tensors of one symbolic length, with the fake tensors that are its inputs."""

    name: str
    graph: torch.fx.GraphModule
    fake_mode: Any
    inputs: list[Any]


@dataclass(frozen=True)
class Lowered:
    """The source of a function ``kernel``, and for each of its arguments which input it is (None: the length)."""

    source: str
    arguments: tuple[int | None, ...]


class _Thread(threading.local):
    excused = False
    holds = False


_thread = _Thread()


def holds_dynamo() -> bool:
    """Whether this thread holds the lock under which Dynamo compiles."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    return frames is not None and bool(frames.compile_lock._is_owned())


def excuse_from_dynamo(excused: bool) -> None:
    """Sets whether this thread lowers without Dynamo's lock, because its holder waits for this thread."""
    _thread.excused = excused


@contextmanager
def alone() -> Iterator[None]:
    """One thread at a time, here and in Dynamo, outside all modes of the user.

    A fork waits for the end of it, for the child could not go on: neither with an import that is half done, nor with
    what lowering changes while it lasts.
    """
    try:
        convert_frame = _convert_frame()
        # Dynamo's lock first, because a thread that compiles a graph holds it when it comes here.
        with nullcontext() if _thread.excused else convert_frame.compile_lock, _lock, dynamo.outside_modes():
            if _torn:
                raise RuntimeError("this process was forked while another thread lowered a kernel")
            yield
    except LoweringError:
        raise
    except Exception as error:  # from a rule, a private part of torch, or a compiler that does not tell its version
        raise BuildError(f"Inductor raised {type(error).__name__}: {error}") from error


def _convert_frame() -> Any:
    """The module of Dynamo that holds its lock."""
    named, first = "TORCHINDUCTOR_CACHE_DIR" in os.environ, "torch._inductor.compiler_bisector" not in sys.modules
    with _lock:
        from torch._dynamo import convert_frame
        from torch._inductor import compiler_bisector as compiler_bisector
    if first and not named:
        # Importing them makes a directory in $TMPDIR. Lowering writes no file, and a compile would make it again.
        with suppress(KeyError, OSError):
            os.rmdir(os.environ.pop("TORCHINDUCTOR_CACHE_DIR"))
    return convert_frame


def _before_fork() -> None:
    _thread.holds = _lock.acquire(timeout=_FORK_SECONDS)


def _after_fork_in_parent() -> None:
    if _thread.holds:
        _lock.release()


def _after_fork_in_child() -> None:
    global _lock, _torn
    if _thread.holds:
        _lock.release()
    else:
        _lock, _torn = threading.RLock(), True
    if frames := sys.modules.get("torch._dynamo.convert_frame"):
        vars(frames)["compile_lock"] = threading.RLock()  # its holder may be a thread of the parent


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def trace_flat(
    body: Callable[..., list[Any]], flat: Sequence[torch.dtype], scalars: Sequence[torch.dtype], device: str
) -> tuple[torch.fx.GraphModule, Any, list[Any]]:
    """Traces ``body`` on fake 1-D tensors of one symbolic length, followed by 0-d tensors."""
    with alone():
        from torch._dynamo.source import ConstantSource
        from torch._inductor.decomposition import select_decomp_table
        from torch._subclasses.fake_tensor import FakeTensorMode
        from torch.fx.experimental.proxy_tensor import (
            ProxyTorchDispatchMode,
            PythonKeyTracer,
            decompose,
            get_proxy_slot,
            track_tensor_tree,
        )
        from torch.fx.experimental.symbolic_shapes import ShapeEnv

        shapes = ShapeEnv()
        # Not by make_fx, which changes modules and compiled functions in every thread while it traces.
        tracer = PythonKeyTracer()
        tracer.root, tracer.graph, tracer.tensor_attrs = torch.nn.Module(), torch.fx.Graph(), {}
        with FakeTensorMode(shape_env=shapes) as mode, torch.no_grad():
            symbol = shapes.create_symbol(_HINT, ConstantSource("numel"))
            numel = shapes.create_symintnode(symbol, hint=_HINT)
            inputs = [torch.empty(numel, device=device, dtype=d) for d in flat]
            inputs += [torch.empty((), device=device, dtype=d) for d in scalars]
            for i, tensor in enumerate(inputs):
                placeholder = tracer.create_proxy("placeholder", f"arg{i}_1", (), {})
                track_tensor_tree(tensor, placeholder, constant=None, tracer=tracer)
            with ProxyTorchDispatchMode(tracer, "real"), decompose(select_decomp_table()):
                results = body(*inputs)
            tracer.create_node("output", "output", ([get_proxy_slot(t, tracer).proxy.node for t in results],), {})
        tracer.graph.eliminate_dead_code()
        return torch.fx.GraphModule(tracer.root, tracer.graph), mode, inputs


class WithoutWrites:
    """A function that `trace_flat` can trace although it writes to tensors of its own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        from torch._dispatch.python import enable_python_dispatcher

        with enable_python_dispatcher():  # else torch 2.15 decomposes foreach operations for real sizes only
            return torch.func.functionalize(self.function)(*args)


class Recorder:
    """Stands in for a compiled kernel: keeps its source, and the arguments of one call."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.call: tuple[Any, ...] = ()

    def __call__(self, *args: Any, **options: Any) -> None:
        self.call = args

    run = __call__


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Another value of an attribute. See `alone`."""
    stock = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, stock)


@contextmanager
def _inductor(settings: dict[str, Any]) -> Iterator[None]:
    """Inductor, with these settings and the compiler that is used: it probes what that can do. See `alone`."""
    import torch._inductor.config as config
    from torch._inductor import cpu_vec_isa

    compiler = find_compiler()  # Inductor read CXX when it was imported, and takes one word only
    # torch knows its instruction set; Inductor compiles and loads a probe for each, in a directory that is not ours
    widest_first = [
        type("Known", (stock_isa,), {"__bool__": lambda self: True, "__hash__": stock_isa.__hash__})()
        for stock_isa in (cpu_vec_isa.VecAVX512, cpu_vec_isa.VecAVX2)
    ]
    names = {"AVX512": widest_first, "AVX2": widest_first[1:]}
    known = names.get(torch.backends.cpu.get_cpu_capability())
    probed = nullcontext() if known is None else _replaced(cpu_vec_isa, "valid_vec_isa_list", lambda: known)
    with config.patch(settings | ({} if compiler is None else {"cpp.cxx": (compiler.path,)})), probed:
        yield


# Functions of bfloat16.h.
_CONVERSIONS = {(torch.bfloat16, torch.float32): "widened", (torch.float32, torch.bfloat16): "rounded"}


@contextmanager
def _whole_registers(dtypes: Collection[torch.dtype]) -> Iterator[None]:
    """Lets Inductor's loop take as many elements at a time as the narrowest dtype has in a register. See `alone`.

    Among float32 tensors Inductor fills half of a bfloat16 or float16 register, by way of the stack: a load waits for
    the stores before it, and kernels took 3 to 6 times as long. Whole registers are converted by bfloat16.h.
    """
    from torch._inductor.codegen.cpp import CppVecKernel, TilingSelect
    from torch._inductor.cpu_vec_isa import VecAVX2, VecAVX512, pick_vec_isa

    narrowest = min(dtype.itemsize for dtype in dtypes)
    select: Any = TilingSelect.select_tiling
    convert: Any = CppVecKernel.get_to_dtype_expr

    def select_tiling(self: Any, *args: Any) -> Any:
        factors, *others = select(self, *args)
        return [max(factor, pick_vec_isa().bit_width() // (8 * narrowest)) for factor in factors], *others

    def get_to_dtype_expr(self: Any, src: Any, dtype: Any, src_dtype: Any, *args: Any, **options: Any) -> Any:
        name = _CONVERSIONS.get((src_dtype, dtype))
        is_whole = 16 * self.tiling_factor == self.vec_isa.bit_width()
        if name and is_whole and src.is_vec and isinstance(self.vec_isa, VecAVX2 | VecAVX512):
            return f"{name}({src})"
        return convert(self, src, dtype, src_dtype, *args, **options)

    with (
        _replaced(TilingSelect, "select_tiling", select_tiling),
        _replaced(CppVecKernel, "get_to_dtype_expr", get_to_dtype_expr),
    ):
        yield


def lower_cpp(traced: FlatGraph, vector_bits: int | None = None) -> Lowered:
    """Lowers to one serial, vectorised C++ loop. Nothing is compiled and no file is written.

    Args:
        vector_bits: the width of the vectors, if not the widest that this machine has.

    Raises:
        LoweringError: when Inductor makes more than one kernel or allocates a buffer.
    """
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
    recorders: list[Recorder] = []

    class AsyncCompile:
        def cpp_pybinding(self, argtypes: Any, source: str) -> Recorder:
            recorders.append(Recorder(source))
            return recorders[-1]

        def wait(self, scope: dict[str, Any]) -> None: ...

    dtypes = {t.dtype for t in traced.inputs}
    with alone(), _inductor(settings), _whole_registers(dtypes), warnings.catch_warnings():
        # Both become float32 as they are loaded. Inductor warns for the sake of kernels that compute in them.
        warnings.filterwarnings("ignore", "bf16 and fp16 are mixed", UserWarning)
        lowered = single_kernel(
            traced, recorders, {"torch._inductor.async_compile": SimpleNamespace(AsyncCompile=AsyncCompile)}
        )
    header = '#include "bfloat16.h"' if torch.bfloat16 in dtypes else ""
    return replace(lowered, source=header + lowered.source)


def single_kernel(traced: FlatGraph, recorders: Sequence[Recorder], modules: dict[str, Any]) -> Lowered:
    """The one kernel that Inductor makes of a graph; to be called `alone`, with Inductor's settings in place.

    Args:
        recorders: where the stand-ins for Inductor's compiler, among the ``modules``, put a recorder for each kernel.
        modules: what Inductor's wrapper imports instead of modules of these names.

    Raises:
        LoweringError: when Inductor makes more than one kernel or allocates a buffer.
    """
    from torch._inductor.debug import DebugContext
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V

    with V.set_fake_mode(traced.fake_mode), V.set_debug_handler(DebugContext()):
        lowering = GraphLowering(
            traced.graph, example_inputs=traced.inputs, shape_env=traced.fake_mode.shape_env, is_inference=True
        )
        with V.set_graph_handler(lowering):
            lowering.run(*traced.inputs)
            wrapper = lowering.codegen()[0].value

    def import_(name: str, *args: Any) -> Any:
        return modules[name] if name in modules else __import__(name, *args)

    namespace: dict[str, Any] = {"__builtins__": {**vars(builtins), "__import__": import_}}
    exec(compile(wrapper, "<compiled_optim wrapper>", "exec"), namespace)
    # One call on small tensors shows which input is which argument. No generated text is parsed.
    probes = [torch.zeros(64 if t.dim() else (), dtype=t.dtype, device="cpu") for t in traced.inputs]
    if len(recorders) == 1:
        namespace["call"](list(probes))
    if len(recorders) != 1:
        raise LoweringError(f"{traced.name} is not one fusible loop: Inductor made {len(recorders)} kernels")
    place = {t.data_ptr(): i for i, t in enumerate(probes)}
    arguments: list[int | None] = []
    for value in recorders[0].call:
        if isinstance(value, torch.Tensor) and value.data_ptr() not in place:
            raise LoweringError(f"{traced.name} is not one fusible loop: Inductor allocates a buffer")
        if not isinstance(value, torch.Tensor) and value != len(probes[0]):  # a number that the rule computed
            raise LoweringError(f"{traced.name} is not one fusible loop: it takes the number {value}")
        arguments.append(place[value.data_ptr()] if isinstance(value, torch.Tensor) else None)
    return Lowered(recorders[0].source, tuple(arguments))


def cpp_flags() -> list[str]:
    """The compiler's flags for source that `lower_cpp` returned: headers, vector instructions, semantics."""
    with alone(), _inductor({"cpp.vec_isa_ok": True}):
        from torch._inductor.cpu_vec_isa import pick_vec_isa

        isa = pick_vec_isa()
    macros = ["TORCH_INDUCTOR_CPP_WRAPPER", "STANDALONE_TORCH_HEADER", "C10_USING_CUSTOM_GENERATED_MACROS"]
    return [
        *BASE_FLAGS,
        "-O3",
        "-march=native",
        "-fopenmp",
        "-fno-semantic-interposition",  # otherwise the kernel is not inlined and reads its scalars for each vector
        # As Inductor compiles it: no traps, no errno, no signed zeros, no fused multiply-add.
        *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros", "-ffp-contract=off"),
        f"-I{Path(__file__).parent}",
        *(f"-D{m}" for m in (*macros, *isa.build_macro())),
        *isa.build_arch_flags().split(),
    ]


def _torch_directory(name: str) -> str:
    return str(Path(torch.__file__).parent / name)


# Linked by name, so that the loader finds the copies that torch has loaded: with one libgomp there is one thread pool.
BASE_FLAGS = [
    *("-std=c++20", "-DNDEBUG", "-w"),
    f"-I{_torch_directory('include')}",
    f"-L{_torch_directory('lib')}",
    "-lc10",
]


def inductor_directory() -> Path:
    """Where ``torch.compile`` builds its libraries, and loads them from."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def kernels_generated() -> int:
    """How many kernels Inductor has generated in this process, for what goes through ``torch.compile``."""
    metrics = sys.modules.get("torch._inductor.metrics")
    return int(metrics.generated_kernel_count) if metrics else 0
