"""The C++ translation unit of a kernel: Inductor's body, and a driver that walks it over many tensors in one call."""

from __future__ import annotations

import torch

from compiled_optim._engine.kernels.trace import Signature
from compiled_optim._engine.torch_private.inductor import Lowered

_C_TYPES = {torch.float32: "float", torch.float64: "double"}


def translation_unit(signature: Signature, lowered: Lowered) -> str:
    """Adds ``launch(tensors, table, begins, rows, scalars, columns, threads)`` to the kernel's source.

    ``table``: addresses by [tensor][input]. ``begins``: where each tensor begins if all are laid end to end, in
    elements; the range is cut into one equal span for each thread, so a span may begin and end inside a tensor.
    ``rows``: which row of ``scalars`` each tensor takes; a row is ``columns`` wide, and may hold more than is read.
    """
    flat = len(signature.flat)
    widths = [dtype.itemsize for dtype in signature.flat_dtypes]

    def argument(i: int | None) -> str:
        if i is None:
            return "n"
        return f"Address{{table[t * {flat} + {i}], o * {widths[i]}}}" if i < flat else f"&k[{i - flat}]"

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
