"""The pairs that L-BFGS remembers, in ring buffers, and the direction they give: with torch's operations or compiled.

The direction is Nocedal's two-loop recursion (J. Nocedal, "Updating quasi-Newton matrices with limited storage",
Math. Comp. 35, 1980; J. Nocedal and S. Wright, "Numerical Optimization", 2nd ed., algorithm 7.4).
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compiled_optim._engine import process, settings
from compiled_optim._engine.cache import native
from compiled_optim._engine.kernels.backends import cpu
from compiled_optim._engine.torch_private import inductor

_FIRST_SLOTS = 4  # of a ring
CURVATURE = 1e-10  # a pair whose y.s is not above it is rejected, as in torch.optim (and in history.cpp)


class History:
    """The newest ``size`` pairs of y, the change of the gradient, and s, the step that caused it.

    They stand in rings, which double as pairs arrive, up to ``size + 1`` slots: the spare one takes the next pair, so
    that one which is rejected has overwritten none. ``next``: that slot; ``count``: how many pairs there are.

    Args:
        size: how many pairs, at least 1.
        like: a flat gradient, which gives the number of elements, dtype and device.
    """

    y: Tensor  # [slots, elements], and so is s
    s: Tensor
    ro: Tensor  # [slots]: 1 / y.s
    alphas: Tensor  # [slots] of float64: scratch of the compiled direction
    scale: Tensor  # y.s / y.y of the newest pair: the inverse Hessian before any pair is applied

    @torch.inference_mode(False)  # or a later step could not write to them
    def __init__(self, size: int, like: Tensor) -> None:
        self.size = size
        self.next = self.count = 0
        self.scale = like.new_ones(())
        self._allocate(min(size + 1, _FIRST_SLOTS), like)

    def _allocate(self, slots: int, like: Tensor) -> None:
        self.memory: list[tuple[int, torch.UntypedStorage, int]] = []  # of the kernels: addresses, and what they are in
        self.y, self.s, self.ro, self.alphas = (
            *(_ring(slots, like), _ring(slots, like)),
            *(like.new_empty(slots), like.new_empty(slots, dtype=torch.float64)),
        )

    @torch.inference_mode(False)
    def make_room(self) -> None:
        """Doubles the rings if no slot is free. They have lost no pair then, so the oldest is in the first slot."""
        if self.count < len(self.ro):
            return
        y, s, ro = self.y, self.s, self.ro
        self._allocate(min(2 * self.count, self.size + 1), y[0])
        self.ro[: self.count] = ro
        for i in range(self.count):  # one by one: several threads, as a large copy has, do not survive a fork
            self.y[i], self.s[i] = y[i], s[i]
        self.next = self.count

    def slots(self) -> list[int]:
        """Where the pairs are, the oldest first."""
        return [i % len(self.ro) for i in range(self.next - self.count, self.next)]

    def keep(self) -> None:
        """Makes what was written to slot ``next`` the newest pair."""
        self.next = (self.next + 1) % len(self.ro)
        self.count = min(self.count + 1, self.size)

    def update(self, g: Tensor, before: Tensor, d: Tensor, t: Any) -> None:
        """Adds the pair y = g - before, s = t d, unless its curvature is too small."""
        self.make_room()
        y, s = torch.sub(g, before, out=self.y[self.next]), torch.mul(d, t, out=self.s[self.next])
        ys = y.dot(s)
        if ys > CURVATURE:
            self.ro[self.next] = 1.0 / ys
            self.scale.copy_(ys / y.dot(y))
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
            history.make_room()
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
_library: native.Loaded[ctypes.CDLL] | None = None
_lock = process.new_lock()


class Kernels:
    """`History.update` and `History.direction`, compiled for one dtype: one launch each.

    ``origin``: "compiled", "disk", or "memory" if this process had them already; ``seconds``: until they were loaded.

    Raises:
        native.NoCompilerError, compiler.BuildError, OSError: see `native.Future.result`.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = f"lbfgs_{str(dtype).removeprefix('torch.')}"
        library = _compiled()
        self.origin, self.seconds = library.origin, library.seconds
        self._update, self._direction = (getattr(library.value, f"{f}_{self.name}") for f in ("update", "direction"))

    def update(self, history: History, g: Tensor, before: Tensor, d: Tensor, t: Any) -> None:
        history.make_room()
        step = float(t)  # whatever may run Python comes before an address is read
        held = self._vectors(history, {"the gradient": g, "prev_flat_grad": before, "d": d})
        y, s, ro, scale, _ = self._rings(history)
        if self._update(
            *(g.numel(), history.y.stride(0), history.next, g.data_ptr(), before.data_ptr(), d.data_ptr(), step),
            *(y, s, ro, scale, _threads(g)),
        ):
            history.keep()
        del held

    def direction(self, history: History, g: Tensor) -> tuple[Tensor, Tensor]:
        d, slots = torch.empty_like(g), len(history.ro)
        held = self._vectors(history, {"the gradient": g})
        first = (history.next - history.count) % slots
        gd = self._direction(
            *(g.numel(), history.y.stride(0), slots, first, history.count),
            *(*self._rings(history), g.data_ptr(), d.data_ptr(), _threads(g)),
        )
        del held
        return d, torch.tensor(gd, dtype=self.dtype, device=g.device)

    def _vectors(self, history: History, vectors: dict[str, Tensor]) -> list[torch.UntypedStorage]:
        """Their memory, to be held during a launch: another thread may give a tensor other memory meanwhile.

        Raises:
            ValueError: for a tensor that is not what the kernels take, or whose memory was taken away.
        """
        n, held = history.y.shape[1], []
        for name, x in vectors.items():
            kind = (type(x), x.dtype, x.shape, x.is_cpu, x.is_contiguous(), x.is_neg())
            if kind != (Tensor, self.dtype, (n,), True, True, False) or not in_memory(x):
                raise ValueError(
                    f"LBFGS: {name} must be a contiguous {self.dtype} vector of {n} elements in the memory of the CPU, "
                    f"got a {type(x).__name__} of {x.dtype}, shape {tuple(x.shape)}, on {x.device}"
                )
            held.append(x.untyped_storage())
        return held

    def _rings(self, history: History) -> list[int]:
        """The addresses of y, s, ro, scale and alphas, in memory that the history keeps."""
        rings = (history.y, history.s, history.ro, history.scale, history.alphas)
        if not history.memory:
            history.memory = [(x.data_ptr(), x.untyped_storage(), x.untyped_storage().nbytes()) for x in rings]
        addresses = [x.data_ptr() for x in rings]
        if any(at != x or s.nbytes() != size for x, (at, s, size) in zip(addresses, history.memory, strict=True)):
            raise ValueError("LBFGS: the memory of the history was replaced or resized: drop state['history']")
        return addresses


def in_memory(vector: Tensor) -> bool:
    """Whether a contiguous tensor still has the memory of its elements, which ``resize_`` of a storage takes away."""
    end = (vector.storage_offset() + vector.numel()) * vector.itemsize
    return vector.numel() == 0 or vector.untyped_storage().nbytes() >= end


def _threads(vector: Tensor) -> int:
    return 1 if vector.nbytes < _ONE_THREAD else process.team_size()


def _compiled() -> native.Loaded[ctypes.CDLL]:
    global _library
    with _lock:
        if _library is not None:
            return replace(_library, origin="memory", seconds=0.0)
        text, flags = _SOURCE.read_text(), [*inductor.BASE_FLAGS, *_FLAGS]
        key = native.machine_key("lbfgs", *cpu.identity(), text, *flags)
        _library = native.get(native.Library(key, lambda: native.Source(text, flags), _load))
        settings.logger.info("lbfgs: %s in %.1f s", _library.origin, _library.seconds)
        return _library


def _load(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    integers, address = [ctypes.c_int64] * 5, ctypes.c_void_p
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        update, direction = getattr(library, f"update_lbfgs_{name}"), getattr(library, f"direction_lbfgs_{name}")
        update.argtypes = [*integers[:3], *[address] * 3, ctypes.c_double, *[address] * 4, ctypes.c_int]
        update.restype = ctypes.c_bool
        direction.argtypes = [*integers, *[address] * 7, ctypes.c_int]
        direction.restype = ctypes.c_double
    return library
