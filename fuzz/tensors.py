"""Tensors as users come to have them; their copies, and what is in them."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
from torch import Tensor

SHAPES = [(7,), (3, 5), (2, 3, 4), (), (1,), (0,), (130,), (33, 17), (64,), (1, 9), (5, 1), (4, 4)]
LAYOUTS = ["plain", "transposed", "gaps", "offset", "expanded", "foreign", "permuted", "in a graph", "subclass"]
OWN_MEMORY = ["plain", "transposed", "gaps", "offset", "foreign", "permuted"]  # of these each element has its own


class Subclass(torch.Tensor):
    """As a library may have it: a tensor in all but its type."""


def values(random: Random, shape: tuple[int, ...], dtype: torch.dtype, extreme: float = 0.05) -> Tensor:
    """Normal ones, at times with one that is not."""
    x = torch.randn(shape, dtype=torch.complex128 if dtype.is_complex else torch.float64)
    if random.random() < extreme and x.numel():
        special = [math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-310, 1e300]
        x.view(-1)[random.randrange(x.numel())] = random.choice(special)
    return x.to(dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another place."""
    if layout == "transposed" and x.dim() >= 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gaps" and x.dim() >= 1:
        return torch.stack([x, x], -1)[..., 0]
    if layout == "offset":
        return torch.cat([x.new_zeros(3), x.reshape(-1)])[3:].view(x.shape)
    if layout == "expanded" and x.numel() and x.dim():
        return x[:1].expand(x.shape)
    if layout == "foreign" and x.numel():  # aligned to its elements only: torch crashes where it is not even that
        memory = bytearray((x.numel() + 8) * x.element_size())
        moved = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=x.element_size()).view(x.shape)
        return moved.copy_(x)
    if layout == "permuted" and x.dim() == 3:
        return x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if layout == "in a graph" and (x.is_floating_point() or x.is_complex()):
        return x.clone().requires_grad_() * 1
    if layout == "subclass":
        return x.clone().as_subclass(Subclass)
    return x.clone()


def sparse(random: Random, x: Tensor) -> Tensor:
    """A gradient of some of its rows, each perhaps twice, or of single elements."""
    if random.random() < 0.3:
        return x.to_sparse()
    rows = torch.tensor([random.randrange(x.shape[0]) for _ in range(random.randint(0, 4))], dtype=torch.int64)
    return torch.sparse_coo_tensor(rows[None], x[rows], x.shape, check_invariants=False)


def plain(x: Tensor) -> Tensor:
    return x.detach() if type(x) in (Tensor, torch.nn.Parameter) else x.detach().as_subclass(Tensor)


def in_memory(x: Tensor) -> bool:
    """Whether the storage holds all elements."""
    if x.layout is not torch.strided or x.device.type == "meta" or x.numel() == 0:
        return True
    last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
    return x.untyped_storage().nbytes() >= (last + 1) * x.itemsize


class Copies:
    """Copies of tensors, which share memory where those do."""

    def __init__(self) -> None:
        self._storages: dict[Any, tuple[Any, Any]] = {}
        self._tensors: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in self._tensors:
            self._tensors[id(x)] = (x, self._copy(plain(x)))
        return self._tensors[id(x)][1]

    def _copy(self, x: Tensor) -> Tensor:
        if x.layout is not torch.strided or x.device.type == "meta":
            return x.clone()
        storage = x.untyped_storage()
        _, memory = self._storages.setdefault(storage._cdata, (storage, storage.clone()))  # type: ignore[no-untyped-call]
        copy = torch.empty(0, dtype=x.dtype).set_(memory, x.storage_offset(), x.shape, x.stride())
        return copy.conj() if x.is_conj() else copy


def content(x: Any) -> Any:
    """What is in a tensor, or in anything else, to be compared with what is in it later."""
    if not isinstance(x, Tensor):
        return repr(x)
    x = plain(x)
    if x.layout is torch.sparse_coo:
        return tuple(x.shape), content(x._indices()), content(x._values())
    if x.device.type == "meta" or not in_memory(x):
        return str(x.device), tuple(x.shape), x.untyped_storage().nbytes()
    flat = x.resolve_conj().resolve_neg().reshape(-1).clone(memory_format=torch.contiguous_format)
    return x.dtype, tuple(x.shape), flat.view(torch.uint8).numpy().tobytes()


_TOLERANCES = {
    torch.float64: (1e-9, 1e-11),
    torch.float32: (3e-5, 1e-5),
    torch.float16: (1e-2, 1e-3),
    torch.bfloat16: (5e-2, 1e-2),
}


def difference(ours: Tensor, stock: Tensor, looser: float = 1.0) -> str:
    """How two tensors differ beyond rounding, or an empty string."""
    ours, stock = plain(ours), plain(stock)
    if ours.is_sparse or stock.is_sparse:
        ours, stock = ours.to_dense(), stock.to_dense()
    if ours.shape != stock.shape:
        return f"shape {tuple(ours.shape)}, not {tuple(stock.shape)}"
    if stock.device.type == "meta":
        return ""
    if not stock.is_floating_point() and not stock.is_complex():
        return "" if torch.equal(ours.to(stock.dtype), stock) else f"{ours.tolist()}, not {stock.tolist()}"
    rtol, atol = _TOLERANCES[stock.dtype.to_real()]
    a, b = ours.to(stock.dtype).resolve_conj(), stock.resolve_conj()
    if torch.allclose(a, b, rtol=looser * rtol, atol=looser * atol, equal_nan=True):
        return ""
    at = int((a - b).abs().reshape(-1).nan_to_num(math.inf, math.inf).argmax())
    return f"{a.reshape(-1)[at].item()}, not {b.reshape(-1)[at].item()} ({stock.dtype})"
