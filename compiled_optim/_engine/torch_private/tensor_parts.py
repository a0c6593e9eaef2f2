"""The parts of sparse tensors, of DTensors and of flat copies of lists."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from compiled_optim._engine.torch_private import version

try:
    from torch._utils import _unflatten_dense_tensors
except ImportError as error:
    version.missing.append(version.lacks(error))


def sparse_parts(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values ``[nnz, ...]`` and indices ``[sparse dimensions, nnz]`` of a COO tensor, coalesced or not."""
    return tensor._values(), tensor._indices()


def check_indices(tensor: torch.Tensor) -> None:
    """Raises RuntimeError for an index out of range in a COO tensor."""
    values, indices = sparse_parts(tensor)
    torch.sparse_coo_tensor(indices, values, tensor.shape, check_invariants=True)


def touched_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The values ``[nnz, ...]`` of a COO tensor on a device, and the rows ``[nnz]`` that they belong to, each once.

    A row is what one index over all sparse dimensions selects. The device asserts that there are such rows.
    """
    values, indices = sparse_parts(tensor if tensor.is_coalesced() else tensor.coalesce())
    if not len(indices):  # there is no sparse dimension, so the whole tensor is one row
        return values, indices.new_zeros(len(values))
    rows, total = indices[0], tensor.shape[0]
    for size, more in zip(tensor.shape[1:], indices[1:], strict=False):
        rows, total = rows * size + more, total * size
    torch._assert_async(((rows >= 0) & (rows < total)).all(), "a sparse gradient has an index out of range")
    return values, rows.contiguous()


def unflatten(flat: torch.Tensor, like: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The parts of one 1-D tensor, with the shapes of ``like``."""
    if version.missing:
        return tuple(
            part.view_as(t) for part, t in zip(torch.split(flat, [t.numel() for t in like]), like, strict=True)
        )
    return _unflatten_dense_tensors(flat, like)  # type: ignore[no-untyped-call, no-any-return]


def is_dtensor(value: Any) -> bool:
    """Whether it is a DTensor. Their module takes a second to import; if nobody has imported it, there is none."""
    return isinstance(value, getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ()))


def is_fake(value: Any) -> bool:
    """Whether it is a tensor without data, as tracers use them; as with `is_dtensor`, their module may be missing."""
    return isinstance(value, getattr(sys.modules.get("torch._subclasses.fake_tensor"), "FakeTensor", ()))


def local_shard(tensor: Any) -> torch.Tensor:
    """The shard of a DTensor that this process holds: the tensor itself, where ``to_local`` makes a new view."""
    shard: Any = tensor._local_tensor
    # The result of a collective may still be under way.
    return shard.trigger_wait() if type(shard).__name__ == "AsyncCollectiveTensor" else shard  # type: ignore[no-any-return]


def without_pending_sums(tensor: Any) -> Any:
    """A DTensor whose placements shard and replicate only. Sums are made on all processes of its mesh."""
    from torch.distributed.tensor import Replicate

    placements = [Replicate() if p.is_partial() else p for p in tensor.placements]
    return tensor if placements == [*tensor.placements] else tensor.redistribute(placements=placements)


def gathered(value: torch.Tensor, mesh: Any, over: Sequence[bool]) -> torch.Tensor:
    """The 0-d tensors ``value`` of several processes, as a vector that is the same on each.

    Args:
        over: for each dimension of the mesh, whether its processes have values of their own and not the same.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Shard(0) if own else Replicate() for own in over]
    whole: torch.Tensor = DTensor.from_local(value.reshape(1), mesh, placements).full_tensor()
    return whole.to(value.device)
