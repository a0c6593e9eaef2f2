"""The norm of all gradients of an optimizer, taken for one vector."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from compiled_optim._engine.executions.memory import check_storage
from compiled_optim._engine.kernels import gradients
from compiled_optim._engine.torch_private import tensor_parts

# A norm from here on loses nothing to squares that float32 cannot hold; smaller ones are taken again in float64.
_SAFE = 1e-15


def total_norm(
    grads: Sequence[Tensor], norm_type: float, *, compiled: bool, of_gradients: bool = False
) -> float | Tensor:
    """The norm of all elements of all gradients. Equal entries of a sparse gradient are added up first.

    A gradient that is a DTensor counts with all its shards, so every process of its mesh must call this, with the
    DTensors in the same order.

    Args:
        grads: real or complex, on any devices.
        norm_type: 2.0, or infinity for the largest absolute value.
        compiled: whether what lies in host memory is read by a native function, with sums of float64.
        of_gradients: whether ``grads`` are parameters, of which those count that have a gradient.

    Returns:
        A number of float64 accuracy if all gradients are in host memory and ``compiled``. Otherwise sums are those of
        torch, in at least float32. With gradients on other devices it is a 0-d tensor on the first of these, of float64
        where the device has it, and the host waits for none.

    Raises:
        ShortStorageError: for a gradient whose storage was resized and does not hold it any more.
        native.NoCompilerError, compiler.BuildError, OSError, ImportError: if the native function cannot be had.
    """
    if compiled:
        norm, others = gradients.norm([*grads], of_gradients=of_gradients, largest=norm_type == math.inf)
    else:
        norm, others = 0.0, gradients.gradients_of([*grads]) if of_gradients else [*grads]
    if not others:
        return norm
    with torch.no_grad():
        return combined([norm, *_norms(others, norm_type, compiled)], norm_type)


def _norms(grads: list[Any], norm_type: float, compiled: bool) -> Iterable[float | Tensor]:
    plain: list[Tensor] = []
    sharded: dict[Any, list[Tensor]] = defaultdict(list)
    for grad in grads:
        if tensor_parts.is_dtensor(grad):
            grad = tensor_parts.without_pending_sums(grad)
            over = tuple(not placement.is_replicate() for placement in grad.placements)
            sharded[grad.device_mesh, over].append(tensor_parts.local_shard(grad))
        elif grad.layout is torch.strided:
            plain.append(grad)
        else:
            if grad.is_sparse:
                for part in tensor_parts.sparse_parts(grad):
                    check_storage(part)
                grad = grad.coalesce()
            plain.append(grad.values())
    yield _norm_of_plain(plain, norm_type, compiled)
    for (mesh, over), shards in sharded.items():
        norms = tensor_parts.gathered(_as_tensor(_norm_of_plain(shards, norm_type, compiled)), mesh, over)
        yield combined(norms.unbind(), norm_type)


def _norm_of_plain(tensors: list[Tensor], norm_type: float, compiled: bool) -> float | Tensor:
    norm, others = gradients.norm(tensors, largest=norm_type == math.inf) if compiled else (0.0, tensors)
    kinds: dict[Any, list[Tensor]] = defaultdict(list)
    for t in others:
        if type(t) is not Tensor and tensor_parts.is_fake(t):
            raise RuntimeError("max_grad_norm and skip_nonfinite need gradients that can be read, got fake tensors")
        check_storage(t)
        if t.numel():  # nothing has no largest element
            kinds[t.device, t.dtype].append(t)
    norms: list[float | Tensor] = [norm]
    for (device, dtype), alike in kinds.items():
        total = _norm_of_alike(alike, norm_type, torch.promote_types(dtype, torch.float32))
        if device.type == "cpu" and not _SAFE <= total.item() < math.inf:
            total = _norm_of_alike(alike, norm_type, torch.float64)
        norms.append(total)
    return combined(norms, norm_type)


def _norm_of_alike(tensors: list[Tensor], norm_type: float, dtype: torch.dtype) -> Tensor:
    """Of tensors of one dtype on one device, with sums of ``dtype``: a few launches, however many tensors."""
    each = torch.stack(torch._foreach_norm(tensors, norm_type, dtype=dtype))
    return torch.linalg.vector_norm(each, norm_type, dtype=widest(each.device))  # type: ignore[no-any-return]


def combined(norms: Sequence[float | Tensor], norm_type: float) -> float | Tensor:
    """The norm of norms: a number if all are in host memory, else a 0-d tensor."""
    devices = [n.device for n in norms if isinstance(n, Tensor) and n.device.type != "cpu"]
    device = devices[0] if devices else torch.device("cpu")
    parts = [_as_tensor(n, device) for n in norms if not devices or isinstance(n, Tensor) or n != 0]
    total: Tensor = parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), norm_type)
    return total if devices else float(total)


def _as_tensor(number: float | Tensor, device: torch.device | None = None) -> Tensor:
    """In float64 where the device has it."""
    if isinstance(number, Tensor):
        device = device or number.device
        return number.to(device, widest(device))
    return torch.full((), number, dtype=torch.float64, device=device or "cpu")


def widest(device: torch.device) -> torch.dtype:
    """The dtype with the most digits that a device has."""
    return torch.float32 if device.type == "mps" else torch.float64
