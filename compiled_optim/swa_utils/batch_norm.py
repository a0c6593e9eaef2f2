"""The statistics of BatchNorm for a model that holds averages."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn import Module
from torch.optim import swa_utils


def update_bn(loader: Iterable[Any], model: Module, device: Any = None) -> None:
    """Recomputes the statistics of BatchNorm layers in one pass over ``loader``, as torch.optim.swa_utils does.

    Args:
        loader: batches, each a tensor, a list or tuple that begins with one, or a dict, which the model is given whole.
        model: the model whose layers are updated.
        device: where to move the batches, the tensors in a dict included.
    """

    def moved(batch: Any) -> Any:
        if isinstance(batch, list | tuple):
            batch = batch[0]
        if device is None:
            return batch
        if isinstance(batch, dict):
            return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        return batch.to(device)

    swa_utils.update_bn((moved(batch) for batch in loader), model)
