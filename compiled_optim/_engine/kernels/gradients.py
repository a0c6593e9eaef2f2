"""Passes over all gradients of an optimizer in one native call each: their norm, and setting them to zero."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from compiled_optim._engine import process, settings
from compiled_optim._engine.cache import native
from compiled_optim._engine.kernels import registry
from compiled_optim._engine.kernels.backends import cpu
from compiled_optim._engine.torch_private import inductor

_FLAGS = ("-O3", "-march=native", "-fopenmp")
_SOURCE = Path(__file__).parent / "host" / "gradients.cpp"
_LONG = cpu.long_launch
_lock = process.new_lock()


class _Passes(NamedTuple):
    """The host module, the addresses of the functions of gradients.cpp, and their library."""

    host: Any
    norm: int
    zero: int
    library: ctypes.CDLL


_passes: _Passes | None = None


def norm(tensors: list[Tensor], *, of_gradients: bool = False, largest: bool = False) -> tuple[float, list[Tensor]]:
    """The 2-norm, or the ``largest`` absolute value, of plain dense tensors in host memory, taken for one vector.

    Float32, bfloat16 and float16 are added up in float32 within blocks of 2048 elements and beyond these in at least
    float64; float64 in float64. Unless an element is infinite or NaN, the norm is finite, if float64 can hold it.

    Args:
        of_gradients: whether the gradients of the tensors are meant. With 100 small ones, a list of them would double
            the time.

    Returns:
        The norm, and the tensors, or gradients, that are not in it: of other kinds, or with a storage that does not
        hold them.

    Raises:
        native.NoCompilerError, compiler.BuildError, OSError, ImportError: when the library cannot be had.
    """
    passes = _passes or _loaded()
    threads = process.team_size()
    found, others = passes.host.norm(tensors, of_gradients, passes.norm, largest, threads, _LONG)
    return found, gradients_of(others) if of_gradients and others else others


def zero(tensors: list[Tensor], *, of_gradients: bool = False) -> list[Tensor]:
    """Sets plain dense tensors in host memory, or their gradients, to zero; returns those that this leaves to torch.

    Raises:
        What `norm` raises.
    """
    passes = _passes or _loaded()
    others = passes.host.zero(tensors, of_gradients, passes.zero, process.team_size(), 4 * _LONG)
    return gradients_of(others) if of_gradients else others


def gradients_of(tensors: list[Tensor]) -> list[Tensor]:
    """Those that there are."""
    return [t.grad for t in tensors if t.grad is not None]


def _loaded() -> _Passes:
    global _passes
    with _lock:
        if _passes is None:
            text, flags = _SOURCE.read_text(), [*inductor.BASE_FLAGS, *_FLAGS]
            key = native.machine_key("gradients", *cpu.identity(), text, *flags)
            compiling = native.Future(native.Library(key, lambda: native.Source(text, flags), _load))
            host, library = registry.host_module(), compiling.result()
            settings.logger.info("gradients: %s in %.1f s", library.origin, library.seconds)
            _passes = _Passes(host, *library.value)
        return _passes


def _load(path: Path) -> tuple[int, int, ctypes.CDLL]:
    library = ctypes.CDLL(str(path))
    norm, zero = (ctypes.cast(f, ctypes.c_void_p).value or 0 for f in (library.norm, library.zero))
    return norm, zero, library
