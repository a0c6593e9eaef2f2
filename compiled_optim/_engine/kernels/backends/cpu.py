"""The CPU: Inductor's loop in C++, and what walks it over many tensors in one call."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from compiled_optim._engine import process
from compiled_optim._engine.kernels.trace import Signature, Traced
from compiled_optim._engine.torch_private import inductor
from compiled_optim._engine.torch_private.inductor import Lowered

name = device_type = graph_device = "cpu"
dtypes = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128})
sparse = True
asynchronous = False
# Shorter launches do not pay for holding memory and handing over the interpreter lock.
long_launch = 1 << 20
suffix, language = ".so", "cpp"
compiled = True

# The width of AVX2, which every x86-64 machine that runs the tests has.
_PORTABLE_VECTOR_BITS = 256
_C_TYPES = {torch.float32: "float", torch.float64: "double"}
_ENTRY = """
extern "C" void entry(int64_t tensors, void* const* table, const int64_t* begins, const int32_t* rows,
                      const double* scalars, const void* const*, int64_t columns, void* context) {
  // Below this many elements, starting a team of threads costs more than it saves.
  const int threads = begins[tensors] < (1 << 13) ? 1 : static_cast<int>(reinterpret_cast<intptr_t>(context));
  launch(tensors, table, begins, rows, scalars, columns, threads);
}
"""


@functools.cache
def identity() -> Sequence[str]:
    """The processor, the instructions that torch uses of it, and this file."""
    source = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    return _processor(), torch.backends.cpu.get_cpu_capability(), source


def _processor() -> str:
    """What decides which instructions the processor has; /proc/cpuinfo names these differently on x86 and Arm."""
    names = {"vendor_id", "cpu family", "model", "flags", "CPU implementer", "CPU architecture", "CPU part", "Features"}
    try:
        first = Path("/proc/cpuinfo").read_text(errors="replace").split("\n\n", 1)[0]
    except OSError:
        first = ""
    lines = [line.split(":", 1) for line in first.splitlines() if ":" in line]
    chosen = [f"{key.strip()}:{value.strip()}" for key, value in lines if key.strip() in names]
    return "\n".join(chosen) or platform.processor()


def lower(traced: Traced, *, portable: bool = False) -> Lowered:
    """One serial loop with the widest vectors of this machine, or those of AVX2 if it has to be portable."""
    return inductor.lower_cpp(traced, vector_bits=_PORTABLE_VECTOR_BITS if portable else None)


def bytes_per_tensor(signature: Signature) -> int:
    """An address of each tensor, where the elements begin and the scalars stand, and the scalars."""
    return 8 * len(signature.flat) + 8 + 4 + 8 * len(signature.scalars)


def program(signature: Signature, lowered: Lowered) -> tuple[str, Sequence[str]]:
    """The whole source and the entry, whose context is how many threads a launch may use."""
    return full_source(signature, lowered) + _ENTRY, inductor.cpp_flags()


def load(path: Path, signature: Signature) -> tuple[int, object]:
    """The entry of a shared library.

    Raises:
        OSError: if it is none. ImportError: if it takes other arguments.
    """
    library = ctypes.CDLL(str(path))
    arguments = getattr(library, "signature", lambda: None)()
    if arguments != len(signature.flat) * 100 + len(signature.scalars):
        raise ImportError(f"it takes other arguments than {signature.name}")
    address = ctypes.cast(library.entry, ctypes.c_void_p).value
    assert address is not None
    return address, library


def contexts(keepalive: object, signature: Signature, device: torch.device, tensors: int) -> Callable[[], int]:
    """How many threads a launch may use."""
    return process.team_size


def is_capturing(device: torch.device) -> bool:
    """Never."""
    return False


def full_source(signature: Signature, lowered: Lowered) -> str:
    """Adds ``launch`` to the kernel's source: an entry as host/plan.h declares it, but for the number of threads.

    The elements of all tensors are laid end to end and cut into one equal span for each thread, so a span may begin and
    end inside a tensor.
    """
    flat = len(signature.flat)
    widths = [dtype.itemsize for dtype in signature.flat_dtypes]

    def argument(i: int | None) -> str:
        if i is None:
            return "n"
        if i < flat:
            return f"Address{{table[t * {flat} + {i}], o * {widths[i]}}}"
        return f"&k[{i - flat}]" if i < flat + len(signature.scalars) else "&o"

    arguments = ", ".join(argument(i) for i in lowered.arguments)
    return f"""\
// {signature.name}
// inputs: {", ".join(signature.flat + signature.scalars)}
#include <torch/csrc/inductor/cpp_prefix.h>

// Inductor points a process-wide flag at a local of each call; calls from several threads would race on it.
static thread_local std::atomic<int>* division_flag;
#define inductor_cpu_integer_div_error_flag division_flag
{lowered.source}
#undef inductor_cpu_integer_div_error_flag

namespace {{
struct Address {{
  void* base;
  int64_t bytes;
  template <class T> operator T*() const {{ return reinterpret_cast<T*>(static_cast<char*>(base) + bytes); }}
}};
}}

extern "C" void launch(int64_t tensors, void* const* table, const int64_t* begins, const int32_t* rows,
                       const double* scalars, int64_t columns, int threads) {{
  const int64_t total = begins[tensors];
  auto span = [&](int64_t at, int64_t end) {{
    for (int64_t t = std::upper_bound(begins, begins + tensors + 1, at) - begins - 1; at < end; t++) {{
      const int64_t o = at - begins[t], n = std::min(begins[t + 1], end) - at;
      if (n == 0) continue;
      {_C_TYPES[signature.scalar_dtype]} k[{max(1, len(signature.scalars))}];
      for (int64_t i = 0; i < {len(signature.scalars)}; i++) k[i] = scalars[rows[t] * columns + i];
      kernel({arguments});
      at += n;
    }}
  }};
  if (threads == 1) return span(0, total);
  #pragma omp parallel num_threads(threads)
  {{
    // a multiple of 64 elements: no two threads write to one cache line of a tensor that begins on one
    const int64_t team = omp_get_num_threads(), id = omp_get_thread_num(), share = (total / team + 64) / 64 * 64;
    span(std::min(id * share, total), std::min((id + 1) * share, total));
  }}
}}

extern "C" int64_t signature() {{ return {flat * 100 + len(signature.scalars)}; }}
"""
