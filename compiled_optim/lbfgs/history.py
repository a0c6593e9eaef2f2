"""The pairs that L-BFGS remembers, in ring buffers, and the direction they give: with torch's operations or compiled.

The direction is Nocedal's two-loop recursion (J. Nocedal, "Updating quasi-Newton matrices with limited storage",
Math. Comp. 35, 1980; J. Nocedal and S. Wright, "Numerical Optimization", 2nd ed., algorithm 7.4).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compiled_optim import lower, settings
from compiled_optim.cache import libraries

CURVATURE = 1e-10  # a pair whose y.s is not above it is rejected, as in torch.optim (and in history.cpp)


class History:
    """The newest ``size`` pairs of y, the change of the gradient, and s, the step that caused it.

    They stand in rings of ``size + 1`` slots: the spare one takes the next pair, so that one which is rejected has
    overwritten none. Memory is taken only as slots are first written.

    Args:
        size: how many pairs, at least 1.
        like: a flat gradient, which gives the number of elements, dtype and device.
    """

    def __init__(self, size: int, like: Tensor) -> None:
        self.size = size
        self.y, self.s = _ring(size + 1, like), _ring(size + 1, like)
        self.ro = like.new_empty(size + 1)  # 1 / y.s
        self.scale = like.new_ones(())  # y.s / y.y of the newest pair: the inverse Hessian before any pair is applied
        self.next = self.count = 0

    def slots(self) -> list[int]:
        """Where the pairs are, the oldest first."""
        return [i % (self.size + 1) for i in range(self.next - self.count, self.next)]

    def keep(self) -> None:
        """Makes what was written to slot ``next`` the newest pair."""
        self.next = (self.next + 1) % (self.size + 1)
        self.count = min(self.count + 1, self.size)

    def update(self, g: Tensor, before: Tensor, d: Tensor, t: Any) -> None:
        """Adds the pair y = g - before, s = t d, unless its curvature is too small."""
        y, s = torch.sub(g, before, out=self.y[self.next]), torch.mul(d, t, out=self.s[self.next])
        ys = y.dot(s)
        if ys > CURVATURE:
            self.ro[self.next] = 1.0 / ys
            self.scale = ys / y.dot(y)
            self.keep()

    def direction(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """The direction d = -H g, and g.d (0-d)."""
        slots, al = self.slots(), {}
        y, s, ro = self.y.unbind(), self.s.unbind(), self.ro.unbind()
        q = g.neg()
        for i in reversed(slots):
            al[i] = s[i].dot(q) * ro[i]
            q.add_(y[i], alpha=-float(al[i]))
        d = torch.mul(q, self.scale)
        for i in slots:
            be = y[i].dot(d) * ro[i]
            d.add_(s[i], alpha=float(al[i] - be))
        return d, g.dot(d)

    def lists(self) -> dict[str, Any]:
        """Copies of it all, as the state of torch.optim.LBFGS keeps it: lists, the oldest pair first."""
        rings = {"old_dirs": self.y, "old_stps": self.s, "ro": self.ro}
        copies = {name: [ring[i].clone() for i in self.slots()] for name, ring in rings.items()}
        return {**copies, "H_diag": self.scale.clone() if self.count else 1}

    @classmethod
    def of_lists(cls, lists: dict[str, Any], size: int, like: Tensor) -> History:
        """The newest ``size`` pairs of what `lists` or torch.optim.LBFGS made."""
        history = cls(size, like)
        pairs = zip(*(lists.get(name) or () for name in ("old_dirs", "old_stps", "ro")), strict=True)
        for y, s, ro in list(pairs)[-size:]:
            history.y[history.next].copy_(y)
            history.s[history.next].copy_(s)
            history.ro[history.next] = ro
            history.keep()
        history.scale.fill_(lists["H_diag"] if history.count else 1)
        return history


def _ring(slots: int, like: Tensor) -> Tensor:
    """Uninitialised rows, aligned like tensors of their own: BLAS sums in another order where they are not."""
    ring = like.new_empty(slots, -(-like.numel() // 16) * 16)
    if ring.is_cpu and ring.nbytes > 1 << 24:
        # Huge pages: a direction over two rings of 400 MB took 35 to 63 ms instead of 45 to 70.
        begin = -(-ring.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = (ring.data_ptr() + ring.nbytes - begin) // mmap.PAGESIZE * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return ring[:, : like.numel()]


# ---- compiled

DTYPES = (torch.float32, torch.float64)
_ONE_THREAD = 32_768  # bytes of a vector below which one thread is faster: measured, float32 and float64
_FLAGS = ("-O3", "-march=native", "-fopenmp")
_SOURCE = Path(__file__).with_name("history.cpp")
_library: ctypes.CDLL | None = None
_lock = threading.Lock()
_forked = False


class Kernels:
    """`History.update` and `History.direction`, compiled for one dtype: one launch each.

    ``origin``: "compiled", "disk", or "memory" if this process had them already; ``seconds``: until they were loaded.

    Raises:
        libraries.NoCompilerError, build.BuildError, OSError: see `libraries.begin`.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = f"lbfgs_{str(dtype).removeprefix('torch.')}"
        library, self.origin, self.seconds = _obtain()
        self._update, self._direction = (getattr(library, f"{f}_{self.name}") for f in ("update", "direction"))

    def update(self, history: History, g: Tensor, before: Tensor, d: Tensor, t: Any) -> None:
        rings = (history.y, history.s, history.ro, history.scale)
        self._check(history, g, before, d)
        if self._update(
            *(g.numel(), history.y.stride(0), history.next, g.data_ptr(), before.data_ptr(), d.data_ptr(), float(t)),
            *(tensor.data_ptr() for tensor in rings),
            _threads(g),
        ):
            history.keep()

    def direction(self, history: History, g: Tensor) -> tuple[Tensor, Tensor]:
        self._check(history, g)
        d, slots = torch.empty_like(g), history.size + 1
        tensors = (history.y, history.s, history.ro, history.scale, g, d)
        gd = self._direction(
            *(g.numel(), history.y.stride(0), slots, (history.next - history.count) % slots, history.count),
            *(tensor.data_ptr() for tensor in tensors),
            _threads(g),
        )
        return d, torch.tensor(gd, dtype=self.dtype)

    def _check(self, history: History, *tensors: Tensor) -> None:
        """Raises ValueError for what the kernels cannot be given by address."""
        kind = (Tensor, self.dtype, history.y.shape[1:], True, True)
        for x in (history.y[0], *tensors):
            if (type(x), x.dtype, x.shape, x.is_cpu, x.is_contiguous()) != kind:
                raise ValueError(f"expected a contiguous {self.dtype} vector, got {x.dtype} of shape {tuple(x.shape)}")


def _threads(vector: Tensor) -> int:
    return 1 if _forked or vector.nbytes < _ONE_THREAD else torch.get_num_threads()


def _obtain() -> tuple[ctypes.CDLL, str, float]:
    global _library
    with _lock:
        if _library is not None:
            return _library, "memory", 0.0
        source, flags = _SOURCE.read_text(), [*lower.BASE_FLAGS, *_FLAGS]
        key = libraries.machine_key("lbfgs", source, *flags)
        found = libraries.obtain(key, lambda: (source, flags), _load)
        settings.logger.info("lbfgs: %s in %.1f s", found.origin, found.seconds)
        _library = found.value
        return _library, found.origin, found.seconds


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    integers, address = [ctypes.c_int64] * 5, ctypes.c_void_p
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        update, direction = getattr(library, f"update_lbfgs_{name}"), getattr(library, f"direction_lbfgs_{name}")
        update.argtypes = [*integers[:3], *[address] * 3, ctypes.c_double, *[address] * 4, ctypes.c_int]
        update.restype = ctypes.c_bool
        direction.argtypes = [*integers, *[address] * 6, ctypes.c_int]
        direction.restype = ctypes.c_double
    return library


def _after_fork() -> None:
    global _lock, _forked
    _lock = threading.Lock()  # its holder does not exist in the child
    _forked = True  # nor do OpenMP's threads: a team of them would wait forever


os.register_at_fork(after_in_child=_after_fork)
