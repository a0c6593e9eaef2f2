"""The entry of a kernel as host/plan.h declares it, for kernels that are Python functions."""

from __future__ import annotations

import ctypes

Entry = ctypes.CFUNCTYPE(
    None,
    ctypes.c_int64,
    *(ctypes.POINTER(t) for t in (ctypes.c_size_t, ctypes.c_int64, ctypes.c_int32, ctypes.c_double, ctypes.c_size_t)),
    ctypes.c_int64,
    ctypes.c_size_t,
)
