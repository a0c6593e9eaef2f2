"""GPUs of one compute capability: Inductor's function in Triton, and one launch of it over many tensors."""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compiled_optim._engine.cache.compiler import BuildError
from compiled_optim._engine.kernels.backends import cuda_launch
from compiled_optim._engine.kernels.backends.triton_text import (
    PROLOGUE_ARGUMENTS,
    UPDATE_ARGUMENTS,
    Words,
    factor_of,
    prologue_text,
    update_text,
)
from compiled_optim._engine.kernels.prologue import hypers_of, trace_prologue
from compiled_optim._engine.kernels.trace import Signature, Traced
from compiled_optim._engine.torch_private import triton
from compiled_optim._engine.torch_private.inductor import Lowered
from compiled_optim._engine.torch_private.streams import raw_stream
from compiled_optim._engine.torch_private.triton import Program

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128)
_WARPS = 4
_BYTES_PER_THREAD = 16  # of the narrowest tensor, so that each thread loads and stores 128 bits at a time
_LANES = 32  # of a prologue, which has one lane for each tensor


def block_of(signature: Signature) -> int:
    """How many elements a block of threads updates at a time."""
    return 32 * _WARPS * _BYTES_PER_THREAD // min(dtype.itemsize for dtype in signature.flat_dtypes)


@dataclass(frozen=True)
class Cuda:
    """The backend of GPUs of one compute capability, such as 90.

    Kernels are compiled for it on any machine, with a GPU or without.
    """

    capability: int

    device_type = graph_device = "cuda"
    dtypes = frozenset(_DTYPES)
    sparse = True
    asynchronous = True
    long_launch = 1 << 62  # the host does not wait for a launch, so other threads need not run meanwhile
    suffix, language = ".cubin", "python"
    compiled = False

    @property
    def name(self) -> str:
        return f"sm_{self.capability}"

    def identity(self) -> Sequence[str]:
        """The GPU's capability, the version of Triton, and the files that decide the text."""
        return (self.name, *triton.versions(), _files())

    def lower(self, traced: Traced, *, portable: bool = False) -> Lowered:
        return triton.lower_triton(traced, self.capability)

    def full_source(self, signature: Signature, lowered: Lowered) -> str:
        return update_text(signature, lowered)

    def bytes_per_tensor(self, signature: Signature) -> int:
        """Of an update: a row of words, the size and the first chunk, whose tensor a chunk is, and the scalars."""
        return 8 * Words.of(signature).stride + 16 + 4 + signature.scalar_dtype.itemsize * len(signature.factors)

    def program(self, signature: Signature, lowered: Lowered) -> tuple[bytes, Sequence[str]]:
        cuda_launch.begin()
        return cuda_launch.pack(self.programs(signature, lowered)), ()

    def prologue(self, signature: Signature) -> str:
        """The source of the kernel that counts the step and computes the scalars, for a signature `on_device`."""
        return prologue_text(signature, triton.lower_triton(trace_prologue(signature), self.capability))

    def programs(self, signature: Signature, lowered: Lowered) -> list[Program]:
        """The compiled kernels: the update, and the prologue if there is one.

        Raises:
            BuildError: with the message of Triton or of its assembler.
            LoweringError: if the scalars are not one fusible loop.
        """
        name, build = signature.rule.name, functools.partial(triton.build, capability=self.capability)
        text, block = self.full_source(signature, lowered), block_of(signature)
        built = [build(text, "update", UPDATE_ARGUMENTS, block=block, warps=_WARPS, title=f"{name}_update")]
        if signature.on_device:
            title, text = f"{name}_prologue", self.prologue(signature)
            built.append(build(text, "prologue", PROLOGUE_ARGUMENTS, block=_LANES, warps=1, title=title))
        return built

    def load(self, path: Path, signature: Signature) -> tuple[int, object]:
        driver = self.open_driver()
        loaded = cuda_launch.load(path, driver)
        if len(loaded) != 1 + signature.on_device:
            raise BuildError(f"{path.name} holds {len(loaded)} kernels for {signature.name}")
        address = ctypes.cast(driver.functions.entry, ctypes.c_void_p).value
        assert address is not None
        return address, loaded

    def contexts(
        self, keepalive: object, signature: Signature, device: torch.device, tensors: int
    ) -> Callable[..., int]:
        assert isinstance(keepalive, list)
        update, prologue = keepalive[0], keepalive[1:]
        counts, on_device = len(signature.rule.declaration.counts), signature.on_device
        form = cuda_launch.Form(
            update=update.handle,
            prologue=prologue[0].handle if prologue else 0,
            device=self.index_of(device),
            flat=len(signature.flat),
            cells=Words.of(signature).cells,
            scalars=len(signature.factors),
            scalar_bytes=signature.scalar_dtype.itemsize,
            factor=factor_of(signature),
            counts=counts if on_device else 0,
            hypers=len(hypers_of(signature)) if on_device else 0,
            block=block_of(signature),
            threads=update.threads,
            shared=update.shared,
            prologue_shared=prologue[0].shared if prologue else 0,
        )

        def refuse() -> None:
            if counts and not on_device:
                name = signature.rule.name
                raise RuntimeError(
                    f"a CUDA graph cannot capture a step of {name} whose steps are counted on the host: build it with "
                    f"capturable=True, or set capturable in its param groups and step once before the capture"
                )

        stream = functools.partial(self.stream, device)
        is_capturing = functools.partial(self.is_capturing, device)
        driver, dtype = self.open_driver(), signature.scalar_dtype
        return cuda_launch.Launch(driver, form, device, tensors, dtype, stream, is_capturing, refuse)

    # What a stand-in for a GPU answers in another way.

    def open_driver(self) -> cuda_launch.Driver:
        return cuda_launch.driver("libcuda.so.1")

    def index_of(self, device: torch.device) -> int:
        """The number of a device for the driver."""
        return torch.cuda.current_device() if device.index is None else device.index

    def stream(self, device: torch.device) -> int:
        """The address of the current stream."""
        return raw_stream(self.index_of(device))

    def is_capturing(self, device: torch.device) -> bool:
        return torch.cuda.is_current_stream_capturing()


@functools.cache
def _files() -> str:
    """A hash of the files that decide the text of a kernel, beside those that decide it on every device."""
    here = Path(__file__)
    files = (here, here.with_name("triton_text.py"), here.parents[1] / "prologue.py", Path(triton.__file__))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
