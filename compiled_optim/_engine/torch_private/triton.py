"""Inductor's Triton kernels: a traced rule as text, and text as a program for one kind of GPU.

Nothing here needs a GPU. Inductor and Triton are imported by the functions that use them: a warm start needs neither.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from compiled_optim._engine.cache.compiler import BuildError
from compiled_optim._engine.torch_private import inductor
from compiled_optim._engine.torch_private.inductor import FlatGraph, Lowered, Recorder

# What the text of a kernel refers to.
HEADER = """\
import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_helpers import libdevice, math as tl_math
"""
_numbers = itertools.count()


@dataclass(frozen=True)
class Program:
    """A compiled Triton kernel.

    ``threads`` of a block; ``shared``: bytes of shared memory of a block.
    """

    name: str
    cubin: bytes
    ptx: str
    threads: int
    shared: int


class _Torch:
    """The module torch for Inductor's wrapper, which selects a device before it launches; there may be none."""

    cuda = SimpleNamespace(_DeviceGuard=lambda index: torch.no_grad(), set_device=lambda index: None)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def lower_triton(traced: FlatGraph, capability: int) -> Lowered:
    """Lowers to Inductor's function over one flat tensor, as the text of a ``triton.jit`` function named ``kernel``.

    The function takes the block of ``tl.program_id(0)`` from the pointers it is given; its last arguments are the
    length and the constant ``XBLOCK``. Nothing is compiled.

    Args:
        traced: on the device "cuda".
        capability: of the GPU to lower for, such as 90; it decides only where this machine has no GPU.

    Raises:
        LoweringError: when Inductor makes more than one kernel or allocates a buffer.
    """
    recorders: list[Recorder] = []

    class AsyncCompile:
        def triton(self, name: str, source: str, **options: Any) -> Recorder:
            recorders.append(Recorder(source))
            return recorders[-1]

        def wait(self, scope: dict[str, Any]) -> None: ...

    modules = {
        "torch": _Torch(),
        "torch._inductor.async_compile": SimpleNamespace(AsyncCompile=AsyncCompile),
        # an import of it would fail in builds of torch without CUDA
        "torch._C": SimpleNamespace(_cuda_getCurrentRawStream=lambda index: 0),
    }
    # compile_threads=1: no worker pool. realize_opcount_threshold: a long rule must stay one kernel.
    settings = {"compile_threads": 1, "realize_opcount_threshold": 1000, "cpp_wrapper": False, "max_autotune": False}
    with inductor.alone(), _some_gpu(capability):
        from torch._inductor import config

        with config.patch(settings):
            lowered = inductor.single_kernel(traced, recorders, modules)
    return Lowered(_function(lowered.source), lowered.arguments)


def _function(source: str) -> str:
    """The function without what Inductor decorates it with: an autotuner, which would launch it."""
    import ast

    node = next(n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef))
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    return "@triton.jit\n" + "\n".join([lines[0].replace(f"def {node.name}(", "def kernel(", 1), *lines[1:]])


@contextmanager
def _some_gpu(capability: int) -> Iterator[None]:
    """What Inductor asks of a GPU is answered by this machine's, or in its stead."""
    if torch.cuda.is_available():
        yield
        return
    from compiled_optim._engine.torch_private import absent_gpu

    with absent_gpu.pretend(capability):
        yield


def version() -> str:
    """The version of Triton."""
    import triton

    return str(triton.__version__)


def versions() -> tuple[str, ...]:
    """What a program depends on beside its text: Triton, and an assembler that is not the one that it brings."""
    # Its first file has the version, under whatever name it was installed, and to read it takes no import.
    found = importlib.util.find_spec("triton")
    first = Path(found.origin).read_text() if found is not None and found.origin else "none"
    return (first, *(f"{k}={v}" for k, v in sorted(os.environ.items()) if "PTXAS" in k))


def build(
    text: str, name: str, arguments: Mapping[str, str], *, block: int, warps: int, title: str, capability: int
) -> Program:
    """Compiles a function of a Triton source.

    Args:
        text: of the source, which begins with `HEADER`; name: of the function; title: what profilers shall call it.
        arguments: the types of the function's arguments in Triton's spelling, such as "*i64", but for ``XBLOCK``.
        block: the value of ``XBLOCK``; warps: how many a block has; capability: of the GPU, such as 90.

    Raises:
        BuildError: with the message of Triton or of its assembler.
    """
    import linecache
    import re

    with inductor.alone():
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        title = re.sub(r"\W", "_", title, flags=re.ASCII)
        text = re.sub(rf"^def {name}\(", f"def {title}(", text, flags=re.MULTILINE)
        # Triton reads the source of a function through linecache, as a debugger does; so it needs no file.
        file = f"<compiled_optim kernel {next(_numbers)}>"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)
        try:
            namespace: dict[str, Any] = {"__name__": file}
            exec(compile(text, file, "exec"), namespace)
            source = ASTSource(
                fn=namespace[title], signature={**arguments, "XBLOCK": "constexpr"}, constexprs={"XBLOCK": block}
            )
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        except Exception as error:
            raise BuildError(f"Triton raised {type(error).__name__}: {error}") from error
        finally:
            del linecache.cache[file]
    return Program(built.metadata.name, built.asm["cubin"], built.asm["ptx"], 32 * warps, built.metadata.shared)


def usage(program: Program) -> tuple[int, int]:
    """How many registers a thread of a program takes, and how many bytes it spills to memory."""
    import re
    import subprocess
    import tempfile

    from triton.backends import nvidia

    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.cubin)
        file.flush()
        found = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", found.stdout)[1]) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[index]
    return registers, stack + local


def load_bits(program: Program) -> Sequence[int]:
    """The widths of a program's loads from global memory in bits, each once, the widest first."""
    import re

    found = re.findall(r"ld\.global[.\w]*?(?:\.v(\d))?\.b(\d+)", program.ptx)
    return sorted({int(count or 1) * int(bits) for count, bits in found}, reverse=True)
