"""The dtype and the layout in which a kernel reads gradients; and setting them to zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compiled_optim._engine.executions.survey import Member
from compiled_optim._engine.kernels.backends import backend_of
from compiled_optim._engine.kernels.trace import Signature
from compiled_optim._engine.torch_private import dynamo


def read_dtype(p: Tensor, given: torch.dtype | None) -> torch.dtype:
    """The dtype that a kernel reads gradients of ``p`` in: the given one, or the parameter's where it cannot."""
    backend = backend_of(p)
    if given is None or backend is None or given not in backend.dtypes or given.is_complex != p.is_complex():
        return p.dtype
    return given


def dtype_of(m: Member) -> torch.dtype:
    """The same for the gradient that a member has, or for the one that autograd will make."""
    foreseen = m.listed.grad_dtype if m.listed.is_leaf else None
    return read_dtype(m.param, foreseen if m.grad is None else m.grad.dtype)


def is_read_as_it_is(host: Any, p: Tensor, grad: Tensor) -> bool:
    """Whether a kernel reads this gradient without a copy."""
    return grad.dtype == read_dtype(p, grad.dtype) and bool(host.matches(grad, p))


def like_parameter(p: Tensor, grad: Tensor) -> Tensor:
    """A copy in the parameter's layout, and in a dtype that its kernel reads."""
    return torch.empty_like(p, dtype=read_dtype(p, grad.dtype), requires_grad=False).copy_(grad.detach())


def samples(p: Tensor, signature: Signature) -> list[Tensor]:
    """A tensor with the dtype of the gradients, if that is not the parameter's."""
    dtype = signature.grad_dtype
    if dtype is None:
        return []
    with dynamo.outside_modes():
        return [torch.empty(0, dtype=dtype.to_complex() if p.is_complex() else dtype, device="cpu")]


def zero(params: list[Tensor]) -> None:
    """Sets the gradients to zero, those in host memory in one native pass. Raises what that raises."""
    from compiled_optim._engine.kernels import gradients  # its library is loaded when somebody asks for it

    for grad in gradients.zero(params, of_gradients=True):  # the others, as torch.optim does
        if grad.grad_fn is not None:
            grad.detach_()
        else:
            grad.requires_grad_(False)
        grad.zero_()
