"""What a step checks before it changes anything. Errors name the parameter, the state and the value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from compiled_optim._engine.declaration import Group
from compiled_optim._engine.executions import dtensors
from compiled_optim._engine.executions.work import Work
from compiled_optim._engine.rule import Rule
from compiled_optim._engine.torch_private import tensor_parts

COUNT_DTYPES = (torch.float32, torch.float64)
PLAIN = (torch.Tensor, torch.nn.Parameter)


def is_count(value: Any) -> bool:
    """Whether this is a tensor that a step can count in."""
    exact = isinstance(value, Tensor) and value.dtype in COUNT_DTYPES and value.layout is torch.strided
    return exact and value.numel() == 1


def are_fake(params: Iterable[Tensor]) -> bool:
    """Whether some of the parameters hold no data, so that nothing can be read of them or their state."""
    return any([type(p) not in PLAIN and tensor_parts.is_fake(p) for p in params])  # noqa: C419


def number_of(work: Work, p: Tensor, name: str, value: Any) -> float:
    """A step count, or another 0-d state, as a number.

    Raises:
        TypeError: if it is none; the message names the state, its value and what was expected.
    """
    try:
        if isinstance(value, Tensor) and (value.is_complex() or value.layout is not torch.strided):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        expected = "must be a number or a tensor of 1 element"
        raise TypeError(
            f"{_named(work, name)} of the parameter {place(work, p)} {expected}, got {described(value)}"
        ) from None


def refuse(work: Work, choices: list[Group]) -> None:
    """Raises RuntimeError for ``capturable`` without graphs, and what `dtensors.refuse` raises."""
    for group in work.groups:
        capturable = group.get("capturable")
        for p in group["params"]:
            if type(p) not in PLAIN and work.gradient(p) is not None and tensor_parts.is_dtensor(p):
                dtensors.refuse(work, p)
            if capturable and work.gradient(p) is not None and p.device.type == "cpu":
                raise RuntimeError(f"capturable=True needs parameters on a device with graphs, got one on {p.device}")


def check_dimensions(rule: Rule, group: dict[str, Any], params: Iterable[Tensor], groups: list[dict[str, Any]]) -> None:
    """Raises ValueError for parameters of a group that the rule does not take because of their dimensions."""
    only = rule.matrices_only
    for p in params if only is True or (only and group[only]) else ():
        if p.dim() != 2:
            raise ValueError(f"{rule.name}: params must be matrices, got one {_place_in(groups, p)}")


def check_gradient(work: Work, choice: Group, grad: Tensor) -> Tensor:
    """A sparse gradient in COO layout.

    Raises:
        RuntimeError: if the optimizer does not take dense gradients, or does not take sparse ones.
    """
    name = work.rule.name
    if grad.layout is torch.strided:
        raise RuntimeError(f"{name} does not support dense gradients, please consider Adam instead")
    if not work.rule.accepts_sparse:
        raise RuntimeError(f"{name} does not support sparse gradients, please consider SparseAdam instead")
    work.rule.keeps_untouched_rows(choice.switches)
    if grad.layout is not torch.sparse_coo:
        grad = grad.to_sparse(layout=torch.sparse_coo)
    tensor_parts.check_indices(grad)
    return grad


def check_whole(work: Work, p: Tensor, state: dict[str, Any]) -> None:
    """Raises KeyError if a part of the state is missing. All of it is made at once, except what a switch adds later."""
    declaration = work.rule.declaration
    own = [
        name
        for name, b in declaration.buffers.items()
        if b.when is None and b.belongs_to(p.dim()) and name not in declaration.copies
    ]
    needed = [*(() if work.rule.extras.counts else declaration.counts), *own]
    missing = [name for name in needed if state.get(name) is None]
    if missing and len(missing) < len(needed):
        there = [name for name in needed if name not in missing]
        where = place(work, p)
        raise KeyError(f"{_named(work, missing[0])} of the parameter {where} is missing beside its {there}")


def check_param(work: Work, owner: Tensor, p: Tensor, grad: Tensor) -> None:
    name, where = work.rule.name, place(work, owner)
    if grad.shape != p.shape:
        raise RuntimeError(
            f"{name}: the gradient of the parameter {where} must have its shape, got {tuple(grad.shape)}"
        )
    if p.is_conj():
        raise RuntimeError(f"{name}: the parameter {where} must not be lazily conjugated, use its resolve_conj()")
    if _overlaps(p):
        raise RuntimeError(
            f"{name}: the elements of the parameter {where} must not share a single memory location, "
            f"got strides {p.stride()}"
        )


def check_buffer(work: Work, p: Tensor, name: str, value: Any, shape: torch.Size) -> None:
    """Raises RuntimeError if a state does not fit its parameter; the message names both and what was expected.

    Args:
        shape: the one it should have, that of the parameter or of its shard if the state is one.
    """
    expected = None
    if not isinstance(value, Tensor):
        expected = "must be a tensor"
    elif value.shape != shape:
        expected = (
            f"must have the shape {tuple(shape)}" if name in work.rule.declaration.means else "must have its shape"
        )
    elif value.layout is not torch.strided and p.layout is torch.strided:
        expected = "must be dense"
    elif _overlaps(value):
        expected = "must not have elements that share a single memory location"
    if expected:
        found = tuple(value.shape) if " shape" in expected else described(value)
        where = place(work, p)
        raise RuntimeError(f"{_named(work, name)} of the parameter {where} {expected}, got {found}")


def check_kind(work: Work, owner: Tensor, p: Tensor, grad: Tensor, buffers: dict[str, Any]) -> None:
    """Checks what all parameters of one kind share: devices, and the dtypes of the state."""
    if p.is_complex() and not work.rule.accepts_complex:
        name, where = work.rule.name, place(work, owner)
        raise RuntimeError(f"{name} does not support complex parameters, got one of {p.dtype} {where}")
    if grad.device != p.device:
        name, where = work.rule.name, place(work, owner)
        raise RuntimeError(f"{name}: the gradient of the parameter {where} must be on {p.device}, got {grad.device}")
    for name, t in buffers.items():
        if t is None:
            continue
        expected = f"must be on {p.device}" if t.device != p.device else None
        if t.is_complex() != p.is_complex() or not (t.is_complex() or t.is_floating_point()):
            expected = "must be complex" if p.is_complex() else "must be of a real floating-point dtype"
        if expected:
            where = place(work, owner)
            raise RuntimeError(f"{_named(work, name)} of the parameter {where} {expected}, got {described(t)}")


def _overlaps(t: Tensor) -> bool:
    return t.layout is torch.strided and any(s == 0 and n > 1 for s, n in zip(t.stride(), t.shape, strict=True))


def _named(work: Work, name: str) -> str:
    return f"{work.rule.name}: state {name!r}"


def place(work: Work, p: Tensor) -> str:
    return _place_in(work.listed_in or work.groups, p)


def _place_in(groups: list[dict[str, Any]], p: Tensor) -> str:
    for i, group in enumerate(groups):
        for j, other in enumerate(group["params"]):
            if other is p:
                return f"of shape {tuple(p.shape)} at index {j} of param group {i}"
    return f"of shape {tuple(p.shape)}"


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.layout is torch.strided else f" {str(value.layout).removeprefix('torch.')}"
        return f"a{layout} tensor of {value.dtype} and shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, int) and value.bit_length() > 1024:
        return f"an int of {value.bit_length()} bits"
    return f"{value!r} of type {type(value).__name__}"
