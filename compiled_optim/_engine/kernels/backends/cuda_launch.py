"""Launches on a GPU, from Python's side: the library host/cuda.cpp, kernels on disk, what a step hands to a launch."""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compiled_optim._engine.cache import native
from compiled_optim._engine.cache.compiler import BuildError
from compiled_optim._engine.torch_private.triton import Program

_HOST = Path(__file__).parents[1] / "host"
_FLAGS = ("-std=c++20", "-O2", "-DNDEBUG", "-w", f"-I{_HOST}", "-ldl")


class Driver:
    """The driver's library, opened for the rest of the process."""

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self.functions = library
        self.handle = self.call("driver_open", name.encode())

    def call(self, function: str, *arguments: Any) -> int:
        """Calls a function whose last argument takes a handle, and returns that.

        Raises:
            BuildError: with the driver's message.
        """
        result = ctypes.c_void_p()
        if message := getattr(self.functions, function)(*arguments, ctypes.byref(result)):
            raise BuildError(message.decode())
        return result.value or 0


def _library() -> native.Library[ctypes.CDLL]:
    source = (_HOST / "cuda.cpp").read_text()
    key = native.machine_key("cuda", source, (_HOST / "cuda_driver.h").read_text(), *_FLAGS)
    return native.Library(key, lambda: native.Source(source, _FLAGS), _load)


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name in ("driver_open", "kernel_load", "launch_make"):
        getattr(library, name).restype = ctypes.c_char_p
    library.launch_capacity.restype = ctypes.c_int64
    return library


_library_ahead: list[native.Future[ctypes.CDLL]] = []


def begin() -> None:
    """Starts to compile the library, if it is not there, and returns."""
    if not _library_ahead or _library_ahead[0].failed:
        _library_ahead[:] = [native.Future(_library())]


@functools.cache
def driver(name: str) -> Driver:
    """The driver of this file name.

    Raises:
        BuildError: if it cannot be opened. What `native.Future.result` raises.
    """
    begin()
    return Driver(_library_ahead[0].result().value, name)


# ---- kernels on disk: a line of JSON that describes the programs, then their cubins


def pack(programs: Sequence[Program]) -> bytes:
    """The content of a file."""
    described = [{"name": p.name, "bytes": len(p.cubin), "shared": p.shared, "threads": p.threads} for p in programs]
    return b"\n".join([json.dumps(described).encode(), b"".join(p.cubin for p in programs)])


@dataclass(frozen=True)
class Loaded:
    """A program that the driver holds. It is never unloaded, because a CUDA graph may still launch it."""

    handle: int
    threads: int
    shared: int


def load(path: Path, driver: Driver) -> list[Loaded]:
    """Hands the programs of a file to the driver.

    Raises:
        BuildError: with the driver's message, or if the file is none of `pack`.
    """
    head, _, images = path.read_bytes().partition(b"\n")
    loaded, at = [], 0
    try:
        for program in json.loads(head):
            image = images[at : at + program["bytes"]]
            at += program["bytes"]
            handle = driver.call("kernel_load", ctypes.c_void_p(driver.handle), image, program["name"].encode())
            loaded.append(Loaded(handle, program["threads"], program["shared"]))
    except (ValueError, KeyError, TypeError) as error:
        raise BuildError(f"{path.name} is no kernel: {error}") from error
    return loaded


# ---- launches


class Form(ctypes.Structure):
    """What is said once of a launch, as in host/cuda.cpp."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("update", "prologue", "device", "flat", "cells", "scalars", "scalar_bytes", "factor", "counts", "hypers"),
            *("block", "threads", "shared", "prologue_shared"),
        )
    ]


class Step(ctypes.Structure):
    """What is said before each step, as in host/cuda.cpp."""

    _fields_ = [(name, ctypes.c_int64) for name in ("launch", "stream", "buffer", "capacity", "factor", "capturing")]


class Launch:
    """The words of one launch of a plan. Called before each step, it returns the address of a `Step`.

    Args:
        tensors: how many there are at most.
        dtype: of the scalars.
        stream: the address of the current one. While it is capturing, ``is_capturing`` says so.
        refuse: called before a step that a graph captures; it raises if the host would decide what replays do.
    """

    def __init__(
        self,
        driver: Driver,
        form: Form,
        device: torch.device,
        tensors: int,
        dtype: torch.dtype,
        stream: Callable[[], int],
        is_capturing: Callable[[], bool],
        refuse: Callable[[], None],
    ) -> None:
        self._driver, self._device, self._dtype = driver, device, dtype
        self._stream, self._is_capturing, self._refuse = stream, is_capturing, refuse
        self._has_factor = form.factor >= 0
        handle = driver.call("launch_make", ctypes.c_void_p(driver.handle), ctypes.byref(form))
        self._handle = ctypes.c_void_p(handle)
        self._capacity = driver.functions.launch_capacity(self._handle, ctypes.c_int64(tensors))
        self._step = Step(handle, -1, 0, self._capacity, 0, 0)
        self._address = ctypes.addressof(self._step)

    def __call__(self, factor: torch.Tensor | None = None) -> int:
        """``factor``: what gradients are multiplied by, if the host does not know it.

        Launches with a prologue ignore it, because they read it as they read hyperparameters.
        """
        step, stream, capturing = self._step, self._stream(), self._is_capturing()
        if capturing:
            self._refuse()
        if capturing or step.capturing or stream != step.stream:
            # A graph's memory is its own. So is a stream's: freed memory is handed out again in the order of a stream.
            self._buffer = torch.empty(self._capacity + 1, dtype=torch.int64, device=self._device)
            step.buffer, step.stream, step.capturing = self._buffer.data_ptr(), stream, capturing
            self._factor = self._buffer[-1:].view(self._dtype)[0]
        step.factor = 0
        if factor is not None and self._has_factor:
            # always to the same place, behind the words, so that none of them changes from step to step
            self._factor.copy_(factor, non_blocking=True)
            step.factor = self._factor.data_ptr()
        return self._address

    def __del__(self) -> None:
        if hasattr(self, "_handle"):
            self._driver.functions.launch_drop(self._handle)
