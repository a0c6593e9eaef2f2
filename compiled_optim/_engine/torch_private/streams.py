"""The stream that torch launches on."""

from __future__ import annotations

from typing import Any

import torch

_raw_stream: Any
try:
    from torch._C import _cuda_getCurrentRawStream as _raw_stream
except ImportError:  # a build without CUDA
    _raw_stream = None


def raw_stream(index: int) -> int:
    """The address of the current stream of a device, in 0.1 us instead of 1.3."""
    return int(torch.cuda.current_stream(index).cuda_stream if _raw_stream is None else _raw_stream(index))
