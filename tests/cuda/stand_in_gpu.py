"""The backend of a GPU whose device and driver are stand-ins: its kernels are texts, and launches are interpreted."""

from __future__ import annotations

import ctypes
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import interpreted
import stand_in
import torch

from compiled_optim._engine.kernels.backends import cuda, cuda_launch, triton_text
from compiled_optim._engine.kernels.trace import Signature
from compiled_optim._engine.torch_private.inductor import Lowered
from compiled_optim._engine.torch_private.triton import Program

_ARGUMENTS = {"update": triton_text.UPDATE_ARGUMENTS, "prologue": triton_text.PROLOGUE_ARGUMENTS}
_ILLEGAL_ADDRESS = 700  # the error of a launch that raised


class _Launched(ctypes.Structure):
    """`Launch` of stand_in_driver.cpp."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("image", ctypes.c_char_p),
        ("device", ctypes.c_ssize_t),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_size_t),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
    ]


@dataclass(frozen=True)
class Launch:
    """A launch of ``kernel`` (update, prologue or write) as the driver was given it.

    ``device``: that of the current context. ``values``: of the parameters; of a write, where to and the words.
    """

    kernel: str
    device: int
    grid: tuple[int, int, int]
    stream: int
    values: dict[str, Any]
    text: str = ""
    block: int = 0

    def run(self) -> None:
        if self.kernel == "write":
            words = self.values["words"]
            ctypes.memmove(self.values["to"], words, len(words))
        else:
            interpreted.run(self.text, self.kernel, self.grid, _ARGUMENTS[self.kernel], self.values, self.block)


def _read(launched: _Launched) -> Launch:
    def parameter(i: int, kind: Any) -> int:
        return int(kind.from_address(launched.parameters[i]).value)

    common = (launched.device, tuple(launched.grid), launched.stream)
    if launched.name == b"write":
        count = parameter(1, ctypes.c_uint32)
        words = ctypes.string_at(launched.parameters[2], 8 * count)
        return Launch("write", *common, {"to": parameter(0, ctypes.c_uint64), "words": words})
    kernel, text, block = json.loads(launched.image)
    kinds = {"*": ctypes.c_uint64, "i": ctypes.c_int32}
    values = {name: parameter(i, kinds[kind[0]]) for i, (name, kind) in enumerate(_ARGUMENTS[kernel].items())}
    return Launch(kernel, *common, values, text, block)


class Driver:
    """What the stand-in of the driver was asked to do.

    Attributes:
        launches: since `reset`.
        device: the current context's at the last launch.
    """

    def __init__(self) -> None:
        source = Path(__file__).with_name("stand_in_driver.cpp")
        self._library = stand_in.build(source, ["-std=c++20", "-O1"], lambda path: ctypes.CDLL(str(path)))
        self.name = self._library._name
        self._callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Launched))(self._launched)
        ctypes.c_void_p.in_dll(self._library, "stand_in_launch").value = ctypes.cast(
            self._callback, ctypes.c_void_p
        ).value
        self.reset()

    def reset(self) -> None:
        self.launches: list[Launch] = []
        self.error: BaseException | None = None

    @property
    def kernels(self) -> list[str]:
        return [launch.kernel for launch in self.launches]

    def check(self) -> None:
        """Raises what a launch raised."""
        if self.error is not None:
            raise self.error

    def fail(self, function: str, error: int) -> None:
        """Makes the next call of a function of the driver return this error."""
        self._library.stand_in_fail(function.encode(), error)

    def _launched(self, pointer: Any) -> int:
        try:
            launch = _read(pointer.contents)
            self.launches.append(launch)
            graph = stand_in.captured()
            graph.actions.append(launch.run) if graph else launch.run()
        except BaseException as error:  # ctypes would print it
            self.error = error
            return _ILLEGAL_ADDRESS
        return 0


@functools.cache
def driver() -> Driver:
    return Driver()


class Gpu(cuda.Cuda):
    """A capability that no GPU has: its kernels are of no use to one."""

    device_type = stand_in.TYPE

    def programs(self, signature: Signature, lowered: Lowered) -> list[Program]:
        texts = [("update", self.full_source(signature, lowered), cuda.block_of(signature))]
        if signature.on_device:
            texts.append(("prologue", self.prologue(signature), 32))
        return [Program(text[0], json.dumps(text).encode(), "", 128, 0) for text in texts]

    def open_driver(self) -> cuda_launch.Driver:
        return cuda_launch.driver(driver().name)

    def index_of(self, device: torch.device) -> int:
        return device.index

    def stream(self, device: torch.device) -> int:
        return stand_in.stream()

    def is_capturing(self, device: torch.device) -> bool:
        return stand_in.captured() is not None


stand_in.register()
GPU = Gpu(89)
