"""Triton's kernels in Triton's interpreter, in a process where Triton compiles for a GPU otherwise.

Triton decides when it is imported whether `triton.jit` interprets. Here the text of a kernel is executed with another
`triton.jit`, and so are the helpers of Inductor that it calls.
"""

from __future__ import annotations

import functools
import inspect
import linecache
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import triton
import triton.language as tl
from torch._inductor.runtime import triton_helpers
from triton.runtime import interpreter

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    raise ImportError(f"the interpreter of Triton {triton.__version__} fails on NumPy 2.4; that of 3.7 does not")


class Function(interpreter.InterpretedFunction):
    """A function of a kernel, which may call others: the language is replaced once for all of them, in `run`."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)


class _Libdevice:
    """The functions of CUDA's library, which the interpreter does not have."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(np, name, None) or {"pow": np.power, "rsqrt": lambda a: 1 / np.sqrt(a)}[name]

        def call(first: Any, *others: Any) -> Any:
            data = function(first.handle.data, *(other.handle.data for other in others))
            return tl.core.tensor(interpreter.TensorHandle(data, first.dtype.scalar), first.type)

        return call


def _execute(name: str, text: str, names: Mapping[str, Any]) -> ModuleType:
    """A module of this source, with ``names`` instead of what it imports under them."""
    module, stock = ModuleType(name), triton.jit
    # the interpreter reads the source of a function through linecache, as a debugger does
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    triton.jit = Function
    try:
        exec(compile(text, name, "exec"), vars(module))
    finally:
        triton.jit = stock
    vars(module).update(names)
    return module


@functools.cache
def _helpers() -> ModuleType:
    text = Path(inspect.getfile(triton_helpers)).read_text()
    text = text.replace("from .", f"from {triton_helpers.__package__}.")
    return _execute("<interpreted helpers>", text, {"libdevice": _Libdevice()})


@functools.cache
def load(text: str) -> ModuleType:
    """The functions of a kernel's text."""
    return _execute(f"<interpreted {hash(text)}>", text, {"triton_helpers": _helpers(), "libdevice": _Libdevice()})


@contextmanager
def _rounding() -> Iterator[None]:
    """bfloat16 is rounded to nearest, as devices do; the interpreter cuts bits off."""
    stock = interpreter._convert_float

    def convert(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return stock(data, source, target, mode)
        bits = data.view(np.uint32)
        rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
        return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)

    interpreter._convert_float = convert
    try:
        yield
    finally:
        interpreter._convert_float = stock


def run(
    text: str, name: str, grid: tuple[int, ...], types: Mapping[str, str], values: Mapping[str, int], block: int
) -> None:
    """Launches a function of a kernel's text on a grid.

    Args:
        types: of its arguments in Triton's spelling, such as "*i64"; values: numbers, and addresses on the host.
        block: the value of ``XBLOCK``.
    """
    function = getattr(load(text), name).rewrite()
    arguments: dict[str, Any] = {"XBLOCK": tl.constexpr(block)}
    for argument, kind in types.items():
        dtype = tl.str_to_ty(kind, None)
        width = {"*": np.uint64, "i": np.int32}[kind[0]]
        arguments[argument] = tl.tensor(interpreter.TensorHandle(np.array([values[argument]], width), dtype), dtype)
    scope = interpreter._patch_lang(function)
    # a function of Triton's own library that was compiled when that was imported
    scope.set_attr(tl, "zeros", lambda shape, dtype: tl.full(shape, 0, dtype))
    try:
        with _rounding(), np.errstate(all="ignore"):
            interpreter.interpreter_builder.set_grid_dim(*grid)
            for place in np.ndindex(*grid):
                interpreter.interpreter_builder.set_grid_idx(*place)
                function(**arguments)
    finally:
        scope.restore()
