"""The devices that kernels are made for, one module each."""

from __future__ import annotations

from collections.abc import Sequence
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
    rows that a sparse gradient touches if they are ``sparse``. A launch of ``long_launch`` elements takes so long that
    other threads run Python meanwhile. A kernel on disk ends in ``suffix``, its record in graphs/ in ``record_suffix``.
    ``compiled`` tells whether a C++ compiler makes the kernel of its program; if not, the program is kept as it is.
    """

    name: str
    device_type: str
    dtypes: frozenset[torch.dtype]
    sparse: bool
    long_launch: int
    suffix: str
    record_suffix: str
    compiled: bool

    def identity(self) -> Sequence[str]:
        """What a kernel on disk depends on beside its signature: the machine, the versions of tools, this backend."""

    def lower(self, traced: Traced, *, portable: bool = False) -> Lowered:
        """The kernel's own source. ``portable`` sources are the same on every machine: they are for the records.

        Raises:
            LoweringError: when the rule is not one fusible loop.
        """

    def driver(self, signature: Signature, lowered: Lowered) -> str:
        """Adds what walks the kernel over many tensors."""

    def program(self, signature: Signature, lowered: Lowered) -> tuple[str | bytes, Sequence[str]]:
        """The whole program, with an entry as host/plan.h declares it, and the compiler's flags."""

    def load(self, path: Path, signature: Signature) -> tuple[int, object]:
        """The address of the entry, and what has to live as long as the kernel.

        Raises:
            OSError, ImportError, RuntimeError: when the file is no kernel of this signature.
        """

    def context(self, keepalive: object, device: torch.device) -> int:
        """The entry's last argument in the next launch of a kernel: a number, or an address."""


BACKENDS: tuple[Backend, ...] = (cpu,)


def backend_of(tensor: Tensor) -> Backend | None:
    """The backend whose kernels can update a parameter, if there is one."""
    return next((b for b in BACKENDS if b.device_type == tensor.device.type and tensor.dtype in b.dtypes), None)


def backend_named(name: str) -> Backend:
    return next(b for b in BACKENDS if b.name == name)
