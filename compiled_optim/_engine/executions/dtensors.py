"""Parameters that are DTensors: a step updates the shards that this process holds, as plain tensors.

That is right for elementwise rules only. Gradients that are laid out otherwise are redistributed first, which every
process of the mesh must do in the same order, and once in a step.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compiled_optim._engine.executions.work import Work
from compiled_optim._engine.torch_private.tensor_parts import is_dtensor, local_shard


def local(t: Any) -> Any:
    """The shard of a DTensor that this process holds. Anything else is returned as it is."""
    return local_shard(t) if is_dtensor(t) else t


def local_gradient(p: Tensor, grad: Tensor) -> Tensor:
    """The shard of a gradient that belongs to the shard of its parameter, if that is a DTensor."""
    return local_shard(placed(p, grad)) if is_dtensor(p) else grad


def local_state(p: Any, state: dict[str, Any], buffers: Any) -> dict[str, Any]:
    """The state of a parameter. If that is a DTensor, its state as shards.

    Raises:
        RuntimeError: for one of ``buffers`` that is not sharded as the parameter is.
    """
    if not is_dtensor(p):
        return state
    shards = {}
    for name, value in state.items():
        sharded = is_dtensor(value)
        if name in buffers and value is not None and not (sharded and value.placements == p.placements):
            raise RuntimeError(
                f"state {name!r} of a parameter of shape {tuple(p.shape)} must be a DTensor with its placements "
                f"{p.placements}, got {_kind(value)}; load it by torch.distributed.checkpoint.state_dict"
            )
        shards[name] = local_shard(value) if sharded else value
    return shards


def placed(p: Any, grad: Any) -> Any:
    """The gradient of a DTensor in the parameter's placements.

    Raises:
        RuntimeError: for a gradient that is no DTensor, or one on another mesh.
    """
    if not (is_dtensor(grad) and grad.device_mesh == p.device_mesh):
        raise RuntimeError(
            f"the gradient of a DTensor of shape {tuple(p.shape)} must be a DTensor on {p.device_mesh}, "
            f"got {_kind(grad)}"
        )
    return grad if grad.placements == p.placements else grad.redistribute(placements=p.placements)


def redistributed(work: Work) -> dict[Tensor, Tensor]:
    """The gradients that had to be redistributed to the placements of their parameters, by parameter."""
    params = [p for group in work.groups for p in group["params"]]
    pairs = [(p, grad) for p in params if is_dtensor(p) and (grad := work.gradient(p)) is not None]
    return {p: new for p, grad in pairs if (new := placed(p, grad)) is not grad}


def refuse(work: Work, p: Any) -> None:
    """Raises RuntimeError if updating each shard would not update the DTensor. Communicates nothing."""
    name = work.rule.name
    if not work.rule.elementwise:
        raise RuntimeError(
            f"{name} does not support DTensor parameters: its rule is not elementwise, and a process holds a shard "
            "only; give it the parameters that are plain tensors, and the others to an elementwise optimizer"
        )
    if work.defaults.get("differentiable"):
        raise RuntimeError(f"{name} does not support DTensor parameters with differentiable=True")
    if any(placement.is_partial() for placement in p.placements):
        raise RuntimeError(f"{name} does not support parameters whose values are pending sums, got {_kind(p)}")
    local_state(p, work.state.get(p, {}), work.rule.declaration.buffers)


def _kind(t: Any) -> str:
    if is_dtensor(t):
        return f"a DTensor with placements {t.placements} on {t.device_mesh}"
    return f"a sparse {type(t).__name__}" if isinstance(t, Tensor) and t.is_sparse else f"a {type(t).__name__}"
