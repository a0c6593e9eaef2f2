"""Lowering: a rule traced on a symbolic length, and what Inductor makes of it.

With torch_private.py the only file that touches the private parts of torch. Checked against torch 2.11 to 2.15;
`tests/test_private_apis.py` says which upstream change broke when one of these moves. Inductor is imported by the
functions that lower something, for a warm start must not pay 2 s for it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compiled_optim import torch_private
from compiled_optim.cache.build import BuildError, find_compiler

if TYPE_CHECKING:
    from compiled_optim.trace import Traced

SUPPORTED = ((2, 11), (2, 16))

# The length that lowering sees as a hint; no power of two and no small number, which would be specialised on.
_HINT = 1_000_003
# Inductor's state is process-wide.
_lock = threading.RLock()


class LoweringError(RuntimeError):
    """The rule could not be lowered to one loop over one flat tensor."""


class UntraceableError(RuntimeError):
    """A user's rule raised while it was traced, or its trace does something else."""


@dataclass(frozen=True)
class Lowered:
    """A C++ function ``kernel``: its source, and for each of its arguments which input it is (None: the length)."""

    source: str
    arguments: tuple[int | None, ...]


def unsupported_version() -> str | None:
    """None, or why this version of torch is not known to work."""
    low, below = SUPPORTED
    if low <= torch_private.torch_version() < below:
        return torch_private.MISSING or None
    known = f">={low[0]}.{low[1]},<{below[0]}.{below[1]}"
    return f"torch {torch.__version__} is not known to work: compiled_optim was checked with torch{known}"


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
    compiler = find_compiler()  # Inductor's is from CXX when it was imported, and must be one word
    with _lock:
        try:
            with _patched(settings | ({} if compiler is None else {"cpp.cxx": (compiler.path,)})):
                yield
        except Exception as error:  # of parts that are private, or a compiler that does not tell its version
            raise BuildError(f"Inductor raised {type(error).__name__}: {error}") from error


@contextmanager
def _patched(settings: dict[str, Any]) -> Iterator[None]:
    import torch._inductor.config as config
    from torch._inductor import cpu_vec_isa

    # torch knows its instruction set; Inductor compiles and loads a probe for each, in a directory that is not ours
    widest_first = [
        type("Known", (stock_isa,), {"__bool__": lambda self: True, "__hash__": stock_isa.__hash__})()
        for stock_isa in (cpu_vec_isa.VecAVX512, cpu_vec_isa.VecAVX2)
    ]
    names = {"AVX512": widest_first, "AVX2": widest_first[1:]}
    known = names.get(torch.backends.cpu.get_cpu_capability())
    with config.patch(settings):
        stock = cpu_vec_isa.valid_vec_isa_list
        if known is not None:
            cpu_vec_isa.valid_vec_isa_list = lambda: known  # type: ignore[assignment]
        try:
            yield
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
        if not isinstance(value, torch.Tensor) and value != len(probes[0]):  # of `item()`, say
            raise LoweringError(f"{traced.signature.name} is not one fusible loop: it takes the number {value}")
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


def inductor_directory() -> Path:
    """Where ``torch.compile`` builds its libraries, and loads them from."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def kernels_generated() -> int:
    """How many kernels Inductor has generated in this process, for what goes through ``torch.compile``."""
    metrics = sys.modules.get("torch._inductor.metrics")
    return int(metrics.generated_kernel_count) if metrics else 0
