"""The devices that kernels are made for, one module each."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from compiled_optim._engine.kernels.backends import cpu
from compiled_optim._engine.kernels.trace import Signature, Traced
from compiled_optim._engine.torch_private.inductor import Lowered


class Backend(Protocol):
    """What the engine asks of a module in this folder.

    ``name`` is that of `Signature.backend`. Kernels take parameters on ``device_type`` in one of ``dtypes``, and the
    rows that a sparse gradient touches if they are ``sparse``. Rules are traced on ``graph_device``. The host does not
    wait for the launches of an ``asynchronous`` one, and must not wait for what lies on its device. A launch of
    ``long_launch`` elements takes so long that other threads run Python meanwhile. A kernel on disk ends in ``suffix``.
    Sources are in ``language``. ``compiled`` tells whether a C++ compiler makes the kernel of its program; if not, the
    program is kept as it is.
    """

    @property
    def name(self) -> str: ...

    device_type: str
    graph_device: str
    dtypes: frozenset[torch.dtype]
    sparse: bool
    asynchronous: bool
    long_launch: int
    suffix: str
    language: str
    compiled: bool

    def identity(self) -> Sequence[str]:
        """What a kernel on disk depends on beside its signature: the machine, the versions of tools, this backend."""

    def lower(self, traced: Traced, *, portable: bool = False) -> Lowered:
        """The kernel's own source. ``portable`` sources are the same on every machine: they are for the records.

        Raises:
            LoweringError: when the rule is not one fusible loop.
        """

    def full_source(self, signature: Signature, lowered: Lowered) -> str:
        """Adds what walks the kernel over many tensors."""

    def bytes_per_tensor(self, signature: Signature) -> int:
        """What a launch reads to know one tensor: addresses, its size, its scalars."""

    def program(self, signature: Signature, lowered: Lowered) -> tuple[str | bytes, Sequence[str]]:
        """The whole program, with an entry as host/plan.h declares it, and the compiler's flags."""

    def load(self, path: Path, signature: Signature) -> tuple[int, object]:
        """The address of the entry, and what has to live as long as the kernel.

        Raises:
            OSError, ImportError, RuntimeError: when the file is no kernel of this signature.
        """

    def contexts(
        self, keepalive: object, signature: Signature, device: torch.device, tensors: int
    ) -> Callable[..., int]:
        """What returns the entry's last argument, a number or an address, for each step of one launch of a plan.

        Off the CPU it is given the factor of the gradients, a 0-d tensor, in steps where the host does not know it.

        Args:
            tensors: how many the launch has at most.
        """

    def is_capturing(self, device: torch.device) -> bool:
        """Whether what is launched now is only recorded, in a CUDA graph."""


# Those that every machine can use. A GPU's is found by its compute capability.
BACKENDS: tuple[Backend, ...] = (cpu,)


def _on(device: torch.device) -> Iterator[Backend]:
    for backend in BACKENDS:
        if backend.device_type == device.type:
            yield backend
    if device.type == "cuda" and torch.version.hip is None:
        yield of_gpu(device)


def backend_of(tensor: Tensor) -> Backend | None:
    """The backend whose kernels can update a parameter, if there is one."""
    return next((b for b in _on(tensor.device) if tensor.dtype in b.dtypes), None)


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on a device now is only recorded, in a CUDA graph."""
    return any(b.is_capturing(device) for b in _on(device))


def backend_named(name: str) -> Backend:
    """The backend of this ``name``: "cpu", or "sm_90" for GPUs of compute capability 9.0, of which there may be none.

    Raises:
        ValueError: if there is no such backend.
    """
    backend: Backend | None = next((b for b in BACKENDS if b.name == name), None)
    if backend is None and name.startswith("sm_") and name[3:].isdecimal():
        backend = _cuda(int(name[3:]))
    if backend is None:
        raise ValueError(f"a backend must be one of {[b.name for b in BACKENDS]} or as sm_90, got {name!r}")
    return backend


@functools.cache
def of_gpu(device: torch.device) -> Backend:
    """The backend of a GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    return _cuda(10 * major + minor)


def _cuda(capability: int) -> Backend:
    # imported here, because a process without a GPU would pay for it in its first step
    from compiled_optim._engine.kernels.backends.cuda import Cuda

    return Cuda(capability)
