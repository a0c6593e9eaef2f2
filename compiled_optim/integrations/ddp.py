"""Steps between the reductions of DistributedDataParallel. Importing this module registers all optimizers.

Example:
    >>> import compiled_optim.integrations.ddp
    >>> ddp._register_fused_optim(compiled_optim.AdamW, lr=1e-3, compiled=True)  # doctest: +SKIP
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.optim import utils

from compiled_optim import algorithms
from compiled_optim.optimizer import Optimizer

__all__ = ["register"]

_torch: Any = utils  # whose functions are not annotated


class _OnePerParameter:
    """What DDP hands each gradient that it has reduced: an optimizer for every parameter."""

    def __init__(self, cls: Any, params: list[Tensor], *args: Any, **kwargs: Any) -> None:
        kwargs.pop("_allow_empty_param_list")  # DDP never says which parameters there are
        self._make = partial(cls, *args, **kwargs)
        tried = self._make([torch.empty(0, 0)])  # raises for wrong options, here and not in the backward pass
        if tried.rule.extras.factor:
            raise ValueError(
                "max_grad_norm and skip_nonfinite must not be given: they decide from all gradients, and "
                "DistributedDataParallel hands over one at a time"
            )
        self.optimizers: dict[Tensor, Optimizer] = {}

    def step_param(self, p: Tensor, grad: Tensor | None) -> None:
        if p not in self.optimizers:
            self.optimizers[p] = self._make([p])
        kept, p.grad = p.grad, grad
        try:
            self.optimizers[p].step()
        finally:
            p.grad = kept


def register(cls: type[Optimizer]) -> None:
    """Lets ``DistributedDataParallel._register_fused_optim`` take an optimizer class, such as one of your own.

    Its arguments may not be ``max_grad_norm`` and ``skip_nonfinite``, for which DDP raises ValueError.
    """
    _torch.register_functional_optim(cls, partial(_OnePerParameter, cls))


for _name in algorithms.__all__:
    register(getattr(algorithms, _name))
